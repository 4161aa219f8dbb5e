"""The machines of the cloud: how they boot, and how they end."""

import logging
import secrets
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fake_cloud.hosts import Host
from fake_cloud.instance_rules import scheduling_of
from fake_cloud.plan import Plan
from fake_cloud.room import SYSTEM_PATH, Room

SECONDS_OF_SHUTDOWN = 30.0

log = logging.getLogger("fake_cloud")

PlanOf = Callable[[str, dict[str, list[str]]], Plan]  # a host's plan, from its name and the SSH keys of each user


@dataclass
class Instance:
    """A machine: its description in Google's API (`resource`), and the host that it runs on."""

    resource: dict[str, Any]
    zone: str
    host: Host | None = None
    preempted: bool = False
    shutdown_output: str | None = None  # of its shutdown script, once it has run
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)  # held while the machine boots or ends

    @property
    def name(self) -> str:
        return self.resource["name"]

    @property
    def status(self) -> str:
        return self.resource["status"]

    @property
    def ip(self) -> str:
        return self.resource["networkInterfaces"][0]["networkIP"]

    @property
    def account(self) -> dict[str, Any] | None:
        """`email` and `scopes` of its service account, or None."""
        return next(iter(self.resource.get("serviceAccounts", [])), None)

    @property
    def email(self) -> str | None:
        return self.account["email"] if self.account else None

    @property
    def node_type(self) -> str | None:
        """The name of its node type in Ray's YAML, or None."""
        return self.resource.get("labels", {}).get("ray-user-node-type")

    def attribute(self, key: str) -> str | None:
        items = self.resource.get("metadata", {}).get("items", [])
        return next((item["value"] for item in items if item["key"] == key), None)


class Machines:
    """All instances, and what they share."""

    def __init__(self, room: Room, plan_of: PlanOf) -> None:
        self.room, self._plan_of = room, plan_of
        self.instances: dict[str, Instance] = {}
        self.metadata: dict[str, Any] = {"items": [], "fingerprint": secrets.token_hex(4)}  # the project's
        self.closing = threading.Event()

    def at(self, address: str) -> Instance | None:
        return next((one for one in list(self.instances.values()) if one.ip == address), None)

    def boot(self, instance: Instance) -> None:
        """Boot an instance, and return when its sshd answers. Do nothing if it was deleted meanwhile.

        Raises:
            OSError: the instance does not boot, or its sshd does not answer.
        """
        keys: dict[str, list[str]] = {}
        project_keys = [item["value"] for item in self.metadata["items"] if item["key"] == "ssh-keys"]
        for line in "\n".join([*project_keys, instance.attribute("ssh-keys") or ""]).splitlines():
            user, _, key = line.partition(":")
            if key:
                keys.setdefault(user, []).append(key)
        with instance.lock:
            if self.instances.get(instance.name) is not instance:
                return  # deleted before it booted
            instance.resource["status"] = "STAGING"
            instance.host = Host(self.room, self._plan_of(instance.name, keys), instance.ip)
            instance.resource["status"] = "RUNNING"

    def end(self, instance: Instance) -> None:
        """Delete a machine as Google does: its shutdown script runs first, with a time limit."""
        instance.resource["status"] = "STOPPING"
        with instance.lock:
            script = instance.attribute("shutdown-script")
            if script and instance.host and instance.host.alive:
                instance.shutdown_output = self._run_script(instance.host, script)
            if instance.host:
                instance.host.end()
            instance.host = None
        self.instances.pop(instance.name, None)

    def _run_script(self, host: Host, script: str) -> str:
        try:
            host.write("/run/shutdown-script", script, 0o700)
            command = "exec /run/shutdown-script 2>&1"
            return host.run(command, env={"PATH": SYSTEM_PATH}, timeout=SECONDS_OF_SHUTDOWN, check=False).stdout
        except subprocess.TimeoutExpired as error:
            return (error.stdout or b"").decode() + f"\nkilled after {SECONDS_OF_SHUTDOWN:.0f} s\n"
        except subprocess.CalledProcessError as error:
            return f"did not run: {error}"  # the machine is being deleted anyway

    def lose(self, name: str) -> None:
        """Remove a machine at once, without any notification.

        Raises:
            KeyError: there is no machine of this name.
        """
        instance = self.instances.pop(name)
        with instance.lock:
            if instance.host:
                instance.host.end()

    def preempt(self, name: str) -> None:
        """Preempt a spot machine, and return when it is gone.

        Raises:
            ValueError: Google would not delete this machine when it preempts it.
        """
        instance = self.instances[name]
        scheduling = scheduling_of(instance.resource)
        if (scheduling.get("provisioningModel"), scheduling.get("instanceTerminationAction")) != ("SPOT", "DELETE"):
            raise ValueError(f"{name} is no spot machine that Google deletes when it takes it back")
        instance.preempted = True
        self.end(instance)

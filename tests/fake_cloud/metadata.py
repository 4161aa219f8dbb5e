"""The metadata server: what a machine can ask about itself, and where it gets the tokens of its own account."""

import json
from typing import Any

from fake_cloud.answers import Refusal
from fake_cloud.identity import PROJECT_NUMBER, Identity
from fake_cloud.instance_rules import is_spot
from fake_cloud.machines import Instance, Machines

BASE = "/computeMetadata/v1/"
MOST_SECONDS_TO_WAIT = 300.0


def _not_found(path: str) -> Refusal:
    return Refusal(404, f"The requested URL {path} was not found on this server.", "notFound")


def _truth(value: bool) -> str:
    return "TRUE" if value else "FALSE"


def _tree(machines: Machines, instance: Instance, project: str) -> dict[str, Any]:
    """What there is to ask, as folders and texts."""
    accounts = {}
    if account := instance.account:
        scopes = "".join(f"{scope}\n" for scope in account.get("scopes", []))
        told = {"aliases": "default", "email": account["email"], "scopes": scopes, "token": ""}
        accounts = {"default": told, account["email"]: told}
    items = instance.resource.get("metadata", {}).get("items", [])
    return {
        "instance": {
            "attributes": {item["key"]: item["value"] for item in items},
            "hostname": f"{instance.name}.c.{project}.internal",
            "id": instance.resource["id"],
            "maintenance-event": "NONE",
            "name": instance.name,
            "network-interfaces": {"0": {"ip": instance.ip}},
            "preempted": _truth(instance.preempted),
            "scheduling": {"preemptible": _truth(is_spot(instance.resource))},
            "service-accounts": accounts,
            "zone": f"projects/{PROJECT_NUMBER}/zones/{instance.zone}",
        },
        "project": {
            "attributes": {item["key"]: item["value"] for item in machines.metadata["items"]},
            "numeric-project-id": PROJECT_NUMBER,
            "project-id": project,
        },
        "universe": {"universe-domain": "googleapis.com"},
    }


class Metadata:
    """The server's answers."""

    def __init__(self, machines: Machines, identity: Identity) -> None:
        self._machines, self._identity = machines, identity

    def answer(self, asker: Instance | None, path: str, query: dict[str, str], flavor: str | None) -> str:
        """The text for a path, JSON where it begins with {. Raises Refusal: also for who is no instance."""
        if asker is None:
            raise _not_found(path)
        if flavor != "Google":
            raise Refusal(403, "Missing Metadata-Flavor:Google header.", "forbidden")
        if path == "/":
            return "computeMetadata/\n"
        if not path.startswith(BASE):
            raise _not_found(path)
        parts = [part for part in path.removeprefix(BASE).split("/") if part]
        if query.get("wait_for_change") == "true":
            self._wait_for_change(asker, parts, query)
        here = self._walk(asker, parts)
        if parts[:2] == ["instance", "service-accounts"] and parts[3:] == ["token"] and asker.account:
            return json.dumps(self._identity.token(asker.account["email"], asker.account.get("scopes", [])))
        if isinstance(here, str):
            return here
        if query.get("recursive") == "true":
            return json.dumps(_account_form(here) if "aliases" in here else here)
        return "".join(f"{name}/\n" if isinstance(inner, dict) else f"{name}\n" for name, inner in here.items())

    def _walk(self, asker: Instance, parts: list[str]) -> Any:
        here: Any = _tree(self._machines, asker, self._identity.project)
        for part in parts:
            if not isinstance(here, dict) or part not in here:
                raise _not_found(BASE + "/".join(parts))
            here = here[part]
        return here

    def _wait_for_change(self, asker: Instance, parts: list[str], query: dict[str, str]) -> None:
        """Returns when what lies there has changed, or after the time that the asker gave."""
        before = self._walk(asker, parts)
        seconds = min(float(query.get("timeout_sec", MOST_SECONDS_TO_WAIT)), MOST_SECONDS_TO_WAIT)
        machines = self._machines
        with machines.changed:
            machines.changed.wait_for(lambda: machines.closing.is_set() or self._walk(asker, parts) != before, seconds)


def _account_form(told: dict[str, str]) -> dict[str, Any]:
    """An account as `recursive=true` gives it."""
    return {"aliases": [told["aliases"]], "email": told["email"], "scopes": told["scopes"].split()}

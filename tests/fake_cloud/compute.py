"""The part of Google's compute API that Ray calls."""

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fake_cloud.answers import Refusal, forbidden, not_implemented
from fake_cloud.identity import Caller, Identity
from fake_cloud.instance_rules import check_instance, check_labels
from fake_cloud.machines import Instance, Machines

SECONDS_OF_OPERATIONS = 1.0  # at least: operations that end at once trigger a race in Ray's installer
ROOT = "https://www.googleapis.com/compute/v1/projects"

log = logging.getLogger("fake_cloud")


class Compute:
    """The API for the machines of one project."""

    def __init__(self, machines: Machines, identity: Identity) -> None:
        self.machines, self.identity, self.project = machines, identity, identity.project
        self._operations: dict[str, dict[str, Any]] = {}
        self._running: list[threading.Thread] = []
        self._lock = threading.RLock()

    def close(self) -> None:
        """Wait until no operation runs any more. Close the room before, so that they fail at once."""
        for thread in self._running:
            thread.join()

    def answer(
        self, method: str, path: str, query: dict[str, str], body: dict[str, Any], caller: Caller
    ) -> dict[str, Any]:
        """Return Google's answer. path: the part after /compute/v1.

        Raises:
            Refusal: Google would refuse the request, or the fake does not support it.
        """
        found = re.fullmatch(r"/projects/([^/]+)(/.*)?", path)
        if not found or query.keys() - {"alt", "filter", "prettyPrint"}:
            raise not_implemented(f"{method} {path} {query}")
        if found[1] != self.project:
            raise Refusal(404, f"The resource 'projects/{found[1]}' was not found", "notFound")
        if not self.identity.may(caller.email, "instances"):
            raise forbidden(f"Required 'compute' permissions for '{path[1:]}'")
        for verb, pattern, function in ROUTES:
            match = re.fullmatch(pattern, found[2] or "")
            if verb == method and match:
                return function(self, *match.groups(), query=query, body=body, caller=caller)
        raise not_implemented(f"{method} {path}")

    def _operate(self, target: str, work: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Do the work in the background. Return the operation; a later request for it reports the result."""
        name = f"operation-{secrets.token_hex(8)}"
        operation = {"kind": "compute#operation", "name": name, "status": "RUNNING", "targetLink": target}
        self._operations[name] = operation

        def run() -> None:
            begin = time.monotonic()
            try:
                work()
            except Exception as error:  # any exception: the caller that waits for the operation must learn of it
                if not self.machines.closing.is_set():
                    log.warning("%s on %s: %s", name, target, error)
                operation["error"] = {"errors": [{"code": "INTERNAL_ERROR", "message": str(error)}]}
            self.machines.closing.wait(begin + SECONDS_OF_OPERATIONS - time.monotonic())
            operation["status"] = "DONE"

        thread = threading.Thread(target=run, name=name)
        self._running.append(thread)
        thread.start()
        return dict(operation)

    def _operation(self, name: str, **_: Any) -> dict[str, Any]:
        if name not in self._operations:
            raise Refusal(404, f"The resource '{name}' was not found", "notFound")
        return self._operations[name]

    def _project(self, **_: Any) -> dict[str, Any]:
        return {"kind": "compute#project", "name": self.project, "commonInstanceMetadata": self.machines.metadata}

    def _set_metadata(self, *, body: dict[str, Any], **_: Any) -> dict[str, Any]:
        with self._lock:
            if body.get("fingerprint") != self.machines.metadata["fingerprint"]:
                raise Refusal(
                    412, "Supplied fingerprint does not match current metadata fingerprint.", "conditionNotMet"
                )
            self.machines.metadata = {"items": body.get("items", []), "fingerprint": secrets.token_hex(4)}
        return self._operate(f"{ROOT}/{self.project}")

    def _list(self, zone: str, *, query: dict[str, str], **_: Any) -> dict[str, Any]:
        wanted = [one.resource for one in list(self.machines.instances.values()) if one.zone == zone]
        return {"kind": "compute#instanceList", "items": [one for one in wanted if fits(one, query.get("filter", ""))]}

    def _find(self, zone: str, name: str) -> Instance:
        instance = self.machines.instances.get(name)
        if instance is None or instance.zone != zone:
            what = f"projects/{self.project}/zones/{zone}/instances/{name}"
            raise Refusal(404, f"The resource '{what}' was not found", "notFound")
        return instance

    def _get(self, zone: str, name: str, **_: Any) -> dict[str, Any]:
        return self._find(zone, name).resource

    def _insert(self, zone: str, *, body: dict[str, Any], caller: Caller, **_: Any) -> dict[str, Any]:
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-f]", zone):
            raise Refusal(400, f"Invalid value for field 'zone': '{zone}'. Unknown zone.")
        check_instance(body, zone)
        self._check_account(body, caller)
        with self._lock:
            if body["name"] in self.machines.instances:
                raise Refusal(409, f"The resource '{body['name']}' already exists", "alreadyExists")
            instance = Instance(self._as_made(body, zone), zone)
            self.machines.instances[instance.name] = instance
        return self._operate(instance.resource["selfLink"], lambda: self.machines.boot(instance))

    def _check_account(self, body: dict[str, Any], caller: Caller) -> None:
        for account in body.get("serviceAccounts", []):
            email = account.get("email", "")
            if not self.identity.knows(email):
                what = f"projects/{self.project}/serviceAccounts/{email}"
                raise Refusal(404, f"The resource '{what}' of type 'serviceAccount' was not found.", "notFound")
            if not self.identity.may(caller.email, "use accounts", email):
                message = f"The user does not have access to service account '{email}'. User: '{caller.email}'. Ask a "
                message += "project owner to grant you the iam.serviceAccountUser role on the service account"
                raise Refusal(400, message, "SERVICE_ACCOUNT_ACCESS_DENIED")

    def _as_made(self, body: dict[str, Any], zone: str) -> dict[str, Any]:
        address = self.machines.room.address()
        card = {**body["networkInterfaces"][0], "networkIP": address}
        card["accessConfigs"] = [{**one, "natIP": address} for one in card.get("accessConfigs", [])]
        link = f"{ROOT}/{self.project}/zones/{zone}"
        return body | {
            "kind": "compute#instance",
            "id": str(secrets.randbelow(10**18)),
            "status": "PROVISIONING",
            "labelFingerprint": secrets.token_hex(4),
            "creationTimestamp": datetime.now(UTC).isoformat(),
            "zone": link,
            "selfLink": f"{link}/instances/{body['name']}",
            "networkInterfaces": [card],
        }

    def _delete(self, zone: str, name: str, **_: Any) -> dict[str, Any]:
        instance = self._find(zone, name)
        return self._operate(instance.resource["selfLink"], lambda: self.machines.end(instance))

    def _set_labels(self, zone: str, name: str, *, body: dict[str, Any], **_: Any) -> dict[str, Any]:
        instance = self._find(zone, name)
        check_labels(body["labels"])
        with self._lock:
            if body.get("labelFingerprint") != instance.resource["labelFingerprint"]:
                message = "Labels fingerprint either invalid or resource labels have changed"
                raise Refusal(412, message, "conditionNotMet")
            instance.resource |= {"labels": body["labels"], "labelFingerprint": secrets.token_hex(4)}
        return self._operate(instance.resource["selfLink"])


def fits(resource: dict[str, Any], wanted: str) -> bool:
    """Return whether an instance matches the filter of a list request. Only the filters that Ray writes are supported.

    Raises:
        Refusal: another filter.
    """
    equal = re.findall(r"\(labels\.([-\w]+) = ([-\w]+)\)", wanted)
    missing = re.findall(r"\(NOT labels\.([-\w]+):\*\)", wanted)
    status = re.findall(r"\(status = ([A-Z]+)\)", wanted)
    terms = r"\((?:labels\.[-\w]+ = [-\w]+|NOT labels\.[-\w]+:\*|status = [A-Z]+)\)"
    if re.sub(r"[() ]|AND|OR", "", re.sub(terms, "", wanted)):
        raise Refusal(400, f"Invalid value for field 'filter': '{wanted}'. Invalid list filter expression.")
    labels = resource.get("labels", {})
    of_labels = all(labels.get(key) == value for key, value in equal) and not any(key in labels for key in missing)
    return of_labels and (not status or resource["status"] in status)


_INSTANCES = r"/zones/([^/]+)/instances"
ROUTES: list[tuple[str, str, Callable[..., dict[str, Any]]]] = [
    ("GET", "", Compute._project),
    ("POST", "/setCommonInstanceMetadata", Compute._set_metadata),
    ("GET", r"/(?:global|zones/[^/]+)/operations/([^/]+)", Compute._operation),
    ("GET", _INSTANCES, Compute._list),
    ("POST", _INSTANCES, Compute._insert),
    ("GET", _INSTANCES + "/([^/]+)", Compute._get),
    ("DELETE", _INSTANCES + "/([^/]+)", Compute._delete),
    ("POST", _INSTANCES + "/([^/]+)/setLabels", Compute._set_labels),
]

"""Checks of a request for an instance, as Google makes them: against its published schema, then by further rules."""

import json
import re
from functools import cache
from typing import Any

from googleapiclient.discovery_cache import get_static_doc

from fake_cloud.answers import Refusal

NAME = r"[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?"
MACHINE_TYPE = r"[a-z]\d+[a-z]?-(?:(?:standard|highmem|highcpu|highgpu|megagpu|ultragpu)-\d+g?|micro|small|medium)"
MACHINE_TYPE += r"|(?:[a-z]\d[a-z]?-)?custom-\d+-\d+"
# The machine family that each GPU can be attached to.
ACCELERATORS = {
    "nvidia-tesla-t4": "n1",
    "nvidia-l4": "g2",
}
TYPES = {"string": str, "boolean": bool, "integer": int, "number": (int, float)}


@cache
def _schemas() -> dict[str, Any]:
    return json.loads(get_static_doc("compute", "v1"))["schemas"]


def _unknown(name: str, at: str) -> Refusal:
    message = f"Invalid JSON payload received. Unknown name \"{name}\" at '{at}': Cannot find field."
    return Refusal(400, message, "badRequest")


def _wrong(at: str, value: object, why: str) -> Refusal:
    return Refusal(400, f"Invalid value for field '{at}': '{value}'. {why}")


def check_schema(value: Any, schema: dict[str, Any], at: str) -> None:
    """Check a value against Google's schema: its names, types and enumerated words.

    Raises:
        Refusal: the value does not match.
    """
    if "$ref" in schema:
        # A list is accepted in place of a single message, as Google does: Ray's docs write `scheduling` as a list.
        for one in value if isinstance(value, list) else [value]:
            check_schema(one, _schemas()[schema["$ref"]], at)
    elif schema["type"] == "object":
        if not isinstance(value, dict):
            raise Refusal(400, f"Invalid value at '{at}'", "badRequest")
        for name, inner in value.items():
            known = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if known is None:
                raise _unknown(name, at)
            check_schema(inner, known, f"{at}.{name}")
    elif schema["type"] == "array":
        for number, inner in enumerate(value if isinstance(value, list) else [value]):
            check_schema(inner, schema["items"], f"{at}[{number}]")
    else:
        number = schema.get("format") in ("int64", "uint64") and isinstance(value, int)
        if not (isinstance(value, TYPES[schema["type"]]) or number) or value not in schema.get("enum", [value]):
            raise Refusal(400, f"Invalid value at '{at}', \"{value}\"", "badRequest")


def check_labels(labels: dict[str, str]) -> None:
    """Check the keys and values of labels.

    Raises:
        Refusal: one of them is not allowed.
    """
    allowed = "lowercase letters, numeric characters, underscores and dashes. The {} can be at most 63 characters long."
    for key, value in labels.items():
        if not re.fullmatch(r"[a-z][-_a-z0-9]{0,62}", key):
            why = "The key must start with a lowercase character, can only contain " + allowed.format("key")
            raise _wrong("resource.labels", "", f"Label key '{key}' violates format constraints. {why}")
        if not re.fullmatch(r"[-_a-z0-9]{0,63}", value):
            why = "The value can only contain " + allowed.format("value")
            raise _wrong("resource.labels", "", f"Label value '{value}' violates format constraints. {why}")


def scheduling_of(instance: dict[str, Any]) -> dict[str, Any]:
    """Return `scheduling`, also if it was given as a list."""
    given = instance.get("scheduling") or {}
    return {name: value for one in (given if isinstance(given, list) else [given]) for name, value in one.items()}


def check_instance(instance: dict[str, Any], zone: str) -> None:
    """Check a request for an instance.

    Raises:
        Refusal: Google would not accept it. In Google's words, for the first fault.
    """
    check_schema(instance, {"$ref": "Instance"}, "resource")
    if not re.fullmatch(NAME, instance.get("name", "")):
        raise _wrong("resource.name", instance.get("name", ""), f"Must be a match of regex '{NAME}'")
    check_labels(instance.get("labels", {}))
    for number, tag in enumerate(instance.get("tags", {}).get("items", [])):
        if not re.fullmatch(NAME, tag):
            raise _wrong(f"resource.tags.items[{number}]", tag, f"Must be a match of regex '{NAME}'")
    _check_reference("resource.machineType", instance.get("machineType", ""), zone, "machineTypes", MACHINE_TYPE)
    _check_disks(instance, zone)
    _check_network(instance)
    _check_scheduling(scheduling_of(instance))
    _check_accelerators(instance, zone)
    _check_metadata(instance.get("metadata", {}).get("items", []))


def _check_reference(at: str, given: str, zone: str, kind: str, name: str) -> None:
    """Check a reference to a resource of the zone. It is part of a URL: Google does not accept a bare name."""
    found = re.fullmatch(rf"(?:.*/)?zones/([^/]+)/{kind}/([^/]+)", given)
    if not found:
        raise _wrong(at, given, "The URL is malformed.")
    if found[1] != zone or not re.fullmatch(name, found[2]):
        raise _wrong(at, given, "The referenced resource does not exist.")


def _check_disks(instance: dict[str, Any], zone: str) -> None:
    disks = instance.get("disks")
    if not disks:
        raise _wrong("resource.disks", "", "No disks are specified.")
    if [disk.get("boot", False) for disk in disks].count(True) != 1 or not disks[0].get("boot"):
        raise _wrong("resource.disks", "", "Boot disk must be the first disk attached to the instance.")
    for number, disk in enumerate(disks):
        at, made = f"resource.disks[{number}].initializeParams", disk.get("initializeParams", {})
        image = made.get("sourceImage", "")
        if disk.get("boot") and not re.search(r"(?:^|/)(?:projects/[^/]+/)?global/images/(?:family/)?[^/]+$", image):
            raise _wrong(at + ".sourceImage", image, "The URL is malformed.")
        if int(made.get("diskSizeGb", 10)) < 10:
            raise _wrong(at + ".diskSizeGb", made["diskSizeGb"], "Must be greater than or equal to 10.")
        if "diskType" in made:
            _check_reference(at + ".diskType", made["diskType"], zone, "diskTypes", NAME)


def _check_network(instance: dict[str, Any]) -> None:
    cards = instance.get("networkInterfaces")
    if not cards:
        raise _wrong("resource.networkInterfaces", "", "At least one network interface is required.")
    for number, card in enumerate(cards):
        given = card.get("subnetwork") or card.get("network") or ""
        if not re.search(r"(?:^|/)(?:regions/[^/]+/subnetworks|global/networks)/[^/]+$", given):
            raise _wrong(f"resource.networkInterfaces[{number}]", given, "The URL is malformed.")


def _check_scheduling(scheduling: dict[str, Any]) -> None:
    at, model = "resource.scheduling", scheduling.get("provisioningModel")
    spot = model == "SPOT" or scheduling.get("preemptible")
    if spot and scheduling.get("automaticRestart"):
        raise _wrong(
            at + ".automaticRestart", "true", "Scheduling must have automaticRestart be false when preemptible is true."
        )
    if spot and scheduling.get("onHostMaintenance") == "MIGRATE":
        raise _wrong(at + ".onHostMaintenance", "MIGRATE", "Preemptible instances must have it be TERMINATE.")
    if scheduling.get("instanceTerminationAction") and not (model == "SPOT" or "maxRunDuration" in scheduling):
        why = "Instance termination action is only for SPOT instances and those of limited run duration."
        raise _wrong(at + ".instanceTerminationAction", scheduling["instanceTerminationAction"], why)


def _check_accelerators(instance: dict[str, Any], zone: str) -> None:
    for number, one in enumerate(instance.get("guestAccelerators", [])):
        at, given = f"resource.guestAccelerators[{number}]", one.get("acceleratorType", "")
        _check_reference(at + ".acceleratorType", given, zone, "acceleratorTypes", "|".join(ACCELERATORS))
        kind, machine = given.rsplit("/", 1)[1], instance["machineType"].rsplit("/", 1)[1]
        if one.get("acceleratorCount") not in (1, 2, 4, 8, 16):
            raise _wrong(at + ".acceleratorCount", one.get("acceleratorCount"), "The number of GPUs is not supported.")
        if machine.split("-")[0] != ACCELERATORS[kind]:
            message = f"[{machine}, {kind}] features are not compatible for creating instance."
            raise Refusal(400, message, "badRequest")
        if scheduling_of(instance).get("onHostMaintenance") != "TERMINATE":
            raise Refusal(400, "Instances with guest accelerators do not support live migration.", "badRequest")


def _check_metadata(items: list[dict[str, str]]) -> None:
    keys = [item.get("key", "") for item in items]
    for key in keys:
        if not re.fullmatch(r"[-_a-zA-Z0-9]{1,128}", key):
            raise _wrong("resource.metadata.items.key", key, "Must be a match of regex '[a-zA-Z0-9-_]{1,128}'")
    if len(keys) != len(set(keys)):
        raise _wrong("resource.metadata", "", "Duplicate metadata keys.")

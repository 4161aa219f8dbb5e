"""Checks a cluster file (`ray_cluster.yaml`) before `ray up`, which would find out later and for money, or not at all.

What Ray finds by itself comes first: unknown keys, wrong types. The rest is what it accepts and what then fails, costs
or is open to others; each rule says why.
"""

import logging
import os
import re
import stat
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import InputError

SUFFIXES = (".yaml", ".yml")
PINNED = ("ray", "tensorflow", "keras")
TOKEN_FILE = "~/.ray/auth_token"  # noqa: S105 - where the token is, not the token
_PLACEHOLDER = re.compile(r"<[A-Z][A-Z_-]*>")
_PROJECT = re.compile(r"[a-z][a-z0-9-]{4,28}[a-z0-9]")
# Families of machine types that come with GPUs; others name them in `guestAccelerators`.
_WITH_GPU = re.compile(r"(a[234]x?|g[24])-")
# What Ray, which looks into no machine, does not check.
_FORMS: dict[str, tuple[type, ...]] = {
    "serviceAccounts": (list,), "guestAccelerators": (list,), "scheduling": (dict, list), "tags": (dict,),
}  # fmt: skip
# What Ray does on the head where `head_setup_commands` is left out.
_RAYS_OWN_SETUP = "pip install google-api-python-client"
# `ray start` under RAY_AUTH_MODE=token: exported before it, or set for it.
_WITH_TOKEN = re.compile(
    r"(?:^|;|&&)\s*export RAY_AUTH_MODE=token\s*(?:;|&&)|\bRAY_AUTH_MODE=token(?:\s+\w+=\S+)*\s+ray start\b"
)
# Accounts with rights over a whole project: Compute Engine's default, and the one that Ray makes for itself.
_BROAD_ACCOUNT = re.compile(r"\d+-compute@developer\.gserviceaccount\.com|ray-autoscaler-sa-v1@.*")


def faults_of_cluster_file(path: Path) -> list[str]:
    """What is wrong, a line each; empty if nothing is.

    Raises:
        InputError: it is not there, or no YAML of the form that Ray takes.
    """
    config = _read(path)
    placeholders = [
        f"{where}: replace {found[0]}. Received: {text}"
        for where, text in _texts(config)
        if (found := _PLACEHOLDER.search(text))
    ]
    faults = placeholders or [  # the rest would be said of what is not there yet
        *_of_project(config),
        *(fault for name, node in config["available_node_types"].items() for fault in _of_node(name, node)),
        *_of_places(config),
        *_of_versions(config),
        *_of_ray(config),
        *_of_token(config, path.parent),
    ]
    return [" ".join(fault.split()) for fault in faults]  # names and commands may have several lines


def _read(path: Path) -> dict[str, Any]:
    from ray.autoscaler._private.cli_logger import cli_logger
    from ray.autoscaler._private.util import prepare_config, validate_config

    cli_logger.configure(log_style="record", verbosity=-999)  # it prints what the error says
    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"the cluster file must be there. Received: {path}") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} must be YAML. Received: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(config, dict) or not isinstance(config.get("provider"), dict):
        raise InputError(f"{path} must be a cluster file of Ray. Received: one without `provider`")
    if config["provider"].get("type") != "gcp":
        raise InputError(f"provider.type must be gcp. Received: {config['provider'].get('type')!r} in {path}")
    try:
        list(_texts(config))  # fails where a part holds itself
        prepared: dict[str, Any] = prepare_config(config)
        validate_config(prepared)
    except Exception as error:  # jsonschema's, and plain ones of Ray
        text = getattr(error, "message", None) or str(error)
        raise InputError(f"{path} must be a cluster file of Ray. Received: {' '.join(text.split())[:300]}") from None
    return prepared


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the file, with where it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{where}.{index}")
    elif isinstance(value, str):
        yield where, value


def _of_project(config: dict[str, Any]) -> Iterator[str]:
    project = config["provider"].get("project_id")
    if not isinstance(project, str) or not _PROJECT.fullmatch(project):
        yield (
            "provider.project_id: must be the id of a project that exists, 6 to 30 letters, digits and '-'; Ray tries "
            f"to create one that it does not find. Received: {project!r}"
        )


def _of_node(name: str, node: dict[str, Any]) -> Iterator[str]:
    where, machine = f"available_node_types.{name}.node_config", node["node_config"]
    for key, forms in _FORMS.items():
        if machine.get(key) and not isinstance(machine[key], forms):
            kinds = " or ".join("a mapping" if form is dict else "a list" for form in forms)
            yield f"{where}.{key}: must be {kinds}. Received: {machine[key]!r}"
            return
    accounts = machine.get("serviceAccounts") or []
    emails = [str(account.get("email") or "") for account in accounts if isinstance(account, dict)]
    if not emails or not all(emails):
        yield f"{where}.serviceAccounts: must name an account, or it can't reach the bucket. Received: {accounts}"
    for email in filter(None, emails):
        if email == "default" or _BROAD_ACCOUNT.fullmatch(email):
            yield (
                f"{where}.serviceAccounts: must be an account of its own, with the least rights. Received: {email}, "
                "which may do much in the whole project"
            )
    machine_type = str(machine.get("machineType", "")).rpartition("/")[2]
    if not machine_type:
        yield f"{where}.machineType: must be there. Received: nothing"
    has_gpu = bool(machine.get("guestAccelerators")) or _WITH_GPU.match(machine_type)
    scheduling = machine.get("scheduling") or {}
    rules = [rule for rule in ([scheduling] if isinstance(scheduling, dict) else scheduling) if isinstance(rule, dict)]
    if has_gpu and not any(str(rule.get("onHostMaintenance", "")).upper() == "TERMINATE" for rule in rules):
        yield (
            f"{where}.scheduling.onHostMaintenance: must be TERMINATE, since a machine with GPUs can't be moved. "
            f"Received: {scheduling}"
        )
    tags = (machine.get("tags") or {}).get("items")
    if not tags or not isinstance(tags, list):
        yield (
            f"{where}.tags.items: must hold the tag that the firewall goes by; TensorFlow's ports ask for no token. "
            f"Received: {machine.get('tags')}"
        )


def _of_places(config: dict[str, Any]) -> Iterator[str]:
    """All in the region and zone of the provider: Google refuses a machine whose parts are elsewhere."""
    for where, text in _texts(config["available_node_types"]):
        for key, kind in (("region", "regions"), ("availability_zone", "zones")):
            for found in re.findall(rf"\b{kind}/([^/]+)/", text):
                if found != config["provider"].get(key):
                    wanted = config["provider"].get(key)
                    yield f"available_node_types.{where}: must be in {wanted}, as provider.{key}. Received: {text}"


def _of_versions(config: dict[str, Any]) -> Iterator[str]:
    """Of each version of a pinned package that is named: `ray==2.60.0`, `ray='2.60.0'`, `rayproject/ray:2.60.0`."""
    seen = set()
    for where, text in _texts(config):
        for package, found in re.findall(
            r"\b(ray|tensorflow|keras)(?:\[[^\]]*\])?(?:==?['\"]?|:)(\d+(?:\.\d+)+)", text
        ):
            seen.add(package)
            if found != version(package):
                yield f"{where}: {package} must be {version(package)}, as here. Received: {found}"
    for package in sorted(set(PINNED) - seen):
        yield f"setup_commands: one must check that {package} is {version(package)}. Received: none that names it"


def _of_ray(config: dict[str, Any]) -> Iterator[str]:
    defaults = [command for command in config.get("head_setup_commands") or [] if _RAYS_OWN_SETUP in command]
    if defaults:
        yield (
            "head_setup_commands: must be there, [] if there is nothing to do, or Ray puts an old client over the "
            f"image's. Received: {defaults[0]}"
        )
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in map(str, config.get(key) or []) if "ray start" in command]
        if not starts:
            yield f"{key}: one must run `ray start`. Received: {config.get(key)}"
        for command in starts:
            if not _WITH_TOKEN.search(command):
                yield f"{key}: must set RAY_AUTH_MODE=token, or whoever reaches a port runs code. Received: {command}"
            host = re.search(r"--dashboard-host[= ](\S+)", command)
            if host and host[1] not in ("127.0.0.1", "localhost"):
                yield f"{key}: --dashboard-host must be 127.0.0.1; jobs are handed in through ssh. Received: {host[1]}"


def _of_token(config: dict[str, Any], folder: Path) -> Iterator[str]:
    source = (config.get("file_mounts") or {}).get(TOKEN_FILE)
    if source is None:
        yield f'file_mounts: must bring the token to every machine, "{TOKEN_FILE}": "{TOKEN_FILE}". Received: none'
        return
    token = folder / os.path.expanduser(source)
    if not token.is_file():
        yield f"file_mounts: {token} must be there: `ray get-auth-token --generate; chmod 600 {source}`. Received: none"
    elif (mode := stat.S_IMODE(token.stat().st_mode)) & 0o077:
        yield f"file_mounts: {token} must be readable by you alone: `chmod 600 {source}`. Received: mode {mode:04o}"

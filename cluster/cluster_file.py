"""Check a cluster file (`ray_cluster.yaml`) before `ray up`.

Ray's own validation runs first, and finds unknown keys and wrong types. The rules here are for faults that Ray accepts,
but that cause a failure after machines were started, cost money, or are a security risk. Each rule states its reason.
"""

import logging
import re
import stat
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import InputError, squeezed

SUFFIXES = (".yaml", ".yml")
PINNED = ("ray", "tensorflow", "keras")
TOKEN_FILE = "~/.ray/auth_token"  # noqa: S105 - the path of the token, not the token
_PLACEHOLDER = re.compile(r"<[A-Z][A-Z_-]*>")
_PROJECT = re.compile(r"[a-z][a-z0-9-]{4,28}[a-z0-9]")
# The project of a service account or a resource.
_PROJECT_OF = re.compile(r"(?:@|\bprojects/)([a-z][a-z0-9-]{4,28}[a-z0-9])(?=\.iam\.gserviceaccount\.com|/)")
# Families of machine types with built-in GPUs; other types need `guestAccelerators`.
_WITH_GPU = re.compile(r"(a[234]x?|g[24])-")
# Types of the fields of `node_config`, which Ray does not validate.
_TYPES: dict[str, tuple[type, ...]] = {
    "serviceAccounts": (list,), "guestAccelerators": (list,), "scheduling": (dict, list), "tags": (dict,),
}  # fmt: skip
# Ray's default for `head_setup_commands`.
_RAYS_OWN_SETUP = "pip install google-api-python-client"
# `ray start` under RAY_AUTH_MODE=token, exported before or set for the command.
_WITH_TOKEN = re.compile(
    r"(?:^|;|&&|\{)\s*export RAY_AUTH_MODE=(['\"]?)token\1\s*(?:;|&&)"
    r"|\bRAY_AUTH_MODE=(['\"]?)token\2(?:\s+\w+=\S+)*\s+ray start\b"
)
# Service accounts with rights over a whole project: Compute Engine's default, and the one that Ray creates.
_BROAD_ACCOUNT = re.compile(r"\d+-compute@developer\.gserviceaccount\.com|ray-autoscaler-sa-v1@.*")


def faults_of_cluster_file(path: Path) -> list[str]:
    """Return the faults of a cluster file, one line each; empty if there are none.

    While placeholders such as `<PROJECT>` are left, only these and the token are checked.

    Raises:
        InputError: the file does not exist, or Ray would reject it.
    """
    config = _read(path)
    placeholders = [
        f"{where}: replace {found[0]}. Received: {text}"
        for where, text in _texts(config)
        if (found := _PLACEHOLDER.search(text))
    ]
    faults = placeholders or [
        *_project_faults(config),
        *_cost_faults(config),
        *(fault for name, node in config["available_node_types"].items() for fault in _node_faults(name, node)),
        *_location_faults(config),
        *_version_faults(config),
        *_ray_faults(config),
    ]
    faults += _token_faults(config)
    return [" ".join(fault.split()) for fault in faults]  # names and commands may contain line breaks


def _read(path: Path) -> dict[str, Any]:
    from ray.autoscaler._private.cli_logger import cli_logger
    from ray.autoscaler._private.util import prepare_config, validate_config

    cli_logger.configure(log_style="record", verbosity=-999)  # it would print the text of the error too
    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"the cluster file must exist. Received: {path}. See docs/google-cloud.md") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} must be YAML. Received: {squeezed(error, 200)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("provider"), dict):
        raise InputError(f"{path} must be a cluster file of Ray. Received: a file without `provider`")
    if config["provider"].get("type") != "gcp":
        raise InputError(
            f"provider.type must be gcp. Received: {config['provider'].get('type')!r} in {path}. "
            "See docs/google-cloud.md"
        )
    try:
        list(_texts(config))  # raises RecursionError if an alias contains itself
        prepared: dict[str, Any] = prepare_config(config)
        validate_config(prepared)
    except Exception as error:  # jsonschema's exceptions, and plain ones of Ray
        text = getattr(error, "message", None) or str(error)
        raise InputError(f"{path} must be a cluster file of Ray. Received: {squeezed(text, 300)}") from error
    return prepared


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path (keys joined by dots) and value of each string in the file."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{where}.{index}")
    elif isinstance(value, str):
        yield where, value


def _project_faults(config: dict[str, Any]) -> Iterator[str]:
    project = config["provider"].get("project_id")
    if not isinstance(project, str) or not _PROJECT.fullmatch(project):
        yield (
            "provider.project_id: must be the id of an existing project, 6 to 30 letters, digits and '-'; Ray tries "
            f"to create a project that does not exist. Received: {project!r}"
        )
        return
    own = [text for where, text in _texts(config["available_node_types"]) if not where.endswith(".sourceImage")]
    named = {name for text in own for name in _PROJECT_OF.findall(text)}
    if named and project not in named:
        yield (
            "provider.project_id: must be the project of an account or a resource of the machines, "
            f"{' or '.join(sorted(named))}. Received: {project}"
        )


def _cost_faults(config: dict[str, Any]) -> Iterator[str]:
    cached = config["provider"].get("cache_stopped_nodes", True)
    if cached is not False:
        yield f"provider.cache_stopped_nodes: must be false: disks of stopped machines cost money. Received: {cached}"


def _node_faults(name: str, node: dict[str, Any]) -> Iterator[str]:
    where, machine = f"available_node_types.{name}.node_config", node["node_config"]
    for key, types in _TYPES.items():
        if machine.get(key) and not isinstance(machine[key], types):
            kinds = " or ".join("a mapping" if kind is dict else "a list" for kind in types)
            yield f"{where}.{key}: must be {kinds}. Received: {machine[key]!r}"
            return
    accounts = machine.get("serviceAccounts") or []
    emails = [str(account.get("email") or "") for account in accounts if isinstance(account, dict)]
    if not emails or not all(emails):
        yield f"{where}.serviceAccounts: must name an account, for access to the bucket. Received: {accounts}"
    for email in filter(None, emails):
        if email == "default" or _BROAD_ACCOUNT.fullmatch(email):
            yield (
                f"{where}.serviceAccounts: must be a separate account with the least rights. Received: {email}, "
                "which has rights over the whole project"
            )
    machine_type = str(machine.get("machineType", "")).rpartition("/")[2]
    if not machine_type:
        yield f"{where}.machineType: must be set. Received: nothing"
    has_gpu = bool(machine.get("guestAccelerators")) or _WITH_GPU.match(machine_type)
    scheduling = machine.get("scheduling") or {}
    rules = [rule for rule in ([scheduling] if isinstance(scheduling, dict) else scheduling) if isinstance(rule, dict)]
    if has_gpu and not any(str(rule.get("onHostMaintenance", "")).upper() == "TERMINATE" for rule in rules):
        yield (
            f"{where}.scheduling.onHostMaintenance: must be TERMINATE, since a machine with GPUs can't be migrated. "
            f"Received: {scheduling}"
        )
    tags = (machine.get("tags") or {}).get("items")
    if not tags or not isinstance(tags, list):
        yield (
            f"{where}.tags.items: must hold the tag that the firewall rules use; TensorFlow's ports require no token. "
            f"Received: {machine.get('tags')}"
        )


def _location_faults(config: dict[str, Any]) -> Iterator[str]:
    """Check that all resources are in the provider's region and zone. Google rejects machines with parts elsewhere."""
    region, zone = config["provider"].get("region"), str(config["provider"].get("availability_zone"))
    kinds = {"region": "regions", "availability_zone": "zones"}
    if zone.rpartition("-")[0] != region:
        yield f"provider.availability_zone: must be a zone of provider.region, {region}. Received: {zone}"
        del kinds["availability_zone"]  # the zone itself is wrong
    for where, text in _texts(config["available_node_types"]):
        for key, kind in kinds.items():
            for found in re.findall(rf"\b{kind}/([^/]+)/", text):
                if found != config["provider"].get(key):
                    wanted = config["provider"].get(key)
                    yield f"available_node_types.{where}: must be in {wanted}, as provider.{key}. Received: {text}"


def _version_faults(config: dict[str, Any]) -> Iterator[str]:
    """Check that each pinned package is named, and only with the version that is installed here.

    Versions are found in these forms: `ray==2.60.0`, `ray='2.60.0'`, `rayproject/ray:2.60.0`.
    """
    named = set()
    places: dict[str, str] = {}  # the first place of each text: Ray copies setup_commands to those of head and workers
    for where, text in _texts(config):
        places.setdefault(text, where)
    for text, where in places.items():
        for package, found in re.findall(
            r"\b(ray|tensorflow|keras)(?:\[[^\]]*\])?(?:==?['\"]?|:)(\d+(?:\.\d+)+)", text
        ):
            named.add(package)
            if found != version(package):
                yield f"{where}: {package} must be {version(package)}, as on this machine. Received: {found}"
    for package in sorted(set(PINNED) - named):
        yield f"setup_commands: one must check that {package} is {version(package)}. Received: none that names it"


def _ray_faults(config: dict[str, Any]) -> Iterator[str]:
    defaults = [command for command in config.get("head_setup_commands") or [] if _RAYS_OWN_SETUP in command]
    if defaults:
        yield (
            "head_setup_commands: must be set, [] if there are none: by default Ray replaces the image's Google client "
            f"with an old one. Received: {defaults[0]}"
        )
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in map(str, config.get(key) or []) if "ray start" in command]
        if not starts:
            yield f"{key}: one must run `ray start`. Received: {config.get(key)}"
        for command in starts:
            if not _WITH_TOKEN.search(command):
                yield (
                    f"{key}: must set RAY_AUTH_MODE=token, or anyone who reaches a port can run code. "
                    f"Received: {command}"
                )
            host = re.search(r"--dashboard-host[= ](['\"]?)(\S+)\1", command)
            if host and host[2] not in ("127.0.0.1", "localhost"):
                yield f"{key}: --dashboard-host must be 127.0.0.1; jobs are submitted through ssh. Received: {host[2]}"


def _token_faults(config: dict[str, Any]) -> Iterator[str]:
    source = (config.get("file_mounts") or {}).get(TOKEN_FILE)
    if source is None:
        yield f'file_mounts: must copy the token to all machines, "{TOKEN_FILE}": "{TOKEN_FILE}". Received: none'
        return
    token = Path(source).expanduser()  # of a relative path, Ray too looks in the current folder
    if not token.is_file():
        yield (
            f"file_mounts: {token} must exist. Received: no such file. "
            f"Run `ray get-auth-token --generate; chmod 600 {source}`"
        )
    elif (mode := stat.S_IMODE(token.stat().st_mode)) & 0o077:
        yield (
            f"file_mounts: {token} must be readable by its owner only. Received: mode {mode:04o}. "
            f"Run `chmod 600 {source}`"
        )

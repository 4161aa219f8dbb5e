"""What earlier attempts of `prepare` left in a dataset folder: taken over, made again, or refused."""

import json
import logging
from typing import Any

from upath import UPath

from cluster.errors import DamageError, OptionError
from cluster.manifest import MANIFEST_FILE, fault_of, is_sealed, read_manifest
from cluster.storage import (
    change_bytes,
    is_file,
    list_files,
    list_folders,
    remove_file,
    remove_folder,
    remove_temporaries,
    write_bytes,
)
from preprocessing.dataset import DatasetManifest
from preprocessing.plan import Plan
from preprocessing.shards import PLAN_FILE, PROGRESS_FOLDER, write_reports

log = logging.getLogger("kuzushiji")


def earlier_attempt(dataset: UPath, plan: Plan) -> DatasetManifest | None:
    """Return the manifest if the folder is complete and valid. Otherwise prepare the folder for (more) work.

    Raises:
        OptionError: the folder is neither empty nor of the same job.
    """
    plan_path = dataset / PROGRESS_FOLDER / PLAN_FILE
    # In this order: a concurrent attempt writes its plan first and removes it after it has written the manifest.
    # Folders of the file system itself, such as `lost+found` and `.snapshot`, are no other files.
    folders = [name for name in list_folders(dataset) if not name.startswith(".") and name != "lost+found"]
    others = [*list_files(dataset), *folders]
    has_plan = is_file(plan_path)
    if is_sealed(dataset):
        manifest, faults = sealed_manifest(dataset, plan)
        if not faults:
            return manifest
        # Other versions of the libraries may cut different crops.
        _refuse_other(dataset, plan, _identity_of(manifest, plan))
        log.warning("%s: %s; damaged files are made again", dataset, "; ".join(faults))
        write_reports(dataset, plan.groups, manifest)
        write_bytes(plan_path, json.dumps(plan.identity).encode())
        remove_file(dataset / MANIFEST_FILE)
    elif others and not has_plan:
        raise OptionError(
            f"--dataset must be a new or empty folder, or one of the same job. Received: {dataset}, with "
            f"{sorted(others)[0]}. Name another folder or empty it"
        )
    else:

        def write_plan_once(old: bytes | None) -> bytes | None:
            if old is None:
                return json.dumps(plan.identity).encode()
            _refuse_other(dataset, plan, _parse_plan(plan_path, old))
            return None

        change_bytes(plan_path, write_plan_once)
        if is_sealed(dataset):  # by a concurrent attempt, after the check above
            return earlier_attempt(dataset, plan)
    return None


def sealed_manifest(dataset: UPath, plan: Plan) -> tuple[DatasetManifest, list[str]]:
    """Return the manifest of a sealed folder of this job, and the faults of its files, one line each.

    Raises:
        OptionError: the folder belongs to another job.
        DamageError: the manifest is damaged, or lists other shards than planned.
    """
    manifest = read_manifest(dataset, DatasetManifest)
    _refuse_other(dataset, plan, _identity_of(manifest, plan) | {"versions": plan.identity["versions"]})
    if {shard.name for shard in manifest.shards} != {
        name for names in plan.groups.shard_names for name in names if name
    }:
        raise DamageError(
            f"{dataset / MANIFEST_FILE} must list the planned shards. Remove the folder and prepare again"
        )
    sizes = list_files(dataset)
    return manifest, [fault for entry in manifest.entries if (fault := fault_of(dataset, entry, sizes))]


def _identity_of(manifest: DatasetManifest, plan: Plan) -> dict[str, Any]:
    """Return options, input and versions that the dataset was made with, under the keys of `Plan.identity`.

    A package that an earlier release did not record had no part in its shards: its version counts as equal.
    """
    versions = plan.identity["versions"] | manifest.versions
    return manifest.config | {"input": manifest.fingerprint, "versions": versions, "book_rule": manifest.book_rule}


def remove_traces(dataset: UPath) -> None:
    """Remove what attempts leave in a sealed dataset: the progress of the last one, temporary files of killed ones."""
    for _ in range(2):  # a task of a killed attempt may still add a file during the removal
        remove_folder(dataset / PROGRESS_FOLDER)
    remove_temporaries(dataset)


def _parse_plan(path: UPath, content: bytes) -> dict[str, Any]:
    try:
        plan = json.loads(content)
        if not isinstance(plan, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise DamageError(
            f"{path} must be a JSON object. Received: {error}. Remove the folder and prepare again"
        ) from error
    return plan


def _refuse_other(dataset: UPath, plan: Plan, earlier: dict[str, Any]) -> None:
    """Raise OptionError if `earlier`, the identity of an earlier attempt, differs from the plan's."""
    new_options = {"margin": 0.0, "license": None}  # which earlier releases did not record
    there, now = new_options | _flat(earlier), _flat(plan.identity)
    differing = [key for key, value in now.items() if there.get(key) != value]
    if differing:
        differences = ", ".join(f"{k} (there {str(there.get(k))[:40]}, now {str(now[k])[:40]})" for k in differing)
        raise OptionError(
            f"--dataset must be a new folder, or one made with the same options and input. Received: {dataset}, where "
            f"these differ: {differences}. Name another folder or remove it"
        )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with a key for each package, instead of `versions`."""
    versions = identity.get("versions")
    return {key: value for key, value in identity.items() if key != "versions"} | {
        f"version of {package}": version
        for package, version in (versions if isinstance(versions, dict) else {}).items()
    }

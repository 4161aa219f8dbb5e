"""Check what earlier attempts of `prepare` left in a dataset folder: keep it, repair it, or refuse the folder."""

from typing import Any

from upath import UPath

from cluster.errors import DamageError
from cluster.manifest import MANIFEST_FILE, fault_of, read_manifest
from cluster.storage import list_files
from preprocessing.dataset import DatasetManifest
from preprocessing.plan import Plan
from preprocessing.shards import resumable, write_reports


def accept_or_begin(dataset: UPath, plan: Plan) -> DatasetManifest | None:
    """Return the manifest if the folder is complete and valid. Otherwise prepare the folder for (more) work.

    Raises:
        OptionError: the folder is neither empty nor of the same job.
    """

    def repair(manifest: DatasetManifest) -> None:
        # Other versions of the libraries may cut different crops.
        resumable(dataset).refuse_other(_identity_of(manifest, plan), plan.identity)
        write_reports(dataset, plan.groups, manifest)

    return resumable(dataset).accept_or_begin(plan.identity, lambda: sealed_manifest(dataset, plan), repair)


def sealed_manifest(dataset: UPath, plan: Plan) -> tuple[DatasetManifest, list[str]]:
    """Return the manifest of a sealed folder of this job, and the faults of its files, one line each.

    Raises:
        OptionError: the folder belongs to another job.
        DamageError: the manifest is damaged, or lists other shards than planned.
    """
    manifest = read_manifest(dataset, DatasetManifest)
    there = _identity_of(manifest, plan) | {"versions": plan.identity["versions"]}
    resumable(dataset).refuse_other(there, plan.identity)
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

    A package that an earlier release did not record did not affect its shards, so its version counts as equal.
    """
    versions = plan.identity["versions"] | manifest.versions
    return manifest.config | {"input": manifest.fingerprint, "versions": versions, "book_rule": manifest.book_rule}

"""Results that earlier attempts of `predict` left in its folder: reuse them, make them again, or refuse the folder."""

from typing import Any

from upath import UPath

from cluster.manifest import fault_of, read_manifest
from cluster.storage import list_files
from job.predict.folder import PredictionsManifest
from job.predict.read_group import resumable


def accept_or_begin(out: UPath, identity: dict[str, Any]) -> PredictionsManifest | None:
    """Return the manifest if the folder is complete and valid. Otherwise prepare the folder for (more) work.

    Args:
        out: the folder.
        identity: all that the bytes of its files depend on, see `predict.identity_of`.

    Raises:
        OptionError: the folder is neither empty nor of the same job.
        DamageError: the manifest or plan is damaged.
    """

    def repair(manifest: PredictionsManifest) -> None:
        # Other library versions may predict other characters. Reports of groups can't be restored from the manifest,
        # which has only the sums over all groups, so the groups are read again.
        resumable(out).refuse_other(_identity_of(manifest), identity)

    return resumable(out).accept_or_begin(identity, lambda: sealed_manifest(out, identity), repair)


def sealed_manifest(out: UPath, identity: dict[str, Any]) -> tuple[PredictionsManifest, list[str]]:
    """Return the manifest of a sealed folder of this job, and the faults of its tables, one line each.

    Pictures are not checked: users may remove them. Args, Raises: as `accept_or_begin`.
    """
    manifest = read_manifest(out, PredictionsManifest)
    resumable(out).refuse_other(_identity_of(manifest) | {"versions": identity["versions"]}, identity)
    sizes = list_files(out)
    return manifest, [fault for entry in manifest.entries if (fault := fault_of(out, entry, sizes))]


def _identity_of(manifest: PredictionsManifest) -> dict[str, Any]:
    """Return the identity of the job that made the folder, with the keys of `predict.identity_of`."""
    return manifest.config | {
        "model": manifest.model_manifest_sha256,
        "input": manifest.fingerprint,
        "versions": manifest.versions,
    }

"""What earlier attempts of `predict` left in its folder: taken over, made again, or refused."""

from collections import Counter
from typing import Any

from upath import UPath

from cluster.manifest import fault_of, read_manifest
from cluster.storage import list_files, list_tree
from job.predict.folder import PredictionsManifest
from job.predict.read_group import PICTURE_SUFFIX, resumable
from preprocessing.labels.table import Labels


def earlier_attempt(
    out: UPath, identity: dict[str, Any], labels: Labels, annotate: UPath | None
) -> PredictionsManifest | None:
    """Return the manifest if the folder is complete and valid. Otherwise prepare the folder for (more) work.

    Args:
        out: the folder.
        identity: all that the bytes of its files depend on, see `predict.identity_of`.
        labels: the boxes.
        annotate: the folder for pictures, if there is one.

    Raises:
        OptionError: the folder is neither empty nor of the same job.
        DamageError: the manifest or plan is damaged.
    """

    def repair(manifest: PredictionsManifest) -> None:
        # Other versions of the libraries may read other characters. No report can be made of a manifest, which has the
        # counts of all groups together: the groups are read again.
        resumable(out).refuse_other(_identity_of(manifest), identity)

    return resumable(out).earlier_attempt(identity, lambda: sealed_manifest(out, identity, labels, annotate), repair)


def sealed_manifest(
    out: UPath, identity: dict[str, Any], labels: Labels, annotate: UPath | None
) -> tuple[PredictionsManifest, list[str]]:
    """Return the manifest of a sealed folder of this job, and the faults of tables and pictures, one line each.

    Args, Raises: as `earlier_attempt`.
    """
    manifest = read_manifest(out, PredictionsManifest)
    resumable(out).refuse_other(_identity_of(manifest) | {"versions": identity["versions"]}, identity)
    sizes = list_files(out)
    faults = [fault for entry in manifest.entries if (fault := fault_of(out, entry, sizes))]
    if annotate and (missing := _missing_pictures(manifest, labels, annotate)):
        faults.append(f"{len(missing)} pictures are missing in {annotate}, first: {missing[0]}")
    return manifest, faults


def _missing_pictures(manifest: PredictionsManifest, labels: Labels, annotate: UPath) -> list[str]:
    """Return the names of pictures that are not there: each page of which a box was read has one."""
    lost = Counter(loss["page"] for loss in manifest.losses)
    boxes = zip(labels.page_ids, labels.boxes_per_page.tolist(), strict=True)
    there = {name for name, _ in list_tree(annotate)}
    names = (f"{page_id}{PICTURE_SUFFIX}" for page_id, count in boxes if count > lost[page_id])
    return [name for name in names if name not in there]


def _identity_of(manifest: PredictionsManifest) -> dict[str, Any]:
    """Return what the folder was made with, under the keys of `predict.identity_of`."""
    return manifest.config | {
        "model": manifest.model_manifest_sha256,
        "input": manifest.fingerprint,
        "versions": manifest.versions,
    }

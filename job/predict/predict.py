"""`predict`: read the characters in the boxes of page scans, and write tables and text to a sealed folder.

If an earlier attempt was interrupted, the same command finishes its folder (`attempts.py`).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from upath import UPath

from cluster.capacity import START_LIMIT
from cluster.errors import DamageError, InputError, OptionError, counted
from cluster.manifest import encoded, read_manifest, seal, size_fault_of
from cluster.models import ModelManifest, resolve_model
from cluster.storage import check_writable, list_files, remove_folder
from cluster.tasks import map_tasks
from job.model.folder import read_trained_on
from job.predict.folder import PredictionsManifest
from job.predict.read_group import PICTURE_SUFFIX, GroupReport, ReadGroup, resumable, unfinished_pictures
from job.predict.readings import accuracy
from preprocessing.attempts import Attempts
from preprocessing.box_checks import clipped_line, count_ink, ink_lines
from preprocessing.group_files import written_groups
from preprocessing.groups import Groups, group_pages
from preprocessing.input import Input, check_outside, read_input
from preprocessing.labels.page_ids import MAX_NAME_CHARS
from preprocessing.page_results import listed_warnings
from preprocessing.pages import fingerprint
from preprocessing.plan import known_losses, number_of_groups

log = logging.getLogger("kuzushiji")

BOXES_PER_GROUP = 2_000  # some seconds of work; with `fcn` on a CPU, an hour
VERSIONED = ("kuzushiji", "keras", "opencv-python-headless", "pandas", "pillow", "pyarrow", "simplejpeg", "tensorflow")


def predict(
    model: UPath,
    pages: UPath,
    boxes: UPath | Sequence[UPath],
    out: UPath,
    *,
    form: str = "parquet",
    annotate: UPath | None = None,
    gpus: int = 0,
    start_limit: float = START_LIMIT,
    rescale: bool = False,
    canvases: UPath | None = None,
    min_confidence: float = 0.0,
) -> tuple[PredictionsManifest, bool]:
    """Predict the characters of boxes on page scans with Ray Data, or finish an earlier attempt that was interrupted.

    Args:
        model: a model folder, or an architecture's folder for its latest run.
        pages: folder or archive of page scans.
        boxes: label files, whose boxes may be without characters, see `read_labels`.
        out: folder for the tables.
        form: `parquet` or `csv`.
        annotate: folder for pictures of the pages with the predictions; None: no pictures.
        gpus: number of processes with one GPU each; 0: one process on each CPU.
        start_limit: seconds to wait for room on a cluster.
        rescale: whether to scale boxes that were made for another size of their page.
        canvases: see `read_labels`.
        min_confidence: texts and pictures show 〓 for a character whose probability is lower.

    Returns:
        The manifest of `out`, and whether anything was written (False: it was already complete and valid).

    Raises:
        OptionError: `out` holds other files or belongs to another job; `out` is inside of `pages` or `boxes`; the
            folder for pictures is inside of one of the three; this machine has fewer GPUs; or `min_confidence` is not
            from 0 to 1.
        InputError: boxes or pages can't be used, no box is readable, or the manifest would be too large. If boxes and
            page names already show this, nothing is written.
        DamageError: the model does not match its manifest, the manifest or plan in `out` is damaged, or the workers do
            not share the folder `out`.
        KuzushijiError: TensorFlow can't use the GPUs, the model gives probabilities that are not finite, or `out` is
            full, read-only or gone.
    """
    if not 0 <= min_confidence <= 1:
        raise OptionError(f"--min-confidence must be a number from 0 to 1. Received: {min_confidence}")
    _check_places(pages, [boxes] if isinstance(boxes, UPath) else boxes, out, annotate)
    folder = resolve_model(model)
    source = read_input(pages, boxes, "--boxes", bare=True, rescale=rescale, canvases=canvases)
    config = {"format": form, "min_confidence": min_confidence, "rescale": rescale, "annotate": annotate is not None}
    identity = identity_of(config, source, read_manifest(folder, ModelManifest).sha256)
    _check_before_reading(source, identity, annotate is not None)
    if annotate:  # before a damaged folder is unsealed
        check_writable(annotate)
    _log_unmatched(source)

    def make() -> PredictionsManifest:
        number = number_of_groups(len(source.labels.boxes), BOXES_PER_GROUP)
        groups = group_pages(source.labels, source.files, number, rescale, read_trained_on(folder).margin)
        work = ReadGroup(
            model=str(folder),
            model_sha256=identity["model"],
            pages=str(pages),
            out=str(out),
            annotate=str(annotate) if annotate else None,
            form=form,
            min_confidence=min_confidence,
            groups=len(groups),
            on_gpu=gpus > 0,
        )
        if annotate:
            check_writable(unfinished_pictures(annotate, out))  # creates it
        return _make(work, groups, source, identity, out, gpus, start_limit)

    # The reports of groups can't be restored from a manifest, which has only the sums over all groups: if a table is
    # damaged, all groups are read again. Pictures are not checked: users may remove them.
    attempts = Attempts(resumable(out), PredictionsManifest, identity, _identity_of_folder)
    manifest, new = attempts.accept_or_make(make)
    if resumable(out).remove_traces() and annotate:
        remove_folder(unfinished_pictures(annotate, out))
    return manifest, new


def _check_places(pages: UPath, boxes: Sequence[UPath], out: UPath, annotate: UPath | None) -> None:
    inputs = [("--pages", pages), *(("--boxes", place) for place in boxes)]
    check_outside("--out", out, inputs)
    if annotate:
        check_outside("--annotate", annotate, [*inputs, ("--out", out)])


def identity_of(config: Mapping[str, Any], source: Input, model_sha256: str) -> dict[str, Any]:
    """Return all that the bytes of the files depend on, as JSON, except the kind of device.

    The device is checked for each group, see `ReadGroup`.

    Args:
        config: see `PredictionsManifest`.
        source: the input. Only ids and sizes of its pages are used, see `fingerprint`.
        model_sha256: of the model's manifest.
    """
    versions = {package: version(package) for package in VERSIONED}
    return {**config, "model": model_sha256, "input": fingerprint(source.labels.sha256, source.files)} | {
        "versions": versions
    }


def _identity_of_folder(manifest: PredictionsManifest) -> dict[str, Any]:
    """Return the identity of the job that made a folder, as `identity_of`."""
    return manifest.config | {
        "model": manifest.model_manifest_sha256,
        "input": manifest.fingerprint,
        "versions": manifest.versions,
    }


def _make(
    work: ReadGroup,
    groups: Groups,
    source: Input,
    identity: Mapping[str, Any],
    out: UPath,
    gpus: int,
    start_limit: float,
) -> PredictionsManifest:
    with written_groups(groups, resumable(out).progress_folder, work.attempt) as write:
        reports = map_tasks(
            len(groups),
            work,
            GroupReport,
            what="pages read",
            unit="pages",
            sizes=groups.sizes,
            begin=write,
            gpus=gpus,
            start_limit=start_limit,
        )
    try:
        manifest = _manifest(source, identity, reports)
    except InputError:
        resumable(out).forget_losses(reports)
        raise
    for line in ink_lines(manifest.ink) + clipped_line(len(manifest.clipped), manifest.counts["boxes"]):
        log.warning("%s", line)
    _check_tables(out, manifest)
    seal(out, manifest)
    return manifest


def _check_before_reading(source: Input, identity: Mapping[str, Any], annotate: bool) -> None:
    """Check what boxes and page names show before a page is read.

    Raises:
        InputError: all boxes are lost, the manifest would be too large, or the name of a picture would be too long.
    """
    most = MAX_NAME_CHARS - len(PICTURE_SUFFIX)
    for page_id in source.labels.page_ids if annotate else []:
        if page_id in source.files and max(len(part.encode()) for part in page_id.split("/")) > most:
            raise InputError(
                f"with --annotate a name in an image_id must have at most {most} bytes, since the picture of a page is "
                f"named <image_id>{PICTURE_SUFFIX}. Received: {page_id[:40]!r}... Shorten it, or leave out --annotate"
            )
    nothing_read = {"examples": 0, "not_rare": 0}
    lost = known_losses(source.labels, source.files)
    known = GroupReport(
        on_gpu=False, files=[], pictures={}, losses=lost, clipped=[], read=0, rare=0, correct=nothing_read, pages=[]
    )
    encoded(_manifest(source, identity, [known]))


def _log_unmatched(source: Input) -> None:
    """Log how many pages of the boxes have no scan, and how many scans have no boxes."""
    page_ids, boxes = source.labels.page_ids, source.labels.boxes_per_page.tolist()
    with_boxes = [page_id for page_id, number in zip(page_ids, boxes, strict=True) if number]
    if without_scan := [page_id for page_id in with_boxes if page_id not in source.files]:
        pages = counted(len(without_scan), "page")
        log.warning("%s of --boxes without a scan, whose boxes are lost: first %s", pages, without_scan[0])
    if without_boxes := sorted(set(source.files) - set(page_ids)):
        first = os.fsencode(without_boxes[0]).decode(errors="replace")
        log.info("%s without boxes, not read: first %s", counted(len(without_boxes), "scan"), first)


def _check_tables(out: UPath, manifest: PredictionsManifest) -> None:
    """Check that all tables are in `out`, and that each box was read or is a listed loss."""
    sizes = list_files(out)
    if faults := [fault for entry in manifest.files if (fault := size_fault_of(entry, sizes))]:
        raise DamageError(f"--out must be a folder that all workers share. Received: {out}, where {faults[0]}")
    counts = manifest.counts
    assert counts["read"] + len(manifest.losses) == counts["boxes"], "boxes in the file = boxes read + losses"


def _manifest(source: Input, identity: Mapping[str, Any], reports: Sequence[GroupReport]) -> PredictionsManifest:
    """Return the manifest.

    Raises:
        InputError: all boxes are lost.
    """
    labels, losses = source.labels, [loss for report in reports for loss in report.losses]
    if len(losses) == len(labels.boxes):
        raise InputError(f"at least one box must be readable. Received: {len(losses)} lost, first: {losses[0]['what']}")
    of_boxes = {name: sum(getattr(report, name) for report in reports) for name in ("read", "uncertain", "rare")}
    results = [result for report in reports for result in report.pages]
    warnings, more_warnings = listed_warnings(results, labels.warnings)
    return PredictionsManifest(
        files=[entry for report in reports for entry in report.files],
        counts={"boxes": len(labels.boxes), "pages": len(labels.page_ids)} | of_boxes,
        min_confidence=identity["min_confidence"],
        accuracy=accuracy([report.correct for report in reports]),
        losses=losses,
        clipped=[box for report in reports for box in report.clipped],
        ignored=source.ignored,
        warnings=warnings,
        more_warnings=more_warnings,
        ink=count_ink(results),
        config={key: value for key, value in identity.items() if key not in ("model", "input", "versions")},
        model_manifest_sha256=identity["model"],
        fingerprint=identity["input"],
        versions=identity["versions"],
    )

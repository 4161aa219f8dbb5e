"""`predict`: read the characters in the boxes of page scans, and write tables and text to a sealed folder."""

import logging
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel
from upath import UPath

from cluster.capacity import START_LIMIT
from cluster.errors import DamageError, InputError, KuzushijiError, OptionError
from cluster.manifest import FileEntry, encoded, read_manifest, seal, size_fault_of, write_listed
from cluster.models import ModelManifest, resolve_model
from cluster.runtime import map_tasks
from cluster.storage import TEMPORARY_PREFIX, is_inside, list_files, place, remove_temporaries, write_bytes
from job.model.folder import load_model, read_trained_on
from job.model.load_tensorflow import configure_gpus, without_chatter
from job.predict.annotate import annotated
from job.predict.folder import PredictionsManifest, clear, table_name
from job.predict.readings import Readings, accuracy
from preprocessing.cutting import cut_boxes
from preprocessing.dataset import Clipped, Loss
from preprocessing.groups import Group, group_pages, read_group, written_groups
from preprocessing.ink import count_ink, ink_lines
from preprocessing.input import read_input
from preprocessing.labels.page_ids import MAX_NAME_CHARS
from preprocessing.labels.table import Labels
from preprocessing.page_results import LISTED_WARNINGS, PageResult, listed_warnings
from preprocessing.pages import fingerprint, page_reader
from preprocessing.plan import known_losses, number_of_groups
from preprocessing.tries import END, Tries

log = logging.getLogger("kuzushiji")

BOXES_PER_GROUP = 2_000  # some seconds of work
PICTURE_SUFFIX = ".jpeg"
VERSIONED = ("kuzushiji", "keras", "opencv-python-headless", "pandas", "pillow", "pyarrow", "simplejpeg", "tensorflow")


class GroupReport(BaseModel):
    """The result of a group."""

    files: list[FileEntry]
    losses: list[Loss]
    clipped: list[Clipped]
    read: int
    """Number of boxes read."""
    uncertain: int = 0
    """Number of them that texts and pictures show as 〓."""
    correct: dict[str, int]
    """Counts from which `readings.accuracy` is computed."""
    pages: list[PageResult]
    """What the pages that were decoded are like."""


def predict(
    model: UPath,
    pages: UPath,
    boxes: UPath | Sequence[UPath],
    out: UPath,
    form: str = "parquet",
    annotate: UPath | None = None,
    gpus: int = 0,
    start_limit: float = START_LIMIT,
    rescale: bool = False,
    canvases: UPath | None = None,
    min_confidence: float = 0.0,
) -> PredictionsManifest:
    """Predict the characters of boxes on page scans with Ray Data.

    Args:
        model: a model folder, or an architecture's folder for its latest run.
        pages: folder or archive of page scans.
        boxes: label files, whose boxes may have no characters, see `read_labels`.
        out: new or empty folder for the tables.
        form: `parquet` or `csv`.
        annotate: folder for pictures of the pages with the predictions; None: no pictures.
        gpus: number of processes with one GPU each; 0: one process on each CPU.
        start_limit: seconds to wait for a host of a cluster.
        rescale: whether to scale boxes that were made for another size of their page.
        canvases: see `read_labels`.
        min_confidence: texts and pictures show 〓 for a character whose probability is less.

    Returns:
        The manifest of `out`.

    Raises:
        OptionError: `out` holds other files; the folder for pictures is in it, or is that of the pages; this machine
            has fewer GPUs; or `min_confidence` is not from 0 to 1.
        InputError: boxes or pages can't be used, no box is readable, or the manifest would be too large. Where boxes
            and names of pages show it, nothing is written.
        DamageError: the model does not match its manifest, or the workers do not share the folder `out`.
        KuzushijiError: TensorFlow can't use the GPUs, the model gives probabilities that are not finite, or `out` is
            full or read-only.
    """
    if not 0 <= min_confidence <= 1:
        raise OptionError(f"--min-confidence must be a number from 0 to 1. Received: {min_confidence}")
    if annotate:
        _check_pictures(annotate, pages, out)
    folder = resolve_model(model)
    model_sha256 = read_manifest(folder, ModelManifest).sha256
    labels, files, ignored = read_input(pages, boxes, "--boxes", bare=True, rescale=rescale, canvases=canvases)
    _check_before_reading(labels, files, model_sha256, annotate is not None)
    clear(out)
    number = number_of_groups(len(labels.boxes), BOXES_PER_GROUP)
    groups = group_pages(labels, files, number, rescale, read_trained_on(folder).margin)
    work = ReadGroup(
        model=str(folder),
        model_sha256=model_sha256,
        pages=str(pages),
        out=str(out),
        annotate=str(annotate) if annotate else None,
        form=form,
        min_confidence=min_confidence,
        groups=len(groups),
        on_gpu=gpus > 0,
    )
    with written_groups(groups, out, work.prefix) as write:
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
    manifest = _manifest(labels, fingerprint(labels.sha256, files), model_sha256, reports, ignored, min_confidence)
    for line in ink_lines(manifest.ink):
        log.warning("%s", line)
    _check_tables(out, manifest)
    remove_temporaries(out)
    seal(out, manifest)
    return manifest


def _check_pictures(annotate: UPath, pages: UPath, out: UPath) -> None:
    if is_inside(annotate, pages):  # pictures would be read as pages, or overwrite them
        raise OptionError(f"--annotate must be a folder outside of --pages. Received: {annotate} and {pages}")
    if is_inside(annotate, out):  # the next attempt would find `out` with other files
        raise OptionError(f"--annotate must be a folder outside of --out. Received: {annotate} and {out}")


def _check_before_reading(
    labels: Labels, files: Mapping[str, tuple[str, int]], model_sha256: str, annotate: bool
) -> None:
    """Check what the boxes and the names of the pages show.

    Raises:
        InputError: all boxes are lost, the manifest would be too large, or a picture's name too long.
    """
    most = MAX_NAME_CHARS - len(PICTURE_SUFFIX)
    for page_id in labels.page_ids if annotate else []:
        if page_id in files and max(len(part.encode()) for part in page_id.split("/")) > most:
            raise InputError(
                f"with --annotate a name in an image_id must have at most {most} bytes, since the picture of a page is "
                f"named <image_id>{PICTURE_SUFFIX}. Received: {page_id[:40]!r}... Shorten it, or leave out --annotate"
            )
    nothing_read = {"examples": 0, "not_rare": 0}
    lost = known_losses(labels, files)
    known = GroupReport(files=[], losses=lost, clipped=[], read=0, correct=nothing_read, pages=[])
    encoded(_manifest(labels, "", model_sha256, [known]))


def _check_tables(out: UPath, manifest: PredictionsManifest) -> None:
    """Check that all tables are in `out`, and that each box was read or is a listed loss."""
    sizes = list_files(out)
    if faults := [fault for entry in manifest.files if (fault := size_fault_of(entry, sizes))]:
        raise DamageError(f"--out must be a folder that all workers share. Received: {out}, where {faults[0]}")
    counts = manifest.counts
    assert counts["read"] + len(manifest.losses) == counts["boxes"], "boxes in the file = boxes read + losses"


def _manifest(
    labels: Labels,
    input_fingerprint: str,
    model_sha256: str,
    reports: Sequence[GroupReport],
    ignored: Mapping[str, int] | None = None,
    min_confidence: float = 0.0,
) -> PredictionsManifest:
    """Return the manifest.

    Raises:
        InputError: all boxes are lost.
    """
    losses = [loss for report in reports for loss in report.losses]
    if len(losses) == len(labels.boxes):
        raise InputError(f"at least one box must be readable. Received: {len(losses)} lost, first: {losses[0]['what']}")
    read, uncertain = sum(report.read for report in reports), sum(report.uncertain for report in reports)
    results = [result for report in reports for result in report.pages]
    warnings = listed_warnings(results, labels.warnings)
    return PredictionsManifest(
        files=[entry for report in reports for entry in report.files],
        counts={"boxes": len(labels.boxes), "read": read, "pages": len(labels.page_ids), "uncertain": uncertain},
        min_confidence=min_confidence,
        accuracy=accuracy([report.correct for report in reports]),
        losses=losses,
        clipped=[box for report in reports for box in report.clipped],
        ignored=dict(ignored or {}),
        warnings=warnings[:LISTED_WARNINGS],
        more_warnings=max(0, len(warnings) - LISTED_WARNINGS),
        ink=count_ink(results),
        model_manifest_sha256=model_sha256,
        fingerprint=input_fingerprint,
        versions={package: version(package) for package in VERSIONED},
    )


@dataclass
class ReadGroup:
    """The work of `predict` on a group of pages.

    The model is loaded with the first group, not by the constructor: Ray Data loses what an actor's constructor raises.
    """

    model: str
    model_sha256: str
    """SHA-256 of the model's manifest."""
    pages: str
    out: str
    annotate: str | None
    form: str
    groups: int
    """Total number of groups, for the names of the tables."""
    on_gpu: bool
    min_confidence: float = 0.0
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identifies the attempt of the command, see `Tries`."""

    @property
    def prefix(self) -> str:
        """Of the names of the files of groups: temporary files, which are removed with those of a killed attempt."""
        return f"{TEMPORARY_PREFIX}{self.attempt}"

    def __call__(self, number: int) -> GroupReport:
        """Read a group and write its tables and pictures.

        Raises:
            KuzushijiError: TensorFlow can't use the GPU, or the model gives probabilities that are not finite.
            DamageError: the model does not match its manifest, or was replaced; or this worker sees another folder.
            InputError: the pages were changed, or a page ended too many processes.
            OSError: pages can't be read, or tables can't be written.
        """
        out = place(self.out)
        try:
            group = read_group(out, self.prefix, number)
        except FileNotFoundError as error:
            raise DamageError(
                f"--out must stay in place, and be a folder that all workers share. Received: {self.out}, without what "
                "the command has written there. Run the same command again"
            ) from error
        with Tries(group, out, self.attempt) as tries:
            return self._read(group, tries.begin)

    def _read(self, group: Group, begin: Callable[[str], None]) -> GroupReport:
        inference, class_names = _load(self.model, self.model_sha256, self.on_gpu)
        cuts = cut_boxes(group, place(self.pages), begin)
        readings = Readings.from_cuts(cuts, inference, class_names, group.code_points, self.min_confidence)
        tables = {"predictions": readings.predictions(), "pages": readings.texts(group.page_ids)}
        files = [self._write(kind, table, group) for kind, table in tables.items()]
        if self.annotate:
            _annotate(group, readings, place(self.pages), place(self.annotate), begin)
        return GroupReport(
            files=files,
            losses=readings.losses(),
            clipped=[{"box": cut.box, "page": cut.page_id} for cut in readings.cuts if cut.clipped],
            read=len(readings.read),
            uncertain=int(np.count_nonzero(readings.uncertain)),
            correct=readings.correct(),
            pages=list({cut.page_id: cut.page for cut in readings.cuts if cut.page}.values()),
        )

    def _write(self, kind: str, table: pd.DataFrame, group: Group) -> FileEntry:
        data = table.to_csv(index=False).encode() if self.form == "csv" else table.to_parquet(index=False)
        return write_listed(place(self.out) / table_name(kind, group.number, self.groups, self.form), data)


@lru_cache(maxsize=1)
def _load(model: str, model_sha256: str, on_gpu: bool) -> tuple[Any, list[str]]:
    """Return the `Inference` of a model and its class names. A process of Ray loads them once, for all its groups.

    Raises:
        KuzushijiError: TensorFlow can't use the GPU.
        DamageError: the model does not match its manifest, or was replaced.
    """
    with without_chatter():
        import tensorflow as tf

        # One thread: Ray runs one process per core, and results are bit-identical for the same number of threads.
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.experimental.enable_op_determinism()
        # Ray does not hide GPUs from actors with num_gpus=0: each process would allocate memory on each GPU.
        configure_gpus(on_gpu)
    if on_gpu and not tf.config.list_logical_devices("GPU"):
        raise KuzushijiError(
            f"--gpus must be GPUs that TensorFlow can use. Received: none on {socket.gethostname()}. Check that "
            "requirements-gpu.lock and a driver for CUDA 12 are installed there"
        )
    if read_manifest(place(model), ModelManifest).sha256 != model_sha256:
        raise DamageError(
            f"--model must not change while it is used. Received: {model}, replaced in the meantime. "
            "Run the same command again"
        )
    loaded, class_names, _ = load_model(place(model))
    from job.model.inference import Inference

    return Inference(loaded), class_names


def _annotate(group: Group, readings: Readings, pages: UPath, folder: UPath, begin: Callable[[str], None]) -> None:
    """Write a picture of each page that has readings."""
    with page_reader(pages) as read_page:
        for page in group.pages:
            if page.id in readings.page_columns:
                begin(f"{page.id}{PICTURE_SUFFIX}")
                picture = annotated(read_page(page.file_name), *readings.for_picture(page.id))
                write_bytes(folder / f"{page.id}{PICTURE_SUFFIX}", picture)
    begin(END)

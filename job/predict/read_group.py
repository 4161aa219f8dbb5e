"""A task of `predict`: read the boxes of a group of pages, and write their tables and pictures.

The report of a group stays in `.predict/` until the folder is sealed, see `preprocessing/resumable.py`.
"""

import hashlib
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from upath import UPath

from cluster.errors import DamageError, KuzushijiError
from cluster.manifest import FileEntry, read_manifest, write_listed
from cluster.models import ModelManifest
from cluster.places import place
from cluster.storage import check_writable, size_of, write_bytes
from job.model.folder import load_model
from job.model.load_tensorflow import configure_gpus, without_chatter
from job.predict.annotate import SmallPage, annotated, small_page
from job.predict.folder import table_name
from job.predict.readings import Readings, read_pages
from preprocessing.cutting import cut_boxes
from preprocessing.dataset import Clipped
from preprocessing.groups import Group
from preprocessing.page_results import PageResult
from preprocessing.resumable import Report, Resumable
from preprocessing.scan import Scan
from preprocessing.tries import TABLES

PICTURE_SUFFIX = ".jpeg"


def resumable(out: UPath) -> Resumable:
    """Return the handle for the folder of `predict` until it is sealed."""
    return Resumable(out, ".predict", "--out")


def unfinished_pictures(annotate: UPath, out: UPath) -> UPath:
    """Return the hidden folder for unfinished pictures. Each `out` has its own: several may draw the same pictures."""
    return annotate / f".predict-{hashlib.sha256(str(out).encode()).hexdigest()[:16]}"


class GroupReport(Report):
    """The result of a group."""

    on_gpu: bool
    files: list[FileEntry]
    pictures: dict[str, int]
    """Page id to size in bytes of the picture, for each page of which a box was read; empty without `--annotate`."""
    clipped: list[Clipped]
    read: int
    """Number of boxes read."""
    uncertain: int = 0
    """Number of these that are less probable than `min_confidence`."""
    rare: int
    """Number of the others that are `rare`."""
    correct: dict[str, int]
    """Counts from which `readings.accuracy` is computed."""
    pages: list[PageResult]
    """Results of the pages that were decoded."""

    @property
    def entries(self) -> list[FileEntry]:
        """The tables."""
        return self.files


@dataclass
class ReadGroup:
    """The work of `predict` on a group of pages.

    The model is loaded with the first group, because Ray Data loses exceptions that an actor's constructor raises.
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
    """Identifies the attempt of the command, see `Tries` and `write_groups`."""

    def __call__(self, number: int) -> GroupReport:
        """Read a group and write its tables, pictures and report, unless an earlier attempt has done so.

        Raises:
            DamageError: as `Resumable.report_of`; or the model does not match its manifest, or was replaced.
            KuzushijiError: as `Resumable.report_of`; or TensorFlow can't use the GPU, or the model gives probabilities
                that are not finite.
            InputError: the pages were changed, or a page ended too many processes.
            OSError: pages can't be read.
        """
        return resumable(place(self.out)).report_of(number, self.attempt, GroupReport, self._read, self._is_whole)

    def _is_whole(self, report: GroupReport) -> bool:
        """Return whether the report of an earlier attempt can be reused.

        It can if it was made on the same kind of device, so that probabilities have the same bits, and if its pictures
        are in the folder for pictures. Without `annotate`, pictures are not checked.
        """
        pictures = [page["page"] for page in report.pages if page["crops"]] if self.annotate else []
        folder = place(self.annotate or self.out)
        try:
            sizes = [size_of(folder / f"{page_id}{PICTURE_SUFFIX}") for page_id in pictures]
        except FileNotFoundError:
            return False
        return report.on_gpu == self.on_gpu and sizes == [report.pictures.get(page_id) for page_id in pictures]

    def _read(self, group: Group, begin: Callable[[str], None]) -> GroupReport:
        inference, class_names = _load(self.model, self.model_sha256, self.on_gpu)
        small_pages: dict[str, SmallPage] = {}
        pictures: dict[str, int] = {}
        pages = []

        def keep(page_id: str, scan: Scan) -> None:
            if self.annotate:
                small_pages[page_id] = small_page(scan.image)

        cuts = cut_boxes(group, place(self.pages), begin, keep)
        for page_id, page in read_pages(group, cuts, inference, class_names, self.min_confidence):
            pages.append(page)
            if (small := small_pages.pop(page_id, None)) and len(page.read):
                begin(f"{page_id}{PICTURE_SUFFIX}")
                pictures[page_id] = self._draw(page_id, small, page)
        begin(TABLES)
        readings = Readings.joined(pages)
        tables = {"predictions": readings.predictions(), "pages": readings.texts(group.page_ids)}
        return GroupReport(
            on_gpu=self.on_gpu,
            files=[self._write(kind, table, group) for kind, table in tables.items()],
            pictures=pictures,
            losses=readings.losses(),
            clipped=[{"box": cut.box, "page": cut.page_id} for cut in readings.cuts if cut.clipped],
            read=len(readings.read),
            uncertain=int(np.count_nonzero(readings.uncertain)),
            rare=int(np.count_nonzero(readings.is_rare & ~readings.uncertain)),
            correct=readings.correct(),
            pages=list({cut.page_id: cut.page for cut in readings.cuts if cut.page}.values()),
        )

    def _draw(self, page_id: str, small: SmallPage, readings: Readings) -> int:
        """Write the picture of a page and return its size in bytes."""
        assert self.annotate
        picture = annotated(small, *readings.for_picture(page_id))
        folder = place(self.annotate)
        path = folder / f"{page_id}{PICTURE_SUFFIX}"
        check_writable(path.parent)  # creates it: an id may have folders
        write_bytes(path, picture, within=unfinished_pictures(folder, place(self.out)))
        return len(picture)

    def _write(self, kind: str, table: pd.DataFrame, group: Group) -> FileEntry:
        # CSV with a byte order mark: without one, Excel takes UTF-8 for another encoding.
        data = table.to_csv(index=False).encode("utf-8-sig") if self.form == "csv" else table.to_parquet(index=False)
        out = resumable(place(self.out))
        path = out.folder / table_name(kind, group.number, self.groups, self.form)
        return write_listed(path, data, out.progress_folder)


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
            "requirements-gpu.lock and a driver for CUDA 12 are installed there. See docs/faq.md"
        )
    if read_manifest(place(model), ModelManifest).sha256 != model_sha256:
        raise DamageError(
            f"--model must not change while it is used. Received: {model}, replaced in the meantime. "
            "Run the same command again"
        )
    loaded, class_names, _ = load_model(place(model))
    from job.model.inference import Inference

    return Inference(loaded), class_names

"""Reading new pages: a Ray Data job from page scans and boxes to characters and text, in a sealed folder.

predictions-00000-of-00016.parquet ...   a row a box, in the order of reading
pages-00000-of-00016.parquet ...         a row a page: its text
manifest.json                            what was lost, what was read with; written last
"""

import json
import re
import socket
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from upath import UPath

from cluster.bucket import explained
from cluster.errors import DamageError, InputError, KuzushijiError, OptionError, one_line
from cluster.manifest import (
    FileEntry,
    ModelManifest,
    PredictionsManifest,
    is_sealed,
    read_manifest,
    seal,
    size_fault_of,
    write_listed,
)
from cluster.models import resolve_model
from cluster.storage import (
    TEMPORARY_PREFIX,
    list_files,
    list_folders,
    place,
    remove_file,
    remove_temporaries,
    write_bytes,
)
from job.model.folder import load_model
from job.model.load_tensorflow import configure_gpus, without_chatter
from job.predict.annotate import annotated
from job.predict.readings import Read, accuracy
from preprocessing.cutting import cut_boxes, group_pages, run_groups
from preprocessing.labels import read_labels
from preprocessing.pages import fingerprint, list_pages, page_reader

BOXES_PER_GROUP = 2_000  # some seconds of work
PICTURE_SUFFIX = ".jpeg"  # not that of pages: no scan can be overwritten
OURS = re.compile(r"(predictions|pages)-[0-9]{5}-of-[0-9]{5}\.(parquet|csv)")
MIN_GROUPS = 16  # as of `prepare`: a laptop's cores have work, whatever their number
VERSIONED = ("kuzushiji", "keras", "opencv-python-headless", "pandas", "pyarrow", "simplejpeg", "tensorflow")


def predict(
    model: UPath,
    pages: UPath,
    boxes: UPath,
    out: UPath,
    form: str = "parquet",
    annotate: UPath | None = None,
    gpus: int = 0,
) -> PredictionsManifest:
    """Read the boxes of a file on their pages. form: `parquet` or `csv`. annotate: where pictures of the pages go.
    gpus: so many actors with a GPU each read them; 0: a task a CPU does.

    Raises:
        OptionError: `out` holds something else, or is where the pictures go; or there are fewer GPUs on this machine.
        InputError: boxes or pages can't be used, or no box could be read.
        DamageError: the model is not what its manifest says, or the workers wrote into other folders.
    """
    if annotate and str(annotate) == str(out):
        raise OptionError(f"--annotate must be another folder than --out. Received: {out} for both")
    folder = resolve_model(model)
    model_manifest = read_manifest(folder, ModelManifest)
    labels = read_labels(boxes, "--boxes", bare=True)
    listing = list_pages(pages)
    _clear(out)
    rows = group_pages(labels, listing, max(MIN_GROUPS, -(-len(labels.boxes) // BOXES_PER_GROUP)))
    for row in rows:
        of = f"{row['group']:05d}-of-{len(rows):05d}.{form}"
        row |= {"predictions_file": f"predictions-{of}", "pages_file": f"pages-{of}"}
    places = {"model": str(folder), "pages": str(pages), "out": str(out), "annotate": str(annotate or "")}
    how = places | {"model_sha256": model_manifest.sha256}
    reports = run_groups(rows, "pages read", GpuReader if gpus else read_group, how, gpus)
    losses = [loss for report in reports for loss in report["losses"]]
    if len(losses) == len(labels.boxes):
        raise InputError(f"a box at least must be readable. Received: {len(losses)} lost, first: {losses[0]['what']}")
    files = [FileEntry.model_validate(entry) for report in reports for entry in report["files"]]
    there = list_files(out)
    if faults := [fault for entry in files if (fault := size_fault_of(entry, there))]:
        raise DamageError(f"--out must be one folder for all workers. Received: {out}, where {faults[0]}")
    read = sum(report["read"] for report in reports)
    assert read + len(losses) == len(labels.boxes), "boxes = those that were read + listed losses"
    manifest = PredictionsManifest(
        files=files,
        counts={"boxes": len(labels.boxes), "read": read, "pages": len(labels.page_ids)},
        accuracy=accuracy([report["sums"] for report in reports]),
        losses=losses,
        clipped=[entry for report in reports for entry in report["clipped"]],
        model_manifest_sha256=model_manifest.sha256,
        fingerprint=fingerprint(labels.sha256, listing),
        versions={package: version(package) for package in VERSIONED},
    )
    remove_temporaries(out)
    seal(out, manifest)
    return manifest


def _clear(out: UPath) -> None:
    """Remove what an attempt that was killed left; nothing else.

    Raises:
        OptionError: something else is there.
    """
    if is_sealed(out):
        raise OptionError(f"--out must be a new or empty folder. Received: {out}, a finished one")
    there = [name for name in list_files(out) if not name.startswith(TEMPORARY_PREFIX)]
    if others := [*list_folders(out), *(name for name in there if not OURS.fullmatch(name))]:
        raise OptionError(f"--out must be a new or empty folder. Received: {out}, with {sorted(others)[0]}")
    for name in there:
        remove_file(out / name)
    remove_temporaries(out)


class Reader:
    """Reads groups of pages with a model that it loads once."""

    def __init__(self, model: str, model_sha256: str, pages: str, out: str, annotate: str, on_gpu: bool) -> None:
        """model_sha256: of the model's manifest. annotate: "" for no pictures.

        Raises:
            KuzushijiError: TensorFlow can't use the GPU.
            DamageError: the model is another one meanwhile.
        """
        with without_chatter():
            import tensorflow as tf

            # For one thread: Ray runs such a process on each core, and the same threads give the same bits.
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
            tf.config.experimental.enable_op_determinism()
            # Ray leaves the GPUs in sight of tasks that ask for none: each would take its memory.
            configure_gpus(on_gpu)
            from job.train.step import Steps
        if on_gpu and not tf.config.list_logical_devices("GPU"):
            raise KuzushijiError(
                f"--gpus must be GPUs that TensorFlow can use. Received: none on {socket.gethostname()}. Look whether "
                "requirements-gpu.lock is installed there, and a driver for CUDA 12"
            )
        if read_manifest(place(model), ModelManifest).sha256 != model_sha256:
            raise DamageError(f"--model must stay as it is while it is used. Received: {model}, another one meanwhile")
        loaded, self.names, _ = load_model(place(model))
        self.steps = Steps(tf.distribute.get_strategy(), 1, loaded)
        self.pages, self.out, self.annotate = place(pages), place(out), place(annotate) if annotate else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read a row of `predict`. Returns {"group", "report": JSON}."""
        read = Read.of(cut_boxes(row, self.pages), self.steps, self.names, np.array(row["unicode"], np.int32))
        tables = {row["predictions_file"]: read.predictions(), row["pages_file"]: read.texts(row["image_id"])}
        files = [write_listed(self.out / name, _encoded(table, name)) for name, table in tables.items()]
        if self.annotate:
            _draw(row, read, self.pages, self.annotate)
        report = {
            "files": [entry.model_dump() for entry in files],
            "losses": read.losses(),
            "clipped": [{"page": cut.page_id, "box": cut.box} for cut in read.cuts if cut.clipped],
            "read": len(read.found),
            "sums": read.sums(),
        }
        return {"group": row["group"], "report": json.dumps(report, ensure_ascii=False)}


class GpuReader:
    """An actor of Ray Data, on a GPU of its own. The model is loaded with the first row: Ray Data loses what a
    constructor raises.
    """

    def __init__(self, **how: Any) -> None:
        """how: what a `Reader` is made with."""
        self.how = how

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return read_group(row, on_gpu=True, **self.how)


def read_group(row: dict[str, Any], on_gpu: bool = False, **how: Any) -> dict[str, Any]:
    """A task of Ray Data, or a call of `GpuReader`. how: what a `Reader` is made with.

    Raises:
        KuzushijiError: whatever failed for reasons outside the code.
    """
    try:
        return _reader(on_gpu=on_gpu, **how)(row)
    except OSError as error:  # Ray Data would put its own text where the path is
        raise explained(error) or KuzushijiError(one_line(error)) from error


@lru_cache(maxsize=1)
def _reader(**how: Any) -> Reader:
    """Once in each of Ray's processes, which do one task after the other."""
    return Reader(**how)


def _draw(row: dict[str, Any], read: Read, pages: UPath, folder: UPath) -> None:
    with page_reader(pages) as read_page:
        for page_id, name in zip(row["image_id"], row["name"], strict=True):
            if page_id in read.of_page:
                picture = annotated(read_page(name), *read.for_picture(page_id))
                write_bytes(folder / f"{page_id}{PICTURE_SUFFIX}", picture)


def _encoded(table: pd.DataFrame, name: str) -> bytes:
    return table.to_csv(index=False).encode() if name.endswith(".csv") else table.to_parquet(index=False)

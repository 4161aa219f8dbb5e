"""Files of groups: each attempt of a command writes them before its first task; a task reads the rows of its group.

*-groups-00000.parquet ...  one row group per group, one row per page, `GROUPS_PER_FILE` groups per file
    page                    id
    file                    name in the folder or archive of the pages, as bytes; empty if the page has no file
    file_bytes              see `Page`
    width, height           size in pixels that the boxes were made for; 0 if the labels do not state it
    boxes                   list of x, y, width, height of one box after the other
    code_points             list, one per box
    labels, splits          lists, one per box, as in `Group`; empty for `predict`
"""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import DamageError
from cluster.progress import progress
from cluster.storage import list_files, new_file, read_bytes, remove_file
from preprocessing.groups import Group, Groups, Page

# A task reads the whole file, about 1.5 MB: one request, whose checksum is compared. A group's scans have 60 MB.
GROUPS_PER_FILE = 16

_SCHEMA = pa.schema(
    [
        ("page", pa.string()),
        ("file", pa.binary()),
        ("file_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.int32())),
        ("code_points", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("splits", pa.list_(pa.int8())),
    ]
)


def write_groups(groups: Groups, folder: UPath, prefix: str, within: UPath | None = None) -> None:
    """Write the files of an attempt.

    Each attempt has its own files: those of another one may have other file names for the same pages, or be damaged.

    Args:
        groups: at least one group.
        folder: folder from which `read_group` reads.
        prefix: prefix of the file names, which differs between attempts.
        within: as in `new_file`.

    Raises:
        KuzushijiError: the folder is full, read-only or missing.
    """
    with progress("groups planned", len(groups), "groups") as advance:
        for first in range(0, len(groups), GROUPS_PER_FILE):
            numbers = range(first, min(first + GROUPS_PER_FILE, len(groups)))
            names = [groups.shard_names[number] for number in numbers] if groups.shard_names else []
            same = {"rescale": groups.rescale, "margin": groups.margin, "shard_names": names}
            schema = _SCHEMA.with_metadata({"groups": json.dumps(same)})
            with (
                new_file(_file_of(folder, prefix, first), within) as local,
                pq.ParquetWriter(local, schema, compression="zstd", write_page_checksum=True) as writer,
            ):
                for number in numbers:
                    rows = _table(groups[number], schema)
                    writer.write_table(rows, row_group_size=len(rows))
            advance(len(numbers))


@contextmanager
def written_groups(groups: Groups, folder: UPath, prefix: str) -> Iterator[Callable[[], None]]:
    """Yield a function that calls `write_groups`, within `folder`. The files are removed when the block ends."""
    try:
        yield lambda: write_groups(groups, folder, prefix, within=folder)
    finally:
        with suppress(Exception):  # the folder itself may have failed
            for name in list_files(folder):
                if name.startswith(f"{prefix}-"):
                    remove_file(folder / name)


def _file_of(folder: UPath, prefix: str, number: int) -> UPath:
    return folder / f"{prefix}-groups-{number // GROUPS_PER_FILE:05d}.parquet"


def _table(group: Group, schema: pa.Schema) -> pa.Table:
    starts = np.cumsum([0, *(page.boxes for page in group.pages)])

    def lists(values: NDArray[Any], of_box: int = 1) -> pa.Array:
        offsets = of_box * starts if len(values) else np.zeros_like(starts)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values.ravel()))

    columns = {
        "page": group.page_ids,
        "file": [page.file_name.encode(errors="surrogateescape") for page in group.pages],
        "file_bytes": [page.file_bytes for page in group.pages],
        "width": [page.made_for[0] for page in group.pages],
        "height": [page.made_for[1] for page in group.pages],
        "boxes": lists(group.boxes, 4),
        "code_points": lists(group.code_points),
        "labels": lists(group.labels),
        "splits": lists(group.splits),
    }
    return pa.table(columns, schema=schema)


def read_group(folder: UPath, prefix: str, number: int) -> Group:
    """Read a group that `write_groups` wrote.

    Raises:
        FileNotFoundError: this machine sees no such file in the folder.
        DamageError: the file is damaged.
        KuzushijiError: the file can't be read.
    """
    path = _file_of(folder, prefix, number)
    data = io.BytesIO(read_bytes(path))
    try:
        with pq.ParquetFile(data, page_checksum_verification=True) as file:
            rows = file.read_row_group(number % GROUPS_PER_FILE, use_threads=False)
    except (pa.ArrowException, OSError) as error:  # OSError: a wrong checksum
        raise DamageError(
            f"{path} must not change after it was written. Received: {' '.join(str(error).split())}. "
            "Run the same command again"
        ) from error
    same = json.loads(rows.schema.metadata[b"groups"])
    columns = {name: rows[name].combine_chunks() for name in _SCHEMA.names}
    made_for = zip(columns["width"].to_pylist(), columns["height"].to_pylist(), strict=True)
    counts = columns["code_points"].value_lengths().to_pylist()
    fields = (columns["page"].to_pylist(), _names(columns["file"]), columns["file_bytes"].to_pylist(), counts, made_for)
    return Group(
        number=number,
        pages=[Page(*values) for values in zip(*fields, strict=True)],
        boxes=_values(columns["boxes"]).reshape(-1, 4),
        code_points=_values(columns["code_points"]),
        rescale=same["rescale"],
        margin=same["margin"],
        labels=_values(columns["labels"]),
        splits=_values(columns["splits"]),
        shard_names=same["shard_names"][number % GROUPS_PER_FILE] if same["shard_names"] else [],
    )


def _names(column: pa.Array) -> list[str]:
    return [name.decode(errors="surrogateescape") for name in column.to_pylist()]


def _values(column: pa.Array) -> NDArray[Any]:
    values: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values

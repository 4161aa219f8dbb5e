"""`pages.parquet` and `losses.parquet` of a dataset folder.

pages.parquet    a row per page of the labels, sorted by id
    page           id
    book           see `preprocessing.books`
    splits         list of `train`, `validation` and `test`: those that the boxes of the page are in
    boxes          number of boxes
    width, height  pixels of the upright page; these and the following are null if the page was not decoded
    orientation    EXIF orientation of the file, 1 to 8, that was applied
    crops          number of boxes that were cut
    without_ink    number of these crops without the contrast of writing, see `preprocessing.crop.LEAST_CONTRAST`
    warnings       list of what was mended in the file, or is unusual about it
losses.parquet   the losses beyond the first `LISTED_LOSSES`, which the manifest lists; written only if there are more
    page, x, y, width, height, unicode, what
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import DamageError
from cluster.storage import read_bytes, size_of
from preprocessing.config import SPLITS
from preprocessing.dataset import Loss
from preprocessing.labels.table import Labels
from preprocessing.page_results import PageResult

PAGES_TABLE = "pages.parquet"
LOSSES_TABLE = "losses.parquet"
RESULTS = ("width", "height", "orientation", "crops", "without_ink", "warnings")  # columns of `PageResult`
LISTED_LOSSES = 10_000  # in the manifest
# Tables beyond these limits are refused. A million pages have about 20 MB.
MAX_TABLE_BYTES = 1 << 28
MAX_ROWS = 10_000_000

_PAGES = pa.schema(
    [
        pa.field("page", pa.string(), nullable=False),
        pa.field("book", pa.string(), nullable=False),
        ("splits", pa.list_(pa.string())),
        ("boxes", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("orientation", pa.int8()),
        ("crops", pa.int32()),
        ("without_ink", pa.int32()),
        ("warnings", pa.list_(pa.string())),
    ]
)
_LOSSES = pa.schema(
    [
        pa.field("page", pa.string(), nullable=False),
        *((name, pa.int32()) for name in ("x", "y", "width", "height")),
        ("unicode", pa.string()),
        ("what", pa.string()),
    ]
)


def pages_table(
    labels: Labels, books: Sequence[str], splits: NDArray[np.int8], results: Mapping[str, PageResult]
) -> bytes:
    """Return the content of `pages.parquet`.

    Args:
        labels: P pages, N boxes.
        books: the book of each page.
        splits: (N,), index into `SPLITS` of each box.
        results: results of the pages that were decoded, by id.
    """
    is_in = np.stack([labels.pages_with(splits == split) for split in range(len(SPLITS))], axis=1)
    columns = {
        "page": labels.page_ids,
        "book": list(books),
        "splits": [[name for name, there in zip(SPLITS, row, strict=True) if there] for row in is_in.tolist()],
        "boxes": labels.boxes_per_page,
    }
    of_page: list[Mapping[str, Any]] = [results.get(page_id, {}) for page_id in labels.page_ids]
    columns |= {name: [result.get(name) for result in of_page] for name in RESULTS}
    return _bytes_of(pa.table(columns, schema=_PAGES))


def losses_table(losses: Sequence[Loss]) -> bytes:
    """Return the content of `losses.parquet`."""
    rows = [
        {"page": loss["page"], "unicode": loss["unicode"], "what": loss["what"]}
        | dict(zip(("x", "y", "width", "height"), loss["box"], strict=True))
        for loss in losses
    ]
    return _bytes_of(pa.Table.from_pylist(rows, schema=_LOSSES))


def _bytes_of(table: pa.Table) -> bytes:
    """Return a table as Parquet, always with the same bytes: options are set here, not left to their defaults."""
    out = io.BytesIO()
    pq.write_table(table, out, version="2.6", compression="zstd", compression_level=3, row_group_size=1 << 20)
    return out.getvalue()


def books_of_table(path: UPath) -> dict[str, str]:
    """Return page id to book from a `pages.parquet`.

    Raises:
        DamageError: the file is not such a table, or too large.
    """
    return {row["page"]: row["book"] for row in _rows(path, _PAGES, ["page", "book"])}


def results_of_table(path: UPath) -> list[PageResult]:
    """Return from a `pages.parquet` the results of the pages that were decoded. Raises: as `books_of_table`."""
    results: list[Any] = _rows(path, _PAGES, ["page", *RESULTS])
    return [result for result in results if result["width"] is not None]


def losses_of_table(path: UPath) -> list[Loss]:
    """Return the losses of a `losses.parquet`. Raises: as `books_of_table`."""
    return [
        {
            "box": [row["x"], row["y"], row["width"], row["height"]],
            "page": row["page"],
            "unicode": row["unicode"],
            "what": row["what"],
        }
        for row in _rows(path, _LOSSES, _LOSSES.names)
    ]


def _rows(path: UPath, schema: pa.Schema, columns: list[str]) -> list[dict[str, Any]]:
    try:
        if size_of(path) > MAX_TABLE_BYTES:
            raise ValueError(f"more than {MAX_TABLE_BYTES} bytes")
        with pq.ParquetFile(io.BytesIO(read_bytes(path))) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise ValueError(f"more than {MAX_ROWS} rows")
            if not file.schema_arrow.equals(schema):
                raise ValueError(f"the columns {', '.join(file.schema_arrow.names)}")
            rows: list[dict[str, Any]] = file.read(columns).to_pylist()
            return rows
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DamageError(
            f"{path} must be a table as `prepare` writes it. Received: {' '.join(str(error).split())}. "
            "Run `prepare` again"
        ) from error

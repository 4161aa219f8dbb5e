"""Groups of consecutive pages, the unit of work, and their crops: the very same to train on and to be read."""

import itertools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError, OptionError
from cluster.progress import on_terminal, progress
from cluster.runtime import cause_of, ray_session
from preprocessing.crop import MAX_PAGE_BYTES, PageFault, clip_box, crop, decode_page
from preprocessing.labels import Labels
from preprocessing.pages import ReadPage, page_reader


@dataclass(frozen=True)
class Cut:
    """What became of one box."""

    page_id: str
    box: list[int]
    """x, y, width, height, as in the labels."""
    crop: NDArray[np.uint8] | None
    """(80, 80)."""
    clipped: bool = False
    """Only a part of the box is on the page, and in the crop."""
    fault: str = ""
    """Why there is no crop."""


def group_pages(labels: Labels, files: dict[str, tuple[str, int]], groups: int) -> list[dict[str, Any]]:
    """Rows for Ray Data: all pages, sorted by id, in at most `groups` groups of nearly equal numbers of boxes.

    files: page id to file name and size in bytes, for the pages that have a file. A row has `group`, P values each of
    `image_id`, `name` ("" without a file), `bytes` (to be read) and `boxes`, and n values of `unicode` and 4n of
    `box`, page by page. A group has a box at least.
    """
    total, pages = len(labels.boxes), len(labels.page_ids)
    groups = min(groups, pages)
    targets = np.arange(1, groups) * total / groups
    # The cut nearest to each target; cuts that fall together leave fewer groups.
    after = np.clip(np.searchsorted(labels.starts, targets), 1, pages)
    cuts = np.where(targets - labels.starts[after - 1] <= labels.starts[after] - targets, after - 1, after)
    # Of cuts with the same number of boxes before them one is enough, and none where all or no boxes are before it.
    inner = {int(labels.starts[cut]): int(cut) for cut in cuts}
    bounds = [0, *(cut for boxes, cut in sorted(inner.items()) if 0 < boxes < total), pages]
    rows: list[dict[str, Any]] = []
    for first, last in itertools.pairwise(bounds):
        boxes = slice(labels.starts[first], labels.starts[last])
        ids = labels.page_ids[first:last]
        row = {
            "group": len(rows),
            "image_id": ids,
            "name": [files.get(page_id, ("", 0))[0] for page_id in ids],
            # No reader reads more, whatever an archive says.
            "bytes": [min(files.get(page_id, ("", 0))[1], MAX_PAGE_BYTES + 1) for page_id in ids],
            "boxes": labels.boxes_per_page[first:last].tolist(),
            "unicode": labels.code_points[boxes].tolist(),
            "box": labels.boxes[boxes].ravel().tolist(),
        }
        rows.append(row)
    return rows


def run_groups(
    rows: Sequence[dict[str, Any]], what: str, work: Callable[..., Any], how: dict[str, Any], gpus: int = 0
) -> list[dict[str, Any]]:
    """Do something with each row with Ray Data, and show how far it has come; the reports, in the order of the rows.

    On a terminal Ray Data's own bar is shown, which counts the rows and tells which CPUs work.

    work: called with a row and `how`, makes {"group", "report": JSON} of it. With `gpus` a class: so many actors of it,
    each with a GPU, are made with `how` and called with a row.

    Raises:
        OptionError: a local Ray has fewer GPUs; a cluster may yet get them.
        Exception: what the work raised.
    """
    reports: dict[int, dict[str, Any]] = {}
    rays_own = on_terminal() and sys.stdout.isatty()  # which is where Ray Data draws bars
    pages = sum(len(row["image_id"]) for row in rows)
    ours = nullcontext(lambda _: None) if rays_own else progress(what, pages, "pages")
    with ray_session(), ours as advance:
        import ray.data

        has = int(ray.cluster_resources().get("GPU", 0))
        if gpus > has and "RAY_ADDRESS" not in os.environ:
            raise OptionError(f"--gpus must be at most the GPUs of this machine. Received: {gpus}, Ray found {has}")
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # else it warns of the bars that are off
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.enable_rich_progress_bars = rays_own
        context.use_ray_tqdm = context.enable_operator_progress_bars = False  # one bar, in rich, is enough
        context.raise_original_map_exception = True  # else the cause is lost on its way back
        groups = ray.data.from_items(list(rows), override_num_blocks=len(rows))
        if gpus:
            pool = ray.data.ActorPoolStrategy(size=gpus)
            done = groups.map(work, fn_constructor_kwargs=how, num_cpus=1, num_gpus=1, compute=pool)
        else:
            done = groups.map(work, fn_kwargs=how, num_cpus=1)
        try:
            for row in done.iter_rows():
                reports[row["group"]] = json.loads(row["report"])
                advance(len(rows[row["group"]]["image_id"]))
        except BaseException as error:
            # Stopped while it makes its iterator, Ray Data goes on until nobody holds that, as the traceback does
            # (later it ends at once: github.com/ray-project/ray/pull/62949). It must not outlive Ray: its thread would
            # start another one, fail, and keep the cursor.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, Exception):
                raise cause_of(error) from error  # which holds the traceback of the task, for --debug
            raise
    assert len(reports) == len(rows), "each group is reported"
    return [reports[group] for group in sorted(reports)]


def cut_boxes(row: dict[str, Any], pages: UPath) -> Iterator[Cut]:
    """The boxes of a row of `group_pages`, in its order; each page is read once.

    Raises:
        InputError: a page is not the file that was listed.
    """
    boxes = np.asarray(row["box"], np.int64).reshape(-1, 4)
    start = 0
    with page_reader(pages) as read:
        for page_id, name, size, count in zip(row["image_id"], row["name"], row["bytes"], row["boxes"], strict=True):
            page = _read_page(read, name, size) if count else PageFault("page without boxes")
            for box in boxes[start : start + count].tolist():
                yield _cut(page_id, page, box)
            start += count
            del page  # before the next one takes as much


def _cut(page_id: str, page: "NDArray[np.uint8] | PageFault", box: list[int]) -> Cut:
    try:
        if isinstance(page, PageFault):
            raise page
        on_page = clip_box(box, page.shape)
    except PageFault as fault:
        return Cut(page_id, box, None, fault=str(fault))
    return Cut(page_id, box, crop(page, on_page), clipped=list(on_page) != box)


def _read_page(read: ReadPage, name: str, size: int) -> "NDArray[np.uint8] | PageFault":
    """A page, or why it can't be cut; only what is wrong with the file that was listed is such a reason.

    Raises:
        InputError: it is not the file that was listed.
    """
    try:
        if not name:
            raise PageFault("page has no file")
        data = read(name)
        if len(data) != size:
            raise FileNotFoundError(f"{name} with {len(data)} bytes instead of {size}")
        return decode_page(data)
    except PageFault as fault:
        return fault
    except FileNotFoundError as error:
        raise InputError(
            "--pages must stay as they are while they are cut, and be one place for all workers. "
            f"Received: {' '.join(str(error).split())}. Run the same command again"
        ) from None

"""Draw synthetic pages in Kaggle's format, for first trials, tests and benchmarks: `kuzushiji sample`.

Writes `train.csv` (`image_id,labels`), `train_images/<image_id>.jpg` and `unicode_translation.csv` (`Unicode,char`).
"""

import csv
import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2

from cluster.errors import OptionError
from cluster.places import place
from cluster.progress import progress
from cluster.runtime import usable_cpus
from cluster.storage import new_file, remove_folder, write_bytes
from preprocessing.books import volume_of
from preprocessing.fonts import Font, find_fonts, japanese_fonts
from preprocessing.labels.code_points import code_point_name
from preprocessing.sample.pages import Glyph, Page, draw_page, hand_of, inventory, new_pages, read_layouts

MIN_PAGES_FOR_PROCESSES = 4  # fewer pages are drawn before worker processes would have started


@dataclass(frozen=True)
class SampleSummary:
    """Result of `sample`."""

    pages: int
    characters: int
    books: int
    fonts: tuple[str, ...]  # names, sorted


def sample(
    out: Path,
    num_pages: int,
    seed: int = 42,
    scale: float = 1.0,
    layouts: Path | None = None,
    processes: int | None = None,
    fonts: Path | None = None,
) -> SampleSummary:
    """Draw pages into `out`. The same seed and fonts give the same bytes, for any number of processes.

    The processes are spawned: a script that calls this function needs the usual `if __name__ == "__main__"`.

    Args:
        out: a new or empty folder. `train.csv` is written last.
        num_pages: at least 1.
        seed: 0 or more.
        scale: scale of all lengths, in (0, 1]; 1.0 gives pages of about 2,400 x 3,900 px.
        layouts: a label file whose first `num_pages` rows have the ids, boxes and characters; None: all are random.
        fonts: folder of the fonts to draw with; None: the fonts of this machine.
        processes: number of processes; None: one per usable CPU, or this process for fewer than 4 pages.

    Raises:
        OptionError: a number is out of its range, `out` is not a new or empty folder, `layouts` has too few rows, or
            `fonts` has no Japanese font.
        InputError: `layouts` can't be read, is not in Kaggle's format, repeats an id, or has an invalid box.
        KuzushijiError: `out` is full, read-only or gone. The files that were written are removed.
    """
    _check_options(out, num_pages, seed, scale)
    faces = find_fonts() if fonts is None else _fonts_in(fonts)
    pages = read_layouts(layouts, num_pages) if layouts else new_pages(num_pages, seed)
    try:
        return _draw_all(pages, out, seed, scale, faces, processes)
    except BaseException:  # also Ctrl-C: empty the folder, so that the same command can be run again
        remove_folder(place(out / "train_images"))
        for name in ("unicode_translation.csv", "train.csv"):
            with suppress(OSError):
                (out / name).unlink()
        raise


def _check_options(out: Path, num_pages: int, seed: int, scale: float) -> None:
    if num_pages < 1:
        raise OptionError(f"--num-pages must be at least 1. Received: {num_pages}")
    if seed < 0:
        raise OptionError(f"--seed must be 0 or more. Received: {seed}")
    if not 0 < scale <= 1:
        raise OptionError(f"--scale must be more than 0 and at most 1. Received: {scale}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"--out must be a new or an empty folder. Received: {out}. Name another folder or empty it")


def _fonts_in(folder: Path) -> tuple[Font, ...]:
    fonts = japanese_fonts([folder])
    if not fonts:
        raise OptionError(
            f"--fonts must be a folder with a .ttf, .otf or .ttc font that has all hiragana. Received: {folder}, "
            f"{'with none' if folder.is_dir() else 'which is not a folder'}"
        )
    return fonts


def _draw_all(
    pages: list[Page], out: Path, seed: int, scale: float, fonts: tuple[Font, ...], processes: int | None
) -> SampleSummary:
    draw = partial(_draw_to_file, out=out, seed=seed, scale=scale, fonts=fonts)
    with progress("pages drawn", len(pages), "pages") as advance:
        rows = []
        for row in _in_processes(draw, pages, processes):
            rows.append(row)
            advance(1)
    drawn = [glyph for row in rows for glyph in row]
    characters = {*inventory(), *(code_point for code_point, _ in drawn)}
    _write_csv(
        out / "unicode_translation.csv", ("Unicode", "char"), ((code_point_name(c), chr(c)) for c in sorted(characters))
    )
    labels = (
        " ".join(f"{code_point_name(code_point)} {x} {y} {w} {h}" for code_point, (x, y, w, h) in row) for row in rows
    )
    ids = (page.image_id for page in pages)
    _write_csv(out / "train.csv", ("image_id", "labels"), zip(ids, labels, strict=True))
    books = {volume_of(page.image_id) for page in pages}
    font_names = {hand_of(book, seed, fonts).fonts[0].name for book in books}
    return SampleSummary(len(pages), len(drawn), len(books), tuple(sorted(font_names)))


def _in_processes(
    draw: Callable[[Page], list[Glyph]], pages: list[Page], processes: int | None
) -> Iterator[list[Glyph]]:
    """Yield `draw(page)` for each page, in order. Processes are spawned, because forking with threads may hang."""
    count = min(processes or usable_cpus(), len(pages))
    if count == 1 or (processes is None and len(pages) < MIN_PAGES_FOR_PROCESSES):
        yield from map(draw, pages)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from pool.map(draw, pages)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waits, so that no process writes after the failure is reported
            raise


def _start_worker() -> None:
    """Limit OpenCV to one thread, because the processes share the CPUs. Exit when the parent process is killed."""
    cv2.setNumThreads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _draw_to_file(page: Page, out: Path, seed: int, scale: float, fonts: tuple[Font, ...]) -> list[Glyph]:
    image, glyphs = draw_page(page, seed, scale, fonts)
    with new_file(place(out / "train_images" / f"{page.image_id}.jpg")) as temporary:
        image.save(temporary, format="JPEG", quality=75, subsampling="4:2:0")
    return glyphs


def _write_csv(target: Path, header: tuple[str, str], rows: Iterator[tuple[str, str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_bytes(place(target), text.getvalue().encode())

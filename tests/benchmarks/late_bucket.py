"""Cutting of pages from a bucket with latency, against the same bucket without it:

    PYTHONPATH=tests python -m benchmarks.late_bucket

One process cuts a group of pages, as a task of `prepare` does. The bucket runs in another process.
"""

import argparse
import random
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import click

from benchmarks.bucket import BUCKET, Delay, bucket
from benchmarks.pages import Source, source_in
from benchmarks.pairs import Ratio, compare

LATENCY = 0.03  # seconds
KINDS = ("folder", "archive", "archive in another order")


def measure(
    source: Source, times: int, pairs: int, folder: Path, delay: Delay, kinds: Sequence[str] = KINDS
) -> Iterator[Ratio]:
    """Yield `late_..._vs_prompt` of each kind. times: copies of the source's pages in the group."""
    many = source.repeated(times, folder / "late")
    for kind in kinds:
        yield _compare(kind, many, pairs, folder, delay)


def _compare(kind: str, source: Source, pairs: int, folder: Path, delay: Delay) -> Ratio:
    from cluster.places import place
    from cluster.storage import write_bytes
    from preprocessing.cutting import cut_boxes
    from preprocessing.groups import group_pages
    from preprocessing.labels.read import read_labels
    from preprocessing.pages import list_pages

    names = sorted(path.name for path in source.images.iterdir())
    pages = place(f"gs://{BUCKET}/{kind.replace(' ', '-')}")
    if kind == "folder":
        for name in names:
            write_bytes(pages / name, (source.images / name).read_bytes())
    else:
        pages = pages.with_suffix(".zip")
        if kind != "archive":
            random.Random(0).shuffle(names)
        with zipfile.ZipFile(folder / "late.zip", "w") as archive:
            for name in names:
                archive.write(source.images / name, name)
        write_bytes(pages, (folder / "late.zip").read_bytes())
    labels = read_labels(place(source.labels))
    (group,) = group_pages(labels, list_pages(pages).files_of(labels.page_ids), 1)

    def rate(latency: float) -> float:
        before = delay(latency)
        begin = time.perf_counter()
        cuts = sum(cut.crop is not None for cut in cut_boxes(group, pages))
        seconds = time.perf_counter() - begin
        assert cuts == len(labels.boxes), "all boxes are cut"
        requests.append((delay(0) - before) / len(names))
        return len(names) / seconds

    requests: list[float] = []
    key = f"late_{kind.replace(' ', '_')}_vs_prompt"
    ratio = compare(key, 0.9, "pages/s", partial(rate, LATENCY), partial(rate, 0), pairs)
    click.echo(f"{key}: {max(requests):.2f} requests a page")
    return ratio


def main() -> None:
    from benchmarks.__main__ import line

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--times", type=int, default=20, help="copies of each page")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kuzushiji-bench-") as folder, bucket() as delay:
        for ratio in measure(source_in(Path(folder)), given.times, given.pairs, Path(folder), delay):
            click.echo(line(ratio))


if __name__ == "__main__":
    main()

"""The cost of planning: `PYTHONPATH=tests python -m benchmarks.plan --pages 100000`.

The labels are real layouts, repeated under new page ids, in files of 5,000 pages. The scans are empty files, because
none is read.
"""

import argparse
import csv
import resource
import tempfile
import time
from pathlib import Path

import click

PAGES_A_FILE = 5_000
LAYOUTS = Path(__file__).parents[3] / "shared" / "kuzushiji" / "layouts.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=20_000)
    parser.add_argument("--layouts", type=Path, default=LAYOUTS, help="labels in Kaggle's form")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(given.layouts, given.pages, Path(folder))
        measure(Path(folder))


def make(layouts: Path, pages: int, folder: Path) -> None:
    csv.field_size_limit(1 << 24)
    with layouts.open() as file:
        rows = [row for _, row in list(csv.reader(file))[1:]]
    for name in ("pages", "labels"):
        (folder / name).mkdir()
    for first in range(0, pages, PAGES_A_FILE):
        with (folder / "labels" / f"{first:08d}.csv").open("w") as file:
            file.write("image_id,labels\n")
            for number in range(first, min(first + PAGES_A_FILE, pages)):
                page_id = f"{200_000_000 + number // 20}_{number % 20:05d}_1"
                file.write(f"{page_id},{rows[number % len(rows)]}\n")
                (folder / "pages" / f"{page_id}.jpg").touch()


def measure(folder: Path) -> None:
    from cluster.places import place
    from preprocessing.config import PrepareConfig
    from preprocessing.group_files import write_groups
    from preprocessing.plan import make_plan

    before, began = peak(), time.perf_counter()
    plan = make_plan(place(folder / "pages"), place(folder / "labels"), PrepareConfig())
    planned = time.perf_counter()
    boxes, of_plan = len(plan.labels.boxes), peak()
    write_groups(plan.groups, place(folder / "dataset"), "attempt")
    written = sum(path.stat().st_size for path in (folder / "dataset").iterdir())
    click.echo(
        f"{len(plan.labels.page_ids):,} pages, {boxes:,} boxes: plan {planned - began:.1f} s, its files "
        f"{time.perf_counter() - planned:.1f} s, {written / 1e6:.0f} MB; resident at most {peak() / 1e6:.0f} MB, "
        f"{(of_plan - before) / boxes:.0f} bytes a box with the plan, {(peak() - before) / boxes:.0f} in all"
    )


def peak() -> float:
    """Return the largest resident size of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()

"""Measure everything on this machine: `docs/bench.md`, and as the last line one JSON object of the ratios.

make bench                      # about 20 minutes on 2 cores
make bench BENCH=--quick        # only whether it runs; its numbers mean nothing
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import click

from benchmarks import growth, late_bucket, pages, planning, reading, steps, transfer, workers
from benchmarks.bucket import bucket
from benchmarks.pairs import Ratio
from benchmarks.recognition import processor
from cluster.capacity import Request
from cluster.runtime import ray_session
from job.config import TrainConfig
from preprocessing.sample.sample import sample


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    pairs: int = 5
    rounds: int = 8  # over the real pages, on one core
    copies: int = 240  # of the real pages, cut by Ray Data
    late: int = 19  # copies of the real pages, read from a bucket: a group of `prepare` has about 57 pages
    read: int = 60  # of the real pages, read by `predict`
    steps: int = 1  # each takes 7 s
    batch: int = 512
    scale: float = 1.0  # of drawn pages, and of the pulled model
    drawn: int = 4  # pages in Kaggle's layouts; each is cut in this many copies:
    growth: tuple[int, ...] = (1, 3, 30, 90, 300)
    trainings: tuple[tuple[int, int], ...] = ((1, 9), (3, 3))  # copies of the drawn pages, epochs
    train_batch: int = 256


QUICK = Amount(
    1,
    1,
    copies=6,
    late=1,
    read=3,
    batch=16,
    scale=0.2,
    drawn=2,
    growth=(1, 3, 10),
    trainings=((1, 3),),
    train_batch=128,
)


def ratios(folder: Path, amount: Amount, rates: dict[str, float]) -> Iterator[Ratio]:
    """Yield each ratio when it is measured. rates: gets the rates for the planning table."""
    pairs = amount.pairs
    source = pages.source_in(folder)
    one_core, fastest = pages.measure_one_core(source.pages(), pairs, amount.rounds)
    say(f"fastest to decode a page to gray: {fastest}")
    yield from one_core
    mean, worst = pages.grey_levels(source.pages())
    say(f"our crops are {mean:.2f} grey levels from the study's, the worst {worst:.2f}")
    with ray_session():
        whole, dataset = pages.measure_all_cores(source, amount.copies, pairs, amount.rounds, folder)
        yield whole
        yield reading.measure(source, amount.read, pairs, folder)
    config = TrainConfig(
        architecture="baseline",
        epochs=1,
        global_batch_size=amount.batch,
        learning_rate=1e-4,
        cpus_per_worker=os.cpu_count() or 1,
    )
    with steps.process(dataset, config) as ask:
        yield steps.measure_input(ask, pairs, 20)
        step = steps.measure_step(ask, pairs, amount.steps)
        rates["step_crops_per_s"] = median(step.ours) / config.cpus_per_worker
        yield step
        yield steps.measure_evaluate(ask, pairs, amount.steps)
        with ray_session(Request(cpus=2)):
            yield from workers.measure(dataset, folder / "runs", config, ask, pairs, amount.steps)
    with bucket() as delay:
        yield from late_bucket.measure(source, amount.late, pairs, folder, delay)
        yield transfer.measure(folder, pairs, amount.scale)


def grow(folder: Path, amount: Amount, rates: dict[str, float], plot: Path | None) -> dict[str, float]:
    """Return the costs of `prepare` and `train` as their work grows, as ratios. rates: as in `ratios`."""
    layouts = pages.REAL / "layouts.csv"
    sample(folder, amount.drawn, scale=amount.scale, layouts=layouts if layouts.is_file() else None)
    source = pages.Source(folder / "train_images", folder / "train.csv")
    costs = []
    for times in amount.growth:
        costs.append(growth.of_prepare(source, times, folder))
        count, cost = costs[-1]
        say(f"prepare, {count} pages: {cost.seconds:.1f} s, worker {mb(cost.peak)}, command {mb(cost.driver_peak)}")
    if plot:
        planning.plot(costs, plot)
    trained = []
    for times, epochs in amount.trainings:
        trained.append(cost := growth.of_train(folder / f"dataset-{times}", epochs, amount.train_batch, folder))
        say(f"train, {times} x the crops, {epochs} epochs: {cost.seconds:.1f} s, beyond files {mb(cost.peak)} a worker")
        say("; ".join(line for line in cost.said if "first step" in line))
        say(f"of each epoch, and of the evaluation: {', '.join(map(mb, cost.peaks))}")
    rates["page_seconds"] = planning.page_seconds(costs)
    sizes = [path.stat().st_size for path in source.images.iterdir()]
    rates["page_bytes"] = sum(sizes) / len(sizes)
    rates["crop_bytes"] = pages.bytes_of_a_crop(folder / f"dataset-{amount.growth[-1]}")
    (one, at_one), (three, at_three), (ten, at_ten) = ((count, cost.seconds) for count, cost in costs[-3:])
    third = amount.trainings[0][1] // 3
    first, second, last = (max(trained[0].peaks[i * third : (i + 1) * third]) for i in range(3))
    return {
        "prepare_memory_at_10_times": costs[-1][1].peak / costs[-3][1].peak,
        "prepare_slope_3_to_10_vs_1_to_3": (at_ten - at_three) / (ten - three) / ((at_three - at_one) / (three - one)),
        "train_memory_last_third_of_epochs_vs_second": last / second,
        "train_memory_at_3_times_the_crops": max(trained[-1].peaks[:third]) / first,
    }


def say(text: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {text}")


def mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def line(ratio: Ratio) -> str:
    of_pairs = sorted(a / b for a, b in zip(ratio.ours, ratio.theirs, strict=True))
    return (
        f"| `{ratio.key}` | {ratio.ratio:.2f} ({of_pairs[0]:.2f} to {of_pairs[-1]:.2f}) | {ratio.at_least:.2f} | "
        f"{median(ratio.ours):,.0f} | {median(ratio.theirs):,.0f} {ratio.unit} |"
    )


def page(found: Sequence[Ratio], rates: planning.Rates, growing: Mapping[str, float]) -> str:
    """Return all that was measured, in Markdown."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return "\n".join(
        [
            "# Measured by `make bench`",
            "",
            f"{date.today().isoformat()}, {os.cpu_count()} CPUs, {processor()}, {memory:.0f} GiB.",
            "[performance.md](performance.md) explains the keys. `make bench` writes this page.",
            "",
            "| key | ours / theirs: median (all) of pairs | aim | ours | theirs |",
            "|---|---|---|---|---|",
            *map(line, found),
            "",
            "| as work grows | ratio |",
            "|---|---|",
            *(f"| `{key}` | {value:.2f} |" for key, value in growing.items()),
            "",
            "Computed from the rates of this run, 176 crops a page, of which `baseline` trains on 70 %:",
            "",
            planning.table(rates),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure how fast it is, in ratios.")
    parser.add_argument("--quick", action="store_true", help="show that it runs; the numbers mean nothing")
    parser.add_argument("--docs", type=Path, help="folder for bench.md, and growth.png: prepare's time and memory")
    options = parser.parse_args()
    amount = QUICK if options.quick else Amount()
    rates: dict[str, float] = {}
    found = []
    with tempfile.TemporaryDirectory(prefix="kuzushiji-bench-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for ratio in ratios(Path(folder), amount, rates):
            say(line(ratio))
            found.append(ratio)
        growing = grow(Path(folder) / "drawn", amount, rates, options.docs and options.docs / "growth.png")
    text = page(found, planning.Rates(**rates), growing)
    click.echo(f"\n{text}")
    if options.docs:
        (options.docs / "bench.md").write_text(text)
    numbers = {ratio.key: ratio.ratio for ratio in found} | growing
    click.echo(json.dumps({key: round(value, 3) for key, value in numbers.items()}))


if __name__ == "__main__":
    main()

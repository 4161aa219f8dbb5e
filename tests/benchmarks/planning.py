"""What the measured rates mean for more pages than this machine can hold: a plot and a table."""

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.growth import Cost

KAGGLE_PAGES, KAGGLE_CROPS = 3_881, 683_464
PAGES = (KAGGLE_PAGES, 1_000_000, 100_000_000)
TRAIN_SHARE = 0.7


@dataclass(frozen=True)
class Rates:
    """Rates of one core, and sizes on disk."""

    page_seconds: float
    step_crops_per_s: float
    page_bytes: float
    crop_bytes: float


def page_seconds(costs: list[tuple[int, Cost]]) -> float:
    """Return core-seconds per page, without start-up: from the difference of the largest and the smallest run."""
    (few, first), *_, (many, last) = costs
    return (os.cpu_count() or 1) * (last.seconds - first.seconds) / (many - few)


def table(rates: Rates) -> str:
    """Return the table, in Markdown."""
    lines = [
        "| pages | crops | `prepare`, core-hours | `train`, core-hours an epoch | scans, GB | dataset, GB |",
        "|---|---|---|---|---|---|",
    ]
    for pages in PAGES:
        crops = pages * KAGGLE_CROPS / KAGGLE_PAGES
        cutting = pages * rates.page_seconds / 3600
        epoch = TRAIN_SHARE * crops / rates.step_crops_per_s / 3600
        scans, dataset = pages * rates.page_bytes / 1e9, crops * rates.crop_bytes / 1e9
        numbers = (pages, crops, cutting, epoch, scans, dataset)
        lines.append("| " + " | ".join(map(_short, numbers)) + " |")
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def plot(costs: list[tuple[int, Cost]], path: Path) -> None:
    """Plot time and memory of `prepare` over the number of pages, with a line through the first and the last time."""
    from matplotlib.figure import Figure

    pages = [count for count, _ in costs]
    seconds = [cost.seconds for _, cost in costs]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    time.plot([pages[0], pages[-1]], [seconds[0], seconds[-1]], color="0.7", label="a straight line")
    time.plot(pages, seconds, "o", label="measured")
    time.set(xlabel="pages", ylabel="seconds, with the start", xlim=(0, None), ylim=(0, None))
    time.legend(frameon=False)
    for label, peaks in (
        ("the largest worker", [cost.peak for _, cost in costs]),
        ("the command", [cost.driver_peak for _, cost in costs]),
    ):
        memory.plot(pages, [peak / 1e6 for peak in peaks], "o-", label=label)
    memory.set(xlabel="pages", ylabel="peak of resident memory, MB", xlim=(0, None), ylim=(0, None))
    memory.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=100)

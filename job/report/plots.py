"""Plots as SVG for HTML pages: in the page's text colour, and without fonts, because letters are drawn as paths."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from job.colours import BLUE, PALETTE, VERMILLION
from preprocessing.config import SPLITS
from preprocessing.fonts import packaged_font

INK = "#010203"  # placeholder for the page's text colour
SPLIT_COLOURS = dict(zip(SPLITS, PALETTE, strict=False))
MAX_BARS = 40
SETTINGS: Any = {
    "font.family": ["DejaVu Sans", packaged_font().name],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "text.parse_math": False,
    "svg.hashsalt": "kuzushiji",  # so that the bytes are the same each time
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


def _svg(draw: Callable[[Any], None], height: float = 3.4) -> str:
    """Call `draw` with new axes and return the SVG. height: in inches; the width is 6.4."""
    fontManager.addfont(packaged_font().path)
    written = io.StringIO()
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with numbers such as 1,000: powers of ten need math text, which is turned off."""
    axis.set_major_formatter("{x:,.0f}")
    axis.set_minor_formatter(NullFormatter())


def class_frequency(counts: NDArray[np.int64], kept: int, coverage: float | None) -> str:
    """Plot the cumulative share of crops over the characters.

    counts: crops of each character, in descending order. kept: number of characters that have a class of their own.
    coverage: share of boxes that decided which characters keep a class; None if the classes were given.
    """

    def draw(axes: Any) -> None:
        axes.plot(np.arange(1, len(counts) + 1), np.cumsum(counts) / counts.sum(), color=BLUE)
        if coverage is not None:
            axes.axhline(coverage, color=VERMILLION, linewidth=1, linestyle="--")
        if coverage is not None and kept:  # given classes need not be the most frequent characters
            axes.axvline(kept, color=VERMILLION, linewidth=1, linestyle="--")
            axes.annotate(f"{kept:,} classes", (kept, 0.03), (-4, 0), textcoords="offset points", ha="right")
        axes.set(
            xlabel="characters, the most frequent first", ylabel="share of all crops", xscale="log", ylim=(0, 1.02)
        )
        _plain_numbers(axes.xaxis)
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    return _svg(draw)


def crops_per_class(counts_by_split: Mapping[str, NDArray[np.int64]]) -> str:
    """Plot the number of crops over the classes. counts_by_split: (K,) crops of each class; `rare` is the last."""

    def draw(axes: Any) -> None:
        for split, counts in counts_by_split.items():
            ranks = np.arange(1, len(counts) + 1)
            axes.plot(ranks, counts, ".", label=split, color=SPLIT_COLOURS[split], markersize=3)
        axes.set(
            xlabel="class, the most frequent first; the last is rare", ylabel="crops", yscale="symlog", ylim=(0, None)
        )
        _plain_numbers(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    return _svg(draw)


def stacked(names: Sequence[str], counts_by_split: Mapping[str, NDArray[np.int64]], unit: str) -> str:
    """Plot a horizontal bar per name, stacked by split. Only the first `MAX_BARS` names are drawn."""
    names = list(names[:MAX_BARS])

    def draw(axes: Any) -> None:
        left = np.zeros(len(names))
        for split, counts in counts_by_split.items():
            axes.barh(names, counts[: len(names)], left=left, label=split, color=SPLIT_COLOURS[split])
            left += counts[: len(names)]
        axes.invert_yaxis()
        axes.set(xlabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(counts_by_split))

    return _svg(draw, height=max(1.8, 1.0 + 0.24 * len(names)))


def box_sizes(boxes: NDArray[np.int32]) -> str:
    """Plot histograms of widths and heights. boxes: (N, 4) x, y, width, height. The largest 0.5 % are left out."""

    def draw(axes: Any) -> None:
        largest = int(np.percentile(boxes[:, 2:], 99.5)) + 1
        for name, sides, colour in (("width", boxes[:, 2], BLUE), ("height", boxes[:, 3], VERMILLION)):
            axes.hist(sides, bins=60, range=(0, largest), histtype="step", label=name, color=colour, linewidth=1.5)
        axes.set(xlabel="pixels on the page", ylabel="boxes")
        axes.legend()

    return _svg(draw)


def curves(histories: Mapping[str, pd.DataFrame], columns: Sequence[str], unit: str) -> str:
    """Plot columns over the epochs.

    histories: name to a table with a row per epoch. columns: one or two; the second is dashed.
    """

    def draw(axes: Any) -> None:
        for (name, history), colour in zip(histories.items(), itertools.cycle(PALETTE), strict=False):
            for column, line in zip(columns, ("-", "--"), strict=False):
                label = f"{name} {column}".replace("_", " ").strip()
                axes.plot(history["epoch"], history[column], line, marker=".", label=label, color=colour)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.legend()

    return _svg(draw)


def accuracy_by_frequency(examples: NDArray[np.int64], recall: NDArray[np.float64]) -> str:
    """Plot a point per class: its number of test crops, at least 1, and its recall. examples, recall: (n,)."""

    def draw(axes: Any) -> None:
        axes.plot(examples, recall, ".", color=BLUE, alpha=0.6, markeredgewidth=0)
        axes.set(xlabel="test crops of the class", ylabel="recall", xscale="log", ylim=(-0.03, 1.03))
        _plain_numbers(axes.xaxis)
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    return _svg(draw)


def risk(errors: Sequence[float]) -> str:
    """Plot the error rate among the most certain crops over their share. errors: at equal steps, up to all crops."""

    def draw(axes: Any) -> None:
        axes.plot(np.arange(1, len(errors) + 1) / len(errors), errors, ".-", color=BLUE)
        axes.set(
            xlabel="share of the test crops, the most certain first", ylabel="errors", xlim=(0, 1.02), ylim=(0, None)
        )
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    return _svg(draw)


def shares(names: Sequence[str], values: NDArray[np.float64], unit: str) -> str:
    """Plot a horizontal bar from 0 to 1 per name. Only the first `MAX_BARS` names are drawn."""
    names = list(names[:MAX_BARS])

    def draw(axes: Any) -> None:
        axes.barh(names, values[: len(names)], color=BLUE)
        axes.invert_yaxis()
        axes.set(xlabel=unit, xlim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1))

    return _svg(draw, height=max(1.8, 1.0 + 0.24 * len(names)))


def points(names: Sequence[str], costs: Sequence[float], accuracies: Sequence[float], unit: str) -> str:
    """Plot a point per name: test accuracy over cost, such as parameters or minutes. unit: of the costs."""

    def draw(axes: Any) -> None:
        for name, x, y, colour in zip(names, costs, accuracies, itertools.cycle(PALETTE), strict=False):
            axes.plot([x], [y], "o", color=colour)
            axes.annotate(name, (x, y), (6, 4), textcoords="offset points")
        axes.set(xlabel=unit, ylabel="test accuracy", xlim=(0, 1.35 * max(costs)))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))

    return _svg(draw)

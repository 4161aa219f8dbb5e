"""Plots as SVG that takes the colours of the page around it, and needs no font: letters are drawn as shapes."""

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

INK = "#010203"  # becomes the colour of the page's text
SPLIT_COLOURS = dict(zip(SPLITS, PALETTE, strict=False))
MOST_BARS = 40
SETTINGS: Any = {
    "font.family": ["DejaVu Sans", packaged_font().name],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "text.parse_math": False,
    "svg.hashsalt": "kuzushiji",  # else the same plot has other bytes each time
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


def _svg(draw: Callable[[Any], None], height: float = 3.4) -> str:
    """What `draw` does to a pair of axes. height: in hundreds of pixels; the width is 6.4."""
    fontManager.addfont(packaged_font().path)
    written = io.StringIO()
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _plain(logarithmic: Any) -> None:
    """Numbers on a logarithmic axis as 1,000: powers of ten would be formulas, which are off."""
    logarithmic.set_major_formatter("{x:,.0f}")
    logarithmic.set_minor_formatter(NullFormatter())


def class_frequency(counts: NDArray[np.int64], kept: int, coverage: float | None) -> str:
    """counts: of each character, falling. kept: how many have a class of their own. coverage: the cut, if one made
    the classes.
    """

    def draw(axes: Any) -> None:
        axes.plot(np.arange(1, len(counts) + 1), np.cumsum(counts) / counts.sum(), color=BLUE)
        if coverage is not None:
            axes.axhline(coverage, color=VERMILLION, linewidth=1, linestyle="--")
        if coverage is not None and kept:  # else the classes are not the most frequent ones
            axes.axvline(kept, color=VERMILLION, linewidth=1, linestyle="--")
            axes.annotate(f"{kept:,} classes", (kept, 0.03), (-4, 0), textcoords="offset points", ha="right")
        axes.set(
            xlabel="characters, the most frequent first", ylabel="share of all crops", xscale="log", ylim=(0, 1.02)
        )
        _plain(axes.xaxis)
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    return _svg(draw)


def crops_per_class(of_splits: Mapping[str, NDArray[np.int64]]) -> str:
    """of_splits: split to (K,) crops of each class, in the order of the classes; `rare` is the last."""

    def draw(axes: Any) -> None:
        for split, counts in of_splits.items():
            ranks = np.arange(1, len(counts) + 1)
            axes.plot(ranks, counts, ".", label=split, color=SPLIT_COLOURS[split], markersize=3)
        axes.set(
            xlabel="class, the most frequent first; the last is rare", ylabel="crops", yscale="symlog", ylim=(0, None)
        )
        _plain(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    return _svg(draw)


def stacked(names: Sequence[str], of_splits: Mapping[str, NDArray[np.int64]], unit: str) -> str:
    """A bar a name, with a part a split; the first `MOST_BARS`."""
    names = list(names[:MOST_BARS])

    def draw(axes: Any) -> None:
        begin = np.zeros(len(names))
        for split, counts in of_splits.items():
            axes.barh(names, counts[: len(names)], left=begin, label=split, color=SPLIT_COLOURS[split])
            begin += counts[: len(names)]
        axes.invert_yaxis()
        axes.set(xlabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(of_splits))

    return _svg(draw, height=max(1.8, 1.0 + 0.24 * len(names)))


def box_sizes(boxes: NDArray[np.int32]) -> str:
    """boxes: (N, 4) x, y, width, height. The largest in two hundred are left out."""

    def draw(axes: Any) -> None:
        most = int(np.percentile(boxes[:, 2:], 99.5)) + 1
        for name, sides, colour in (("width", boxes[:, 2], BLUE), ("height", boxes[:, 3], VERMILLION)):
            axes.hist(sides, bins=60, range=(0, most), histtype="step", label=name, color=colour, linewidth=1.5)
        axes.set(xlabel="pixels on the page", ylabel="boxes")
        axes.legend()

    return _svg(draw)


def curves(of_runs: Mapping[str, pd.DataFrame], columns: Sequence[str], unit: str) -> str:
    """of_runs: name to a row an epoch. columns: at most two; the second is dashed."""

    def draw(axes: Any) -> None:
        for (name, history), colour in zip(of_runs.items(), itertools.cycle(PALETTE), strict=False):
            for column, line in zip(columns, ("-", "--"), strict=False):
                label = f"{name} {column}".replace("_", " ").strip()
                axes.plot(history["epoch"], history[column], line, marker=".", label=label, color=colour)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.legend()

    return _svg(draw)


def accuracy_by_frequency(examples: NDArray[np.int64], recall: NDArray[np.float64]) -> str:
    """A point a class: its crops in the test, and the share of them that was recognised."""

    def draw(axes: Any) -> None:
        axes.plot(examples, recall, ".", color=BLUE, alpha=0.6, markeredgewidth=0)
        axes.set(xlabel="crops of the class in the test", ylabel="recognised", xscale="log", ylim=(-0.03, 1.03))
        _plain(axes.xaxis)
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    return _svg(draw)


def shares(names: Sequence[str], values: NDArray[np.float64], unit: str) -> str:
    """A bar a name, from 0 to 1; the first `MOST_BARS`."""
    names = list(names[:MOST_BARS])

    def draw(axes: Any) -> None:
        axes.barh(names, values[: len(names)], color=BLUE)
        axes.invert_yaxis()
        axes.set(xlabel=unit, xlim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1))

    return _svg(draw, height=max(1.8, 1.0 + 0.24 * len(names)))


def points(names: Sequence[str], across: Sequence[float], accuracies: Sequence[float], unit: str) -> str:
    """A named point each: accuracy over what it costs."""

    def draw(axes: Any) -> None:
        for name, x, y, colour in zip(names, across, accuracies, itertools.cycle(PALETTE), strict=False):
            axes.plot([x], [y], "o", color=colour)
            axes.annotate(name, (x, y), (6, 4), textcoords="offset points")
        axes.set(xlabel=unit, ylabel="test accuracy", xlim=(0, 1.35 * max(across)))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))

    return _svg(draw)

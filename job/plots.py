"""Plots as SVG that takes the colours of the page around it, and needs no font: letters are drawn as shapes."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from preprocessing.hand import packaged_font

INK = "#010203"  # becomes the colour of the page's text
# Okabe and Ito's colours, which colour-blind people tell apart (jfly.uni-koeln.de/color).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SPLIT_COLOURS = dict(zip(("train", "validation", "test"), COLOURS, strict=False))
MOST_BARS = 40
SETTINGS: Any = {
    "font.family": ["DejaVu Sans", packaged_font().name],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "path",
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


def class_frequency(counts: NDArray[np.int64], kept: int, coverage: float | None) -> str:
    """counts: of each character, falling. kept: how many have a class of their own. coverage: the cut, if one made
    the classes.
    """

    def draw(axes: Any) -> None:
        axes.plot(np.arange(1, len(counts) + 1), np.cumsum(counts) / counts.sum(), color=COLOURS[0])
        if coverage is not None:
            axes.axhline(coverage, color=COLOURS[1], linewidth=1, linestyle="--")
        if kept:
            axes.axvline(kept, color=COLOURS[1], linewidth=1, linestyle="--")
            axes.annotate(f"{kept:,} classes", (kept, 0.03), (-4, 0), textcoords="offset points", ha="right")
        axes.set(
            xlabel="characters, the most frequent first", ylabel="share of all crops", xscale="log", ylim=(0, 1.02)
        )
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
        axes.legend()

    return _svg(draw, height=max(1.8, 1.0 + 0.24 * len(names)))


def box_sizes(boxes: NDArray[np.int32]) -> str:
    """boxes: (N, 4) x, y, width, height. The largest in two hundred are left out."""

    def draw(axes: Any) -> None:
        most = int(np.percentile(boxes[:, 2:], 99.5)) + 1
        for name, sides, colour in (("width", boxes[:, 2], COLOURS[0]), ("height", boxes[:, 3], COLOURS[1])):
            axes.hist(sides, bins=60, range=(0, most), histtype="step", label=name, color=colour, linewidth=1.5)
        axes.set(xlabel="pixels on the page", ylabel="boxes")
        axes.legend()

    return _svg(draw)

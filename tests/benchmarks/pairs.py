"""Two ways to do the same work, measured alternately, so that other load on the machine affects both."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

Rate = Callable[[], float]
"""Does the work once; returns its rate in units per second."""


@dataclass(frozen=True)
class Ratio:
    """One key of the JSON: the rates of our way and of the other."""

    key: str
    at_least: float
    ours: list[float]
    theirs: list[float]
    unit: str

    @property
    def ratio(self) -> float:
        """The median over the pairs."""
        return median(a / b for a, b in zip(self.ours, self.theirs, strict=True))


def compare(key: str, at_least: float, unit: str, ours: Rate, theirs: Rate, pairs: int) -> Ratio:
    """Measure both alternately, after one run of each that does not count."""
    ours()
    theirs()
    rates = [(ours(), theirs()) for _ in range(pairs)]
    return Ratio(key, at_least, [a for a, _ in rates], [b for _, b in rates], unit)

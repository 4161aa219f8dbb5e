"""Two ways of doing the same, measured in turns, so that what else the machine does meets both."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

Rate = Callable[[], float]
"""Does the work once; units of it a second."""


@dataclass(frozen=True)
class Ratio:
    """Of one key of the JSON: what our way does against what the other does."""

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
    """Alternate, after each was done once without being counted."""
    ours()
    theirs()
    rates = [(ours(), theirs()) for _ in range(pairs)]
    return Ratio(key, at_least, [a for a, _ in rates], [b for _, b in rates], unit)

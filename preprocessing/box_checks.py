"""Signs that boxes are wrong, which fail nothing: crops without ink, and many boxes that are partly off their page.

Boxes that were made for another size of a scan show paper.
"""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BaseModel, FailFast, Field, PositiveInt, model_validator
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from cluster.manifest import Count
from preprocessing.page_results import PageResult

# Share of a page's crops, or of all, see `crop.LEAST_CONTRAST`. On the real pages that were measured, it was 0.
MOST_WITHOUT_INK = 0.05
MOST_CLIPPED = 0.05  # share of the boxes
FEWEST_WITHOUT_INK = 2  # a single crop is not enough
LISTED_PAGES = 1000  # in a manifest
SHOWN_PAGES = 10  # in the log


class PageInk(TypedDict):
    """A page with too many crops without ink."""

    page: str
    crops: PositiveInt
    without_ink: Count


class InkCount(BaseModel):
    """The crops without the contrast of writing, see `crop.LEAST_CONTRAST`."""

    crops: Count = 0
    without_ink: Count = 0
    pages: Count = 0
    """Number of pages with too many such crops."""
    listed: Annotated[list[PageInk], FailFast()] = Field(default_factory=list)
    """The first of these pages."""

    @model_validator(mode="after")
    def _counts_some_of_the_crops(self) -> Self:
        if self.without_ink > self.crops:
            raise ValueError("the crops without ink must be some of all crops")
        return self


def count_ink(pages: Sequence[PageResult]) -> InkCount:
    """Count the crops without ink, and name the pages with too many."""
    faint = [page for page in pages if _are_too_many(page["without_ink"], page["crops"])]
    return InkCount(
        crops=sum(page["crops"] for page in pages),
        without_ink=sum(page["without_ink"] for page in pages),
        pages=len(faint),
        listed=[
            {"page": page["page"], "crops": page["crops"], "without_ink": page["without_ink"]}
            for page in faint[:LISTED_PAGES]
        ],
    )


def ink_line(count: InkCount) -> list[str]:
    """Return a line about the crops of all pages together, or no line if not too many are without ink."""
    if not _are_too_many(count.without_ink, count.crops):
        return []
    return [_line(f"the {count.crops:,} crops", count.without_ink, count.crops)]


def ink_lines(count: InkCount, shown: int = SHOWN_PAGES) -> list[str]:
    """Return `ink_line`, and a line for each page with too many crops without ink."""
    lines = ink_line(count)
    for page in count.listed[:shown]:
        lines.append(_line(f"the {page['crops']:,} crops of {page['page']}", page["without_ink"], page["crops"]))
    if count.pages > shown:
        lines.append(f"... and {count.pages - shown:,} more pages: see `ink` in manifest.json")
    return lines


def clipped_line(clipped: int, boxes: int) -> list[str]:
    """Return a line if so many boxes are partly off their page that they are probably wrong, else no line."""
    if not boxes or clipped <= max(1, MOST_CLIPPED * boxes):
        return []
    return [
        f"{100 * clipped / boxes:.0f} % of the {boxes:,} boxes are partly off their page: do the labels have right and "
        "lower edges instead of width and height?"
    ]


def _are_too_many(without_ink: int, crops: int) -> bool:
    return without_ink >= FEWEST_WITHOUT_INK and without_ink > MOST_WITHOUT_INK * crops


def _line(what: str, without_ink: int, crops: int) -> str:
    return f"{100 * without_ink / crops:.0f} % of {what} hold no ink: were the boxes made for another size?"

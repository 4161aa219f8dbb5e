"""Results of pages that were read, for reports of groups, `pages.parquet` and manifests."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import FailFast
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from cluster.manifest import Count


class PageResult(TypedDict):
    """The result of a page that was decoded."""

    page: str
    width: int
    """Pixels of the upright page, to which boxes refer."""
    height: int
    orientation: int
    """EXIF orientation of the file, 1 to 8, that was applied."""
    crops: int
    """Number of boxes that were cut."""
    without_ink: int
    """Number of these crops without the contrast of writing, see `crop.LEAST_CONTRAST`."""
    warnings: list[str]
    """What was mended in the file, or is unusual about it."""


class PageWarning(TypedDict):
    """A warning about a page, which was read nevertheless."""

    page: str
    what: str


# FailFast: see `preprocessing.dataset`.
PageWarnings = Annotated[list[PageWarning], FailFast()]
LISTED_WARNINGS = 10_000  # in a manifest
Ignored = Annotated[dict[str, Count], FailFast()]


def listed_warnings(pages: Sequence[PageResult], labels: Sequence[tuple[str, str]]) -> tuple[list[PageWarning], int]:
    """Return the first `LISTED_WARNINGS` warnings, and the number of the others.

    First come `labels`, which are `Labels.warnings`, then those of scans.
    """
    warnings: list[PageWarning] = [{"page": page_id, "what": what} for page_id, what in labels]
    warnings += [{"page": page["page"], "what": what} for page in pages for what in page["warnings"]]
    return warnings[:LISTED_WARNINGS], max(0, len(warnings) - LISTED_WARNINGS)

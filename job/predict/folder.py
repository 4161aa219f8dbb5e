"""The folder of predictions, whose format users rely on: tables, sealed by a manifest.

predictions-00000-of-00016.parquet ...   one row per box, in reading order
pages-00000-of-00016.parquet ...         one row per page: its text
manifest.json                            losses, accuracy, versions; written last
"""

from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, model_validator

from cluster.manifest import Count, Manifest
from preprocessing.box_checks import InkCount
from preprocessing.dataset import ClippedBoxes, Losses
from preprocessing.page_results import Ignored, PageWarnings


class PredictionsManifest(Manifest):
    """The manifest of a folder of predictions."""

    kind: Literal["predictions"] = "predictions"
    counts: Annotated[dict[str, Count], FailFast()]
    """Numbers of `boxes` and `pages` in the label files, of boxes that were `read`, and of boxes that were read but are
    `uncertain`: less probable than `min_confidence`; `rare`: the others that are `rare`.
    """
    min_confidence: float = Field(0.0, ge=0, le=1)
    """Minimum probability for texts and pictures to show a character; below it, they show 〓."""
    accuracy: Annotated[dict[str, int | float | None], FailFast()]
    """Over the boxes whose characters are in the label files; empty if there are none."""
    losses: Losses
    """Boxes that could not be read."""
    clipped: ClippedBoxes
    """Boxes partly off their page; the part on the page was read."""
    ignored: Ignored = Field(default_factory=dict)
    """Kind of file among the pages that is not read, to number of such files."""
    warnings: PageWarnings = Field(default_factory=list)
    """The first `LISTED_WARNINGS` warnings about pages, from the labels and from the scans that were read."""
    more_warnings: Count = 0
    """Number of further warnings."""
    ink: InkCount = InkCount()
    config: dict[str, Any] = Field(default_factory=dict)
    """The options that change the tables, and whether pictures were drawn; empty in folders of earlier releases."""
    model_manifest_sha256: str
    fingerprint: str
    """Hex digest of the labels' input and of the ids and sizes of the pages, see `preprocessing.pages.fingerprint`."""
    versions: Annotated[dict[str, str], FailFast()]

    @model_validator(mode="after")
    def _counts_boxes_and_pages(self) -> Self:
        if missing := {"boxes", "pages", "read"} - self.counts.keys():
            raise ValueError(f"the counts must have {', '.join(sorted(missing))}")
        return self


def table_name(kind: str, group: int, groups: int, form: str) -> str:
    """Return the file name of a group's table. kind: `predictions` or `pages`. form: `parquet` or `csv`."""
    return f"{kind}-{group:05d}-of-{groups:05d}.{form}"

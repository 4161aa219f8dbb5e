"""Configuration of `prepare`: command line -> `PrepareConfig` -> `manifest.json` of the dataset."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

SPLITS = ("train", "validation", "test")


class PrepareConfig(BaseModel):
    """Options of `prepare`. All but `max_bad_fraction` determine the bytes of the dataset, with pages and labels.

    The docstring of a field is the `--help` text of its option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    split: Literal["random", "page", "book"] = "random"
    """Unit of the split: box (random; optimistic), page, or book (recommended)."""
    seed: int = Field(42, ge=0)
    """Random seed of the split."""
    val_fraction: float = Field(0.15, gt=0, lt=1)
    """Fraction of the boxes for validation."""
    test_fraction: float = Field(0.15, gt=0, lt=1)
    """Fraction of the boxes for the test."""
    coverage: float = Field(0.9, ge=0, le=1)
    """Most frequent characters get a class, up to this fraction of the boxes; the others are `rare`."""
    classes: list[str] | None = None
    """label.labels.txt of an earlier dataset, to use its classes."""
    shards: PositiveInt | None = None
    """Largest number of files per split.  [default: by size]"""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Fraction of boxes that may be lost."""

"""Configuration of `prepare`: command line -> `PrepareConfig` -> `manifest.json` of the dataset."""

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_serializer, model_validator

from cluster.errors import OptionError

SPLITS = ("train", "validation", "test")


def is_license(value: object) -> bool:
    """Return whether a value is None, or an identifier of a licence, in the small letters of Hugging Face's."""
    return value is None or (isinstance(value, str) and re.fullmatch(r"[a-z0-9][a-z0-9.\-]{0,49}", value) is not None)


class _OptionFile(BaseModel):
    """A file that an option names. The config of a dataset records its SHA-256: it may be large."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str

    @model_serializer
    def _recorded(self) -> str:
        return self.sha256


class BooksFile(_OptionFile):
    """The file of `--books`, see `books.read_books`."""

    by: Literal["page", "prefix"]
    """Whether a line names a page, or all pages whose ids begin with a prefix."""
    books: dict[str, str]
    """Page id or prefix to book."""


class TrainOnlyFile(_OptionFile):
    """The file of `--train-only`, see `books.read_train_only`."""

    names: frozenset[str]
    """Ids of pages, or books."""


class PrepareConfig(BaseModel):
    """Options of `prepare`. All but `license` and `max_bad_fraction` determine the bytes of shards and tables.

    The docstring of a field is the `--help` text of its option. An option that a dataset of an earlier release may lack
    is None by default, also a flag, or has the value of that release in `Attempts.new_options`: a missing key counts as
    None when options are compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    split: Literal["random", "page", "book"] = "random"
    """Unit of the split: box (random; optimistic), page, or book (recommended)."""
    books: BooksFile | None = None
    """CSV of page,book or prefix,book.  [default: from folders and ids]"""
    seed: int = Field(42, ge=0)
    """Random seed of the split."""
    val_fraction: float = Field(0.15, gt=0, lt=1)
    """Fraction of the boxes for validation."""
    test_fraction: float = Field(0.15, gt=0, lt=1)
    """Fraction of the boxes for the test."""
    folds: int | None = Field(None, ge=3)
    """Number of folds, instead of fractions; with --split book or page."""
    fold: int | None = Field(None, ge=0)
    """Index of the test fold, from 0; the next one is validation."""
    train_only: TrainOnlyFile | None = None
    """Pages or books for training only, one per line."""
    coverage: float = Field(0.9, ge=0, le=1)
    """Frequent characters get a class, up to this fraction of boxes."""
    classes: list[str] | None = None
    """label.labels.txt of an earlier dataset, to use its classes."""
    shards: PositiveInt | None = None
    """Largest number of files per split.  [default: by size]"""
    rescale: bool | None = None
    """Scale boxes that were made for another page size, if the labels state it."""
    margin: float = Field(0.0, ge=0, le=1)
    """Widen boxes on each side by this fraction of their longer side."""
    license: str | None = None
    """Licence of the pages, such as cc-by-sa-4.0, for the cards."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Fraction of boxes that may be lost."""

    @field_validator("license")
    @classmethod
    def _is_an_identifier(cls, value: str | None) -> str | None:
        """Return the licence in small letters.

        Raises:
            OptionError: it is no identifier.
        """
        lowered = value.lower() if value else value  # SPDX has capitals
        if not is_license(lowered):
            raise OptionError(
                "--license must be an identifier of letters, digits, '.' and '-', such as cc-by-sa-4.0. Received: "
                f"{value!r}"
            )
        return lowered

    @model_validator(mode="after")
    def _splits_fit(self) -> Self:
        """Check the options of the split together.

        Raises:
            OptionError: the fractions leave nothing to train on; one of the options of folds is missing; the fold is
                none of the folds, or the split is one that folds do not go with.
        """
        if self.folds is None and self.fold is None:
            if (total := self.val_fraction + self.test_fraction) >= 1:
                raise OptionError(
                    f"--val-fraction and --test-fraction must leave boxes to train on. Received: {total:g} in all"
                )
            return self
        if self.folds is None or self.fold is None:
            alone = "--folds" if self.fold is None else "--fold"
            raise OptionError(f"--folds and --fold must be given together. Received: {alone} alone. Give both")
        if self.fold >= self.folds:
            raise OptionError(
                f"--fold must be one of 0 to --folds - 1. Received: --folds {self.folds}, --fold {self.fold}"
            )
        if self.split == "random":
            raise OptionError(
                "--folds must be whole books or pages. Received: --split random. Give --split book or page"
            )
        if fractions := self.model_fields_set & {"val_fraction", "test_fraction"}:
            option = "--" + min(fractions).replace("_", "-")
            raise OptionError(f"--folds must be given without fractions. Received: {option}. Leave it out")
        return self

"""Exceptions for failures whose cause is outside the code.

KuzushijiError      base class; the command line prints its message in one line and exits with 1
├── OptionError     options contradict one another or the files they name; exits with 2
├── InputError      labels, pages or a dataset can't be used as they are
└── DamageError     a folder does not match its manifest

Messages state the rule, then what was received, then the fix and, where there is one, the page of docs/ that helps.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class KuzushijiError(Exception):
    """Base class of failures that the user can fix."""


def one_line(error: BaseException) -> str:
    """Return the message of an exception as one line.

    Types other than KuzushijiError and OSError are unexpected: their message starts with the type's name and ends with
    a hint at `--debug`.
    """
    text = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return text if isinstance(error, KuzushijiError | OSError) else f"{type(error).__name__}: {text} (see --debug)"


def without_secrets(text: str) -> str:
    """Return a text without the ids of upload sessions, with which anybody can write the object."""
    return re.sub(r"upload_id=[^&\s:)'\"]+", "upload_id=...", text)


def squeezed(text: object, most: int) -> str:
    """Return the first `most` characters of a text, or of an exception's message, on one line."""
    return " ".join(str(text).split())[:most]


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun, such as `1 book` and `1,200 boxes`. many: the plural, if not `one` and an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


class OptionError(KuzushijiError):
    """Raised when options contradict one another or the files and folders they name."""

    @classmethod
    def of(cls, error: "ValidationError") -> "OptionError":
        """Convert the first error of a pydantic config; the field is named as on the command line."""
        first = error.errors()[0]
        option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        return cls(f"{option}: {first['msg'].lower()}. Received: {first['input']!r}")


class InputError(KuzushijiError):
    """Raised when labels, pages or a dataset can't be used as they are."""


class DamageError(KuzushijiError):
    """Raised when a file is missing, truncated or changed since its folder was sealed."""

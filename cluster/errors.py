"""What can go wrong for reasons outside the code, in one tree.

KuzushijiError      anything below; the command line prints it in one line and exits with 1
├── OptionError     what was asked contradicts itself or what is there; exits with 2
├── InputError      labels, pages or a dataset can't be used as they are
└── DamageError     a folder is not what its manifest says

Messages: first the rule, then what came, then how to mend it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class KuzushijiError(Exception):
    """A failure with a cause that the user can mend."""


def one_line(error: BaseException) -> str:
    """What people read of a failure; of one that is no fault of theirs, its kind too."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, KuzushijiError | OSError) else f"{type(error).__name__}: {text} (see --debug)"


class OptionError(KuzushijiError):
    """You meet it when options contradict one another or what they point to."""

    @classmethod
    def of(cls, error: "ValidationError") -> "OptionError":
        """The first complaint of a pydantic config, named as on the command line."""
        first = error.errors()[0]
        option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        return cls(f"{option}: {first['msg'].lower()}. Received: {first['input']!r}")


class InputError(KuzushijiError):
    """You meet it when labels, pages or a dataset can't be used as they are."""


class DamageError(KuzushijiError):
    """You meet it when a file is missing, cut off or changed after its folder was sealed."""

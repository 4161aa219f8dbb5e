"""What stands beside sealed folders, only to be looked at: when it can't be written, nothing else is lost."""

import logging
from collections.abc import Callable
from contextlib import suppress

from upath import UPath

from cluster.errors import one_line
from cluster.storage import remove_file, write_bytes

REPORT_SUFFIX = ".report.html"

log = logging.getLogger("kuzushiji")


def report_file(folder: UPath) -> UPath:
    return folder.parent / f"{folder.name}{REPORT_SUFFIX}"


def write_beside(target: UPath, make: Callable[[], bytes], say: Callable[[str], object]) -> bool:
    """Write what `make` makes, and tell whether it is there; of a failure of any kind, `say` is called with a line."""
    try:
        write_bytes(target, make())
    except Exception as error:
        say(f"{target} could not be written: {one_line(error).removesuffix(' (see --debug)')}")
        log.debug("where:", exc_info=error)
        with suppress(Exception):
            remove_file(target)  # an earlier one may tell of something else
        return False
    return True

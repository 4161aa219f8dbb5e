"""Side files: reports and curves next to sealed folders. A failure to write one is logged, and nothing else fails."""

import logging
from collections.abc import Callable
from contextlib import suppress

from upath import UPath

from cluster.errors import one_line
from cluster.storage import remove_file, write_bytes

REPORT_SUFFIX = ".report.html"

log = logging.getLogger("kuzushiji")


def report_file(folder: UPath) -> UPath:
    """Return the path of the report of a sealed folder."""
    return folder.parent / f"{folder.name}{REPORT_SUFFIX}"


def write_side_file(target: UPath, make: Callable[[], bytes], warn: Callable[[str], object]) -> bool:
    """Write the bytes that `make` returns. Return False if `make` or writing fails.

    No exception is raised. On failure, `warn` is called with one line, the traceback is logged at debug level, and an
    existing `target` is removed.
    """
    try:
        write_bytes(target, make())
    except Exception as error:
        warn(f"{target} could not be written: {one_line(error).removesuffix(' (see --debug)')}")
        log.debug("traceback:", exc_info=error)
        with suppress(Exception):
            remove_file(target)  # an earlier version may be outdated
        return False
    return True

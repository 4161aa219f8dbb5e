"""Progress of all commands: a bar on a terminal, a log line every 10 seconds elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Timer
from typing import TYPE_CHECKING, TextIO

from cluster.errors import without_secrets

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0

log = logging.getLogger("kuzushiji")


def on_terminal() -> bool:
    return sys.stderr.isatty()


def _standard_error() -> TextIO:
    """Return a duplicate of standard error, which stays visible while that is redirected (while TensorFlow loads).

    Raises:
        OSError, AttributeError: standard error is no file; a caller has replaced it.
    """
    return os.fdopen(os.dup(sys.stderr.fileno()), "w", 1, sys.stderr.encoding, sys.stderr.errors)


@cache
def terminal() -> "Console":
    """Return the console that bars and log lines share, so that they do not overwrite one another."""
    from rich.console import Console

    return Console(file=_standard_error(), highlight=False)


def log_to_stderr(debug: bool = False) -> None:
    """Send the package's log to standard error: above the bar on a terminal, with the time of day elsewhere.

    Args:
        debug: include debug messages, such as tracebacks of failures that do not end the command.
    """
    if on_terminal():
        lines: logging.Handler = _TerminalHandler()
        lines.setFormatter(_WithoutSecrets())
    else:
        try:
            lines = logging.StreamHandler(_standard_error())
        except (OSError, AttributeError):
            lines = logging.StreamHandler(sys.stderr)
        lines.setFormatter(_WithoutSecrets("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers = [lines]
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        terminal().print(self.format(record), markup=False)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show a spinner with the text `what` on a terminal while the block runs; elsewhere, log it after 10 seconds."""
    if not on_terminal():
        timer = Timer(SECONDS_BETWEEN_LINES, log.info, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        return
    from rich.live import Live
    from rich.spinner import Spinner

    # Not `Console.status`, which first draws in its thread: a log line at that moment leaves a second spinner.
    with Live(
        Spinner("dots", what, style="status.spinner"), console=terminal(), refresh_per_second=12.5, transient=True
    ):
        yield


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show the progress of `what`. The block calls the yielded function with the number of newly finished `unit`s."""
    if on_terminal():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=terminal(), transient=True) as bars:
            task = bars.add_task(what, total=total)
            yield lambda n: bars.advance(task, n)
        return

    done, last = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: %d of %d %s", what, done, total, unit)

    yield advance

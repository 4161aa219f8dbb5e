"""Limit how many processes may die at the same page, because it needs too much memory or crashes the decoder.

If a process dies, Ray Data runs its task again, without limit: `max_retries`, `max_restarts` and `max_task_retries` are
-1. A limit there would also count lost machines, and could not name the page. So each group has a note next to its
results. The first process that works on a group writes the note once. A process that finds a note knows that another
process died in this group, and from then on records in the note which page it works on.
"""

from typing import Self

from pydantic import BaseModel
from upath import UPath

from cluster.errors import InputError
from cluster.storage import TEMPORARY_PREFIX, read_bytes, remove_file, write_bytes
from preprocessing.groups import Group

MOST_DEATHS = 3
# Steps of a group other than pages: before the first page, after the last one is cut, and the tables of `predict`. Each
# occurs once, and the next step removes its count of deaths.
START, END, TABLES = "(start)", "(end)", "(tables)"


class _Note(BaseModel):
    """What the next process must know if this one dies."""

    at: str | None = None
    """The current step: the id of a page, the name of its picture, or one of the steps above; None: not recorded."""
    deaths: dict[str, int] = {}
    """Step to number of processes that died at it. A step that a process finished has no entry."""


class Tries:
    """Counts the processes that died while they worked on a group, in one attempt of the command.

    As a context manager, it removes the note when the block ends or raises, since then the process did not die.
    """

    def __init__(self, group: Group, folder: UPath, attempt: str) -> None:
        """Read the note of the group, or write one.

        Args:
            group: the group that this process works on.
            folder: folder of the note, which has the name of a temporary file.
            attempt: identifies the attempt; notes of other attempts are ignored.

        Raises:
            InputError: `MOST_DEATHS` processes died before the first page.
            KuzushijiError: the folder is full, read-only or missing.
        """
        self.pages = f"{group.page_ids[0]} to {group.page_ids[-1]}"
        self.path = folder / f"{TEMPORARY_PREFIX}{attempt}-{group.number:05d}"
        self.folder = folder
        self.note = _Note()
        try:
            self.note = _Note.model_validate_json(read_bytes(self.path))
        except FileNotFoundError:
            self.is_first = True
            self._write()
            return
        self.is_first = False
        if (at := self.note.at) is not None:
            self.note.deaths[at] = self.note.deaths.get(at, 0) + 1
        self.note.at = None
        self.begin(START)

    def begin(self, step: str) -> None:
        """Record that the step before is finished and that `step` begins.

        Args:
            step: the id of a page, the name of its picture, or `START`, `END` or `TABLES`.

        Raises:
            InputError: `MOST_DEATHS` processes died at this step, and none finished it.
            KuzushijiError: as the constructor.
        """
        if self.is_first:
            return
        if self.note.at is not None:
            self.note.deaths.pop(self.note.at, None)
        self.note.at = step
        if (deaths := self.note.deaths.get(step, 0)) >= MOST_DEATHS:
            where = self.pages if step in (START, END, TABLES) else step
            raise InputError(
                f"no page may end the process that works on it. Received: {where}, where {deaths} "
                "processes ended (out of memory, or a crash in the decoder). Use machines with more memory for each "
                "CPU and run the same command again, or repair or remove the page and name a new folder. "
                "See docs/faq.md"
            )
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception | KeyboardInterrupt):  # the latter: Ray cancels the task
            remove_file(self.path)

    def _write(self) -> None:
        write_bytes(self.path, self.note.model_dump_json().encode(), within=self.folder)

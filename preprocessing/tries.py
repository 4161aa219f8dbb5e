"""Bound how many processes a page may end: by its need of memory, or by a crash of the decoder.

Ray Data runs a task whose process died again, without limit: `max_retries`, `max_restarts` and `max_task_retries` are
-1. A limit there would count lost machines too, and could not name the page. So each group has a note next to its
results. The first process that works on a group writes the note once. A process that finds one knows that another
process died in this group, and from then on the note says which page is worked on.
"""

from typing import Self

from pydantic import BaseModel
from upath import UPath

from cluster.errors import InputError
from cluster.storage import TEMPORARY_PREFIX, read_bytes, remove_file, write_bytes
from preprocessing.groups import Group

MOST_DEATHS = 3
# Steps of a group that are no pages: before the first one, after the last one is cut, and the tables of `predict`. Each
# comes once: the step after it erases how many processes died at it.
START, END, TABLES = "(start)", "(end)", "(tables)"


class _Note(BaseModel):
    """What the next process must know if this one dies."""

    at: str | None = None
    """The step that is worked on: the id of a page or its picture, or one of the above; None: not written down."""
    deaths: dict[str, int] = {}
    """Step to number of processes that died at it. A step that a process finished has no entry."""


class Tries:
    """Counts the processes that died while they worked on a group, in one attempt of the command.

    As a context manager it removes the note when the block ends or raises: neither is the death of a process.
    """

    def __init__(self, group: Group, folder: UPath, attempt: str) -> None:
        """Read the note of the group, or write one.

        Args:
            group: the group that this process works on.
            folder: folder of the note, where it counts as a temporary file.
            attempt: identifies the attempt; the notes of others do not count.

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
        """Note the step that is worked on from now on, and that the one before it is done.

        step: the id of a page or its picture, or one that is no page.

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
        if kind is None or issubclass(kind, Exception | KeyboardInterrupt):  # the latter cancels a task of Ray
            remove_file(self.path)

    def _write(self) -> None:
        write_bytes(self.path, self.note.model_dump_json().encode(), within=self.folder)

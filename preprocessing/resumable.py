"""A folder that `prepare` or `predict` writes group by group, and that the same command finishes after a kill.

Until the folder is sealed, a hidden folder in it contains:

plan.json             the identity of the job: everything that the bytes depend on; another job is refused
group-00000.json ...  the report of each finished group, with the files that it wrote; the next attempt skips the group

The files of `group_files.py`, temporary files, and the notes of `tries.py` are there, too. Tasks do not create the
hidden folder, so that a task that outlives its command adds nothing to a sealed folder.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from upath import UPath

from cluster.errors import DamageError
from cluster.manifest import FileEntry, is_sealed
from cluster.storage import (
    is_file,
    read_bytes,
    remove_file,
    remove_folder,
    remove_temporaries,
    sha256_of,
    size_of,
    write_bytes,
)
from preprocessing.dataset import Loss
from preprocessing.group_files import read_group
from preprocessing.groups import Group
from preprocessing.tries import Tries

PLAN_FILE = "plan.json"


class Report(BaseModel, ABC):
    """The result of a group."""

    losses: list[Loss]
    """The boxes of the group that were lost."""

    @property
    @abstractmethod
    def entries(self) -> Sequence[FileEntry]:
        """The files that the group wrote into the folder."""


ReportT = TypeVar("ReportT", bound=Report)


@dataclass(frozen=True)
class Resumable:
    """A folder that is written group by group."""

    folder: UPath
    hidden: str
    """Name of the hidden folder."""
    option: str
    """The option that names the folder, for error messages."""

    @property
    def progress_folder(self) -> UPath:
        """The hidden folder."""
        return self.folder / self.hidden

    @property
    def plan_file(self) -> UPath:
        return self.progress_folder / PLAN_FILE

    # --- the command

    def forget_losses(self, reports: Sequence[Report]) -> None:
        """Remove the reports of groups with losses. The next attempt repeats them: their pages may be readable then."""
        for number, report in enumerate(reports):
            if report.losses:
                remove_file(self.report_path(number))

    def remove_traces(self) -> bool:
        """Remove what attempts leave in a sealed folder: the hidden folder, and temporary files of killed attempts.

        Return False, and remove nothing, if the folder is not sealed: another attempt has just begun to repair it. A
        folder with neither plan nor manifest would be refused, and another attempt that loses a file which it writes
        accepts only a sealed folder.
        """
        if not is_sealed(self.folder):
            return False
        for _ in range(2):  # a task of a killed attempt may still add a file during the removal
            remove_folder(self.progress_folder)
        remove_temporaries(self.folder)
        return True

    # --- its tasks

    def report_path(self, group: int) -> UPath:
        return self.progress_folder / f"group-{group:05d}.json"

    def finished_report(self, group: int, form: type[ReportT]) -> ReportT | None:
        """Return the report of a group, or None if the work on the group must be repeated.

        None: the report is missing or malformed, or one of its files is missing or has another size or SHA-256.
        """
        try:
            report = form.model_validate_json(read_bytes(self.report_path(group)))
            for entry in report.entries:  # no listing of the folder: it has the files of all groups
                path = self.folder / entry.name
                if size_of(path) != entry.bytes or sha256_of(path) != entry.sha256:
                    return None
        except (FileNotFoundError, ValidationError):
            return None
        return report

    def report_of(
        self,
        number: int,
        attempt: str,
        form: type[ReportT],
        work: Callable[[Group, Callable[[str], None]], ReportT],
        is_whole: Callable[[ReportT], bool] = lambda _: True,
    ) -> ReportT:
        """Return the report of a group. Do its work and write the report, unless an earlier attempt has done so.

        Args:
            number: number of the group.
            attempt: identifies the attempt of the command, see `Tries` and `write_groups`.
            form: class of the report.
            work: called with the group and with `Tries.begin`, to which it passes the step that it begins.
            is_whole: called with the report of an earlier attempt; returns whether this command can use it.

        Raises:
            DamageError: the folder has no plan: it was removed, or this worker sees another folder. Or the file of the
                group is damaged.
            InputError: too many processes died at the same page.
            KuzushijiError: the folder is full, read-only or missing.
        """
        if not is_file(self.plan_file):  # in a bucket, writing would recreate the folder
            raise self._without("its plan")
        report = self.finished_report(number, form)
        if report is not None and is_whole(report):
            return report
        try:
            group = read_group(self.progress_folder, attempt, number)
        except FileNotFoundError as error:
            raise self._without("the groups of pages of this attempt") from error
        with Tries(group, self.progress_folder, attempt) as tries:
            report = work(group, tries.begin)
            write_bytes(self.report_path(number), report.model_dump_json().encode(), within=self.progress_folder)
        return report

    def _without(self, what: str) -> DamageError:
        return DamageError(
            f"{self.option} must not be removed while it is written, and must be a folder that all workers share. "
            f"Received: {self.folder}, without {what}. Run the same command again"
        )

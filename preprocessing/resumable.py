"""A folder that `prepare` or `predict` writes group by group, and that the same command finishes after a kill.

Until the folder is sealed, a hidden folder in it contains:

plan.json             the identity of the job: everything that the bytes depend on; another job is refused
group-00000.json ...  the report of each finished group, with the files that it wrote; the next attempt skips the group

The files of `groups.py`, temporary files, and the notes of `tries.py` are there, too. Tasks do not create the hidden
folder, so that a task that outlives its command adds nothing to a sealed folder.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from upath import UPath

from cluster.errors import DamageError, OptionError
from cluster.manifest import MANIFEST_FILE, FileEntry, ManifestT, is_sealed
from cluster.storage import (
    change_bytes,
    is_file,
    list_files,
    list_folders,
    read_bytes,
    remove_file,
    remove_folder,
    remove_temporaries,
    sha256_of,
    size_of,
    write_bytes,
)
from preprocessing.dataset import Loss
from preprocessing.groups import Group, read_group
from preprocessing.tries import Tries

PLAN_FILE = "plan.json"

log = logging.getLogger("kuzushiji")


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
    new_options: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the identity that earlier releases did not record, with the values that those releases used."""

    @property
    def progress(self) -> UPath:
        """The hidden folder."""
        return self.folder / self.hidden

    @property
    def plan(self) -> UPath:
        return self.progress / PLAN_FILE

    # --- the command

    def accept_or_begin(
        self,
        identity: dict[str, Any],
        sealed: Callable[[], tuple[ManifestT, list[str]]],
        repair: Callable[[ManifestT], None],
    ) -> ManifestT | None:
        """Return the manifest if the folder is complete and valid. Otherwise prepare the folder for (more) work.

        Args:
            identity: identity of the job, as JSON. Equal identities give equal bytes.
            sealed: returns the manifest of the sealed folder and the faults of its files, one line each; raises if the
                folder belongs to another job.
            repair: called with the manifest of a folder with faults. Refuses versions that may give other bytes, and
                recreates the reports of groups where the manifest has what they need.

        Raises:
            OptionError: the folder is neither empty nor of the same job.
            DamageError: the plan is damaged.
        """
        # In this order: a concurrent attempt writes its plan first and removes it after it has written the manifest.
        # Folders of the file system itself, such as `lost+found` and `.snapshot`, do not count.
        folders = [name for name in list_folders(self.folder) if not name.startswith(".") and name != "lost+found"]
        others = [*list_files(self.folder), *folders]
        has_plan = is_file(self.plan)
        if is_sealed(self.folder):
            manifest, faults = sealed()
            if not faults:
                return manifest
            repair(manifest)
            log.warning("%s: %s; damaged files are recreated", self.folder, "; ".join(faults))
            self._unseal(identity)
        elif others and not has_plan:
            raise OptionError(
                f"{self.option} must be a new or empty folder, or one of the same job. Received: {self.folder}, with "
                f"{sorted(others)[0]}. Name another folder or empty it. See docs/faq.md"
            )
        else:
            self._write_plan_once(identity)
            if is_sealed(self.folder):  # by a concurrent attempt, after the check above
                return self.accept_or_begin(identity, sealed, repair)
        return None

    def _unseal(self, identity: dict[str, Any]) -> None:
        write_bytes(self.plan, json.dumps(identity).encode())
        remove_file(self.folder / MANIFEST_FILE)

    def _write_plan_once(self, identity: dict[str, Any]) -> None:
        """Write the plan, unless there is an equal one. Raises: OptionError, DamageError as `accept_or_begin`."""

        def changed(old: bytes | None) -> bytes | None:
            if old is None:
                return json.dumps(identity).encode()
            self.refuse_other(self._parsed(old), identity)
            return None

        change_bytes(self.plan, changed)

    def refuse_other(self, earlier: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Raise OptionError if `earlier`, the identity of an earlier attempt, differs."""
        there, now = dict(self.new_options) | _flat(earlier), _flat(identity)
        differing = [key for key, value in now.items() if there.get(key) != value]
        if differing:
            differences = ", ".join(f"{k} (was {str(there.get(k))[:40]}, now {str(now[k])[:40]})" for k in differing)
            raise OptionError(
                f"{self.option} must be a new folder, or one made with the same options and input. Received: "
                f"{self.folder}, where these differ: {differences}. Name another folder or remove it. See docs/faq.md"
            )

    def _parsed(self, plan: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(plan)
            if not isinstance(parsed, dict):
                raise ValueError("it is not an object")
        except ValueError as error:
            raise DamageError(
                f"{self.plan} must be a JSON object. Received: {error}. Remove {self.folder} and run the same command "
                "again"
            ) from error
        return parsed

    def sealed_by_another(self, sealed: Callable[[], tuple[ManifestT, list[str]]]) -> ManifestT | None:
        """Return the manifest if another attempt has sealed the folder, and all files are right; otherwise None.

        Call it when an attempt fails: once a folder is sealed, the files of other attempts are removed. sealed: as in
        `accept_or_begin`.
        """
        if not is_sealed(self.folder):
            return None
        manifest, faults = sealed()
        return None if faults else manifest

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
            remove_folder(self.progress)
        remove_temporaries(self.folder)
        return True

    # --- its tasks

    def report_path(self, group: int) -> UPath:
        return self.progress / f"group-{group:05d}.json"

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
        if not is_file(self.plan):  # in a bucket, writing would recreate the folder
            raise self._without("its plan")
        report = self.finished_report(number, form)
        if report is not None and is_whole(report):
            return report
        try:
            group = read_group(self.progress, attempt, number)
        except FileNotFoundError as error:
            raise self._without("the groups of pages of this attempt") from error
        with Tries(group, self.progress, attempt) as tries:
            report = work(group, tries.begin)
            write_bytes(self.report_path(number), report.model_dump_json().encode(), within=self.progress)
        return report

    def _without(self, what: str) -> DamageError:
        return DamageError(
            f"{self.option} must not be removed while it is written, and must be a folder that all workers share. "
            f"Received: {self.folder}, without {what}. Run the same command again"
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with a key for each package, instead of `versions`."""
    versions = identity.get("versions")
    return {key: value for key, value in identity.items() if key != "versions"} | {
        f"version of {package}": version
        for package, version in (versions if isinstance(versions, dict) else {}).items()
    }

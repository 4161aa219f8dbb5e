"""Attempts of one job to write a `Resumable` folder: keep a complete one, finish or repair it, or refuse another job's.

The first attempt writes the identity of the job to `plan.json`, a file of the hidden folder; the next one compares it.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

from cluster.errors import DamageError, OptionError
from cluster.manifest import MANIFEST_FILE, ManifestT, faults_of, is_sealed, read_manifest
from cluster.storage import change_bytes, is_file, list_files, list_folders, remove_file, write_bytes
from preprocessing.resumable import Resumable

log = logging.getLogger("kuzushiji")


@dataclass(frozen=True)
class Attempts(Generic[ManifestT]):
    """The attempts of one job. Those of another job are refused."""

    at: Resumable
    """The folder."""
    form: type[ManifestT]
    """The class of its manifest."""
    identity: dict[str, Any]
    """All that the bytes of the files depend on, as JSON; the library versions under `versions`."""
    identity_of: Callable[[ManifestT], dict[str, Any]]
    """Returns the identity of the job that sealed a folder, from its manifest."""
    check: Callable[[ManifestT], None] = lambda _: None
    """Raises if the manifest of this job has something wrong."""
    new_options: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the identity that earlier releases did not record, with the values that those releases used."""

    def accept_or_make(
        self, make: Callable[[], ManifestT], restore: Callable[[ManifestT], None] = lambda _: None
    ) -> tuple[ManifestT, bool]:
        """Return the manifest, and whether this attempt made the folder (False: it was already complete and valid).

        Args:
            make: does the work that is left, seals the folder and returns its manifest. If it fails because another
                attempt has sealed the folder, which removes the files of all attempts, that one's manifest is returned.
            restore: called with the manifest of a folder with damaged files, before it is unsealed. Recreates the
                reports of groups, where the manifest has what they need.

        Raises:
            OptionError: the folder is neither empty nor of the same job; or files are damaged, and other versions of
                the libraries may give other bytes.
            DamageError: the plan or the manifest is damaged.
            Exception: whatever `make` raised.
        """
        manifest = self._accept_or_begin(restore)
        if manifest is not None:
            return manifest, False
        try:
            return make(), True
        except Exception:
            manifest = self._sealed_by_another()
            if manifest is None:
                raise
            return manifest, False

    def _accept_or_begin(self, restore: Callable[[ManifestT], None]) -> ManifestT | None:
        """Return the manifest if the folder is complete and valid. Otherwise prepare the folder for (more) work."""
        folder = self.at.folder
        # In this order: a concurrent attempt writes its plan first and removes it after it has written the manifest.
        # Folders of the file system itself, such as `lost+found` and `.snapshot`, do not count.
        folders = [name for name in list_folders(folder) if not name.startswith(".") and name != "lost+found"]
        others = [*list_files(folder), *folders]
        has_plan = is_file(self.at.plan_file)
        if is_sealed(folder):
            manifest, faults = self._sealed()
            if not faults:
                return manifest
            self._refuse_other(self.identity_of(manifest))
            restore(manifest)
            log.warning("%s: %s; damaged files are recreated", folder, "; ".join(faults))
            write_bytes(self.at.plan_file, json.dumps(self.identity).encode())
            remove_file(folder / MANIFEST_FILE)
        elif others and not has_plan:
            raise OptionError(
                f"{self.at.option} must be a new or empty folder, or one of the same job. Received: {folder}, with "
                f"{sorted(others)[0]}. Name another folder or empty it. See docs/faq.md"
            )
        else:
            self._write_plan_once()
            if is_sealed(folder):  # by a concurrent attempt, after the check above
                return self._accept_or_begin(restore)
        return None

    def _sealed_by_another(self) -> ManifestT | None:
        """Return the manifest if another attempt has sealed the folder, and all files are right; otherwise None."""
        if not is_sealed(self.at.folder):
            return None
        manifest, faults = self._sealed()
        return None if faults else manifest

    def _sealed(self) -> tuple[ManifestT, list[str]]:
        """Return the manifest of the sealed folder, and the faults of its files, one line each.

        Raises:
            OptionError: the folder belongs to another job, apart from its library versions.
            DamageError: the manifest is damaged.
        """
        folder = self.at.folder
        manifest = read_manifest(folder, self.form)
        self._refuse_other(self.identity_of(manifest) | {"versions": self.identity["versions"]})
        self.check(manifest)
        return manifest, faults_of(folder, manifest, list_files(folder))

    def _write_plan_once(self) -> None:
        """Write the plan, unless there is an equal one. Raises: OptionError, DamageError as `accept_or_make`."""

        def changed(old: bytes | None) -> bytes | None:
            if old is None:
                return json.dumps(self.identity).encode()
            self._refuse_other(self._parsed(old))
            return None

        change_bytes(self.at.plan_file, changed)

    def _refuse_other(self, earlier: Mapping[str, Any]) -> None:
        """Raise OptionError if `earlier`, the identity of an earlier attempt, differs."""
        there, now = dict(self.new_options) | _flat(earlier), _flat(self.identity)
        differing = [key for key, value in now.items() if there.get(key) != value]
        if differing:
            differences = ", ".join(f"{k} (was {str(there.get(k))[:40]}, now {str(now[k])[:40]})" for k in differing)
            raise OptionError(
                f"{self.at.option} must be a new folder, or one made with the same options and input. Received: "
                f"{self.at.folder}, where these differ: {differences}. Name another folder or remove it. "
                "See docs/faq.md"
            )

    def _parsed(self, plan: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(plan)
            if not isinstance(parsed, dict):
                raise ValueError("it is not an object")
        except ValueError as error:
            raise DamageError(
                f"{self.at.plan_file} must be a JSON object. Received: {error}. Remove {self.at.folder} and run the "
                "same command again"
            ) from error
        return parsed


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with a key for each package, instead of `versions`."""
    versions = identity.get("versions")
    return {key: value for key, value in identity.items() if key != "versions"} | {
        f"version of {package}": version
        for package, version in (versions if isinstance(versions, dict) else {}).items()
    }

"""The layout of a folder of models: `<models>/<architecture>/<run>/`, and `<models>/<architecture>/latest.json`.

`latest.json` points to the run that finished last.
"""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ValidationError, field_validator
from upath import UPath

from cluster.errors import DamageError, InputError
from cluster.manifest import MANIFEST_FILE, Manifest, complaint, is_sealed, read_manifest
from cluster.places import plain_name
from cluster.storage import change_bytes, is_file, list_files, list_folders, read_small

LATEST_FILE = "latest.json"
MAX_LATEST_BYTES = 10_000
MOST_AHEAD = timedelta(hours=1)  # of the clock of another machine


class ModelManifest(Manifest):
    """The manifest of a model folder. `job.model.folder` writes it."""

    kind: Literal["model"] = "model"
    dataset_manifest_sha256: str
    """SHA-256 of the manifest of the dataset that the model was trained on."""
    finished_at: AwareDatetime


class Latest(BaseModel):
    """The content of `latest.json`: the run of an architecture that finished last."""

    run: str
    finished_at: AwareDatetime

    @field_validator("run")
    @classmethod
    def _is_plain(cls, run: str) -> str:
        return plain_name(run, "a run")


def read_latest(architecture: UPath) -> Latest | None:
    """Read the `latest.json` of an architecture's folder. Return None if there is no such file.

    Raises:
        DamageError: the file does not have the expected content.
    """
    path = architecture / LATEST_FILE
    content = read_small(path, MAX_LATEST_BYTES)
    if content is None:
        return None
    if len(content) > MAX_LATEST_BYTES:
        raise DamageError(f"{path} must be at most {MAX_LATEST_BYTES} bytes")
    return _parse(path, content)


def _parse(path: UPath, content: bytes) -> Latest:
    try:
        return Latest.model_validate_json(content)
    except ValidationError as error:
        raise DamageError(f"{path} must name a run and when it finished. {complaint(error)}") from error


def latest_runs(models: UPath) -> dict[str, str]:
    """Return the latest run of each architecture in a folder of models.

    Raises:
        InputError: there is none.
        DamageError: a `latest.json` does not have the expected content, or the name of its folder is not plain.
    """
    found = {name: read_latest(models / name) for name in list_folders(models) if not name.startswith(".")}
    runs = {name: latest.run for name, latest in found.items() if latest}
    if not runs:
        raise InputError(f"--models must hold <architecture>/{LATEST_FILE}. Received: {models}, with none")
    for name in runs:
        try:
            plain_name(name, "the name of a model")
        except ValueError as error:
            raise DamageError(f"{error}. Rename the folder in {models}") from error
    return runs


def point_to_latest(folder: UPath, manifest: ModelManifest) -> None:
    """Point `latest.json` to a sealed run, unless it points to one that finished at the same time or later.

    The update is atomic: if runs finish at the same moment, the file points to the latest of them. A run that is gone,
    or that a wrong clock finished in the future, does not count.

    Raises:
        DamageError: the existing `latest.json` does not have the expected content.
    """
    path = folder.parent / LATEST_FILE
    new = Latest(run=folder.name, finished_at=manifest.finished_at)

    def updated(old: bytes | None) -> bytes | None:
        newest = new
        if old is not None:
            there = _parse(path, old)
            if _counts(there) and is_sealed(folder.parent / there.run):
                newest = max(there, new, key=lambda run: run.finished_at)
            else:
                newest = _newest(folder.parent) or new
            if newest == there:
                return None
        return (newest.model_dump_json() + "\n").encode()

    change_bytes(path, updated)


def _counts(run: Latest) -> bool:
    """Return whether a run did not finish in the future, by the clock of this machine."""
    return run.finished_at <= datetime.now(UTC) + MOST_AHEAD


def _newest(architecture: UPath) -> Latest | None:
    """Return the finished run of an architecture that ended last."""
    runs = []
    for name in list_folders(architecture):
        with suppress(InputError, DamageError, ValidationError):  # unfinished, damaged, or not the name of a run
            runs.append(Latest(run=name, finished_at=read_manifest(architecture / name, ModelManifest).finished_at))
    return max(filter(_counts, runs), key=lambda run: run.finished_at, default=None)


def resolve_model(place: UPath) -> UPath:
    """Return `place` if it is a sealed folder, else the folder of the latest run of the architecture at `place`.

    Raises:
        InputError: `place` contains neither a manifest nor `latest.json`.
        DamageError: `latest.json` does not have the expected content, or names a run that is gone.
    """
    if is_sealed(place):
        return place
    latest = read_latest(place)
    if latest is None:
        folders = list_folders(place)
        architectures = [name for name in folders if is_file(place / name / LATEST_FILE)]
        what = "with neither" if folders or list_files(place) else "which is missing, empty or a file"
        mend = f"Name {place / architectures[0]}" if architectures else "See docs/formats.md#model-folder"
        raise InputError(
            f"a finished folder must hold {MANIFEST_FILE}, and the folder of an architecture {LATEST_FILE}. "
            f"Received: {place}, {what}. {mend}"
        )
    if not is_sealed(place / latest.run):
        raise DamageError(
            f"{place / LATEST_FILE} must name a finished run. Received: {latest.run}, which is gone. Name the "
            "folder of another run"
        )
    return place / latest.run

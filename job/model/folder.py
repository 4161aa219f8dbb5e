"""The model folder `<models>/<architecture>/<run>/`, whose format users rely on: write, check and load it.

model.keras  labels.txt  config.json  metrics.json  history.jsonl  per_class.csv  misclassified.csv  README.md
manifest.json

`manifest.json` is written last and seals the folder. `job.train.result` creates the content of the text files.
"""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upath import UPath

from cluster.errors import DamageError, squeezed
from cluster.manifest import (
    FileEntry,
    fault_of,
    is_sealed,
    read_manifest,
    seal,
    size_fault_of,
    write_listed,
)
from cluster.models import ModelManifest, point_to_latest, resolve_model
from cluster.storage import fetch, list_files, new_file, read_bytes, sha256_of, writing_in
from job.model.load_tensorflow import load_tensorflow
from job.model.portable import save_portable
from preprocessing.classes import read_class_names
from preprocessing.config import is_license
from preprocessing.dataset import is_margin

if TYPE_CHECKING:
    import keras

MODEL_FILE = "model.keras"
LABELS_FILE = "labels.txt"
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.json"
# The members of the archive that Keras writes for our classifiers. Others are rejected: Keras would unpack asset files
# without checking where their paths lead.
MODEL_MEMBERS = ["config.json", "metadata.json", "model.weights.h5"]


def write_model(
    folder: UPath, model: "keras.Model", texts: Mapping[str, str], dataset_manifest_sha256: str
) -> ModelManifest:
    """Write and seal a model folder, and point the architecture's `latest.json` to it.

    texts: name to content of the other files.

    Raises:
        DamageError: another training of the same run has sealed the folder. Its files are unchanged, unless both
            trainings ended at the same moment.
    """
    if is_sealed(folder):
        raise DamageError(
            f"only one training at a time may use a run's name. Received: {folder}, sealed by another training in the "
            "meantime. Name another --run"
        )
    with writing_in(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / MODEL_FILE
        save_portable(model, saved)
        entry = FileEntry(name=MODEL_FILE, bytes=saved.stat().st_size, sha256=sha256_of(UPath(saved)))
        with new_file(folder / MODEL_FILE) as target:
            shutil.copyfile(saved, target)
    # `within`: a folder that was removed meanwhile is not made anew, without the model.
    written = [write_listed(folder / name, text.encode(), within=folder) for name, text in texts.items()]
    manifest = ModelManifest(
        files=sorted([entry, *written], key=lambda file: file.name),
        dataset_manifest_sha256=dataset_manifest_sha256,
        finished_at=datetime.now(UTC),
    )
    seal(folder, manifest)
    point_to_latest(folder, manifest)
    return manifest


def load_model(place: UPath) -> tuple["keras.Model", list[str], UPath]:
    """Load a model for inference. Return the model, its class names, and its folder.

    place: a model folder, or an architecture's folder for its latest run. All files are checked before loading.

    Raises:
        InputError: the place is not a model folder.
        DamageError: as `load_checked`.
    """
    folder = resolve_model(place)
    load_tensorflow()
    return *load_checked(folder), folder


def load_checked(folder: UPath) -> tuple["keras.Model", list[str]]:
    """Load a model in a process that has configured TensorFlow. Return the model and its class names.

    folder: a model folder. All files are checked before loading.

    Raises:
        DamageError: a file does not match the manifest; or `model.keras` is not a classifier of these classes, or could
            execute code.
    """
    manifest = read_manifest(folder, ModelManifest)
    if missing := {MODEL_FILE, LABELS_FILE} - {entry.name for entry in manifest.files}:
        raise DamageError(f"{folder}: the manifest must list {' and '.join(sorted(missing))}")
    with writing_in(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
        local = UPath(temporary)
        sizes = list_files(folder)
        for entry in manifest.entries:  # check the copies, so that exactly the checked bytes are loaded
            fault = size_fault_of(entry, sizes)
            if not fault:
                fetch(folder / entry.name, Path(temporary) / entry.name)
                fault = fault_of(local, entry, list_files(local))
            if fault:
                raise DamageError(f"{folder}: {fault}. Pull the model again")
        names = read_class_names(local / LABELS_FILE, folder / LABELS_FILE)
        try:
            model = _load_archive(Path(temporary) / MODEL_FILE, len(names))
        except Exception as error:  # zipfile, h5py and Keras raise many types for invalid files
            raise DamageError(
                f"{folder / MODEL_FILE} must be a classifier written by `kuzushiji train`. "
                f"Received: {squeezed(error, 300)}. Ask the owner of the models"
            ) from error
    return model, names


@dataclass(frozen=True)
class TrainedOn:
    """What a model's config records about its training dataset."""

    margin: float
    """As `PrepareConfig.margin`."""
    license: str | None
    """As `PrepareConfig.license`."""


def read_trained_on(folder: UPath) -> TrainedOn:
    """Read the config of a model folder.

    Raises:
        DamageError: the model's config is missing, or does not match its manifest.
    """
    entries = [entry for entry in read_manifest(folder, ModelManifest).files if entry.name == CONFIG_FILE]
    fault = fault_of(folder, entries[0], list_files(folder)) if entries else f"the manifest must list {CONFIG_FILE}"
    if fault:
        raise DamageError(f"{folder}: {fault}. Pull the model again")
    config = read_json(folder / CONFIG_FILE)
    margin, license_id = config.get("margin", 0.0), config.get("license")  # models of earlier releases have none
    if not is_margin(margin):
        raise DamageError(f"{folder}: the margin must be a number from 0 to 1. Received: {str(margin)[:40]!r}")
    if not is_license(license_id):
        raise DamageError(f"{folder}: the licence must be an identifier. Received: {str(license_id)[:40]}")
    return TrainedOn(float(margin), license_id)


def _load_archive(path: Path, classes: int) -> "keras.Model":
    """Load a `.keras` file after checking its members. Raises ValueError, and any exception of zipfile and Keras."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sorted(member.filename for member in members) != MODEL_MEMBERS:
            raise ValueError(f"an archive with members other than {', '.join(MODEL_MEMBERS)}")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):  # Keras never compresses them
            raise ValueError("an archive with compressed members")
    import keras

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    if not isinstance(model, keras.Model) or model.output_shape != (None, classes):
        raise ValueError(f"not a model of {classes} classes")
    return model


def read_json(path: UPath) -> dict[str, Any]:
    """Read a JSON object that a training wrote.

    Raises:
        DamageError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(read_bytes(path))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise DamageError(
            f"{path} must be a JSON object written by a training. Received: {error}. Pull the model again, or name "
            "another --run"
        ) from error
    return content


def finished_config(folder: UPath) -> dict[str, Any] | None:
    """Return the config of a finished model folder, with its `dataset_manifest_sha256`; None if it is not finished."""
    if not is_sealed(folder):
        return None
    return read_json(folder / CONFIG_FILE) | {
        "dataset_manifest_sha256": read_manifest(folder, ModelManifest).dataset_manifest_sha256
    }

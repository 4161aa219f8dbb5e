"""Contract with everyone who uses a model: `<models>/<architecture>/<run>/`, sealed by its manifest.

model.keras  labels.txt  config.json  metrics.json  history.jsonl  per_class.csv  misclassified.csv  README.md
manifest.json

`job.train.result` makes the texts; here the folder is written, checked and loaded.
"""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upath import UPath

from cluster.errors import DamageError
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
from preprocessing.classes import read_class_names

if TYPE_CHECKING:
    import keras

MODEL_FILE = "model.keras"
LABELS_FILE = "labels.txt"
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.json"
# All that Keras writes for the classifiers: asset files are unpacked without asking where their paths lead.
MODEL_MEMBERS = ["config.json", "metadata.json", "model.weights.h5"]


def write_model(
    folder: UPath, model: "keras.Model", texts: Mapping[str, str], dataset_manifest_sha256: str
) -> ModelManifest:
    """Write a model folder, seal it, and let `latest.json` beside it name it.

    Raises:
        DamageError: another training of this run sealed the folder meanwhile; nothing in it was changed, unless both
            ended in the same moment.
    """
    if is_sealed(folder):
        raise DamageError(
            f"one training at a time may have a run's name. Received: {folder}, which another one sealed meanwhile. "
            "Name another --run"
        )
    with writing_in(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / MODEL_FILE
        model.save(saved)
        entry = FileEntry(name=MODEL_FILE, bytes=saved.stat().st_size, sha256=sha256_of(UPath(saved)))
        with new_file(folder / MODEL_FILE) as target:
            shutil.copyfile(saved, target)
    written = [write_listed(folder / name, text.encode()) for name, text in texts.items()]
    manifest = ModelManifest(
        files=sorted([entry, *written], key=lambda file: file.name),
        dataset_manifest_sha256=dataset_manifest_sha256,
        finished_at=datetime.now(UTC),
    )
    seal(folder, manifest)
    point_to_latest(folder, manifest)
    return manifest


def load_model(place: UPath) -> tuple["keras.Model", list[str], UPath]:
    """The model of a folder (or of the latest run in it), its class names, and the folder.

    Raises:
        InputError: it is no model folder.
        DamageError: a file is not what the manifest says, and nothing is loaded from it; or it is no classifier of the
            classes, or one that may do more than classify.
    """
    folder = resolve_model(place)
    manifest = read_manifest(folder, ModelManifest)
    if missing := {MODEL_FILE, LABELS_FILE} - {entry.name for entry in manifest.files}:
        raise DamageError(f"{folder}: the manifest must list {' and '.join(sorted(missing))}")
    load_tensorflow()
    with writing_in(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
        local = UPath(temporary)
        there = list_files(folder)
        for entry in manifest.entries:  # copied first, so that what is loaded is what was checked
            fault = size_fault_of(entry, there)
            if not fault:
                fetch(folder / entry.name, Path(temporary) / entry.name)
                fault = fault_of(local, entry, list_files(local))
            if fault:
                raise DamageError(f"{folder}: {fault}. Pull the model again")
        names = read_class_names(local / LABELS_FILE, folder / LABELS_FILE)
        try:
            model = _load_archive(Path(temporary) / MODEL_FILE, len(names))
        except Exception as error:  # zipfile, HDF5 and Keras raise all kinds for what is none of theirs
            raise DamageError(
                f"{folder / MODEL_FILE} must be a classifier as a training writes it. "
                f"Received: {' '.join(str(error).split())[:300]}. Ask whoever keeps the models"
            ) from error
    return model, names, folder


def _load_archive(path: Path, classes: int) -> "keras.Model":
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sorted(member.filename for member in members) != MODEL_MEMBERS:
            raise ValueError(f"an archive of other than {', '.join(MODEL_MEMBERS)}")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):  # as Keras never does
            raise ValueError("an archive with packed members")
    import keras

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    if not isinstance(model, keras.Model) or model.output_shape != (None, classes):
        raise ValueError(f"no model of {classes} classes")
    return model


def read_json(path: UPath) -> dict[str, Any]:
    """An object that a training wrote.

    Raises:
        DamageError: it is not there, or not whole.
    """
    try:
        content = json.loads(read_bytes(path))
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise DamageError(f"{path} must be what a training wrote. Received: {error}. Name another --run") from None
    if not isinstance(content, dict):
        raise DamageError(f"{path} must be what a training wrote. Received: no object. Name another --run")
    return content


def finished_config(folder: UPath) -> dict[str, Any] | None:
    """What a finished model folder was trained with: its config and `dataset_manifest_sha256`; None without one."""
    if not is_sealed(folder):
        return None
    return read_json(folder / CONFIG_FILE) | {
        "dataset_manifest_sha256": read_manifest(folder, ModelManifest).dataset_manifest_sha256
    }

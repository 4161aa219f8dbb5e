"""Initial weights of a training: downloaded or copied once, then shared with all workers.

They are stored in `<models>/.weights/`, which `pull` ignores. The weights of a base are read from HDF5 files only,
which hold numbers and no code.
"""

import logging
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from upath import UPath

from cluster.errors import DamageError, InputError, OptionError, squeezed
from cluster.manifest import MANIFEST_FILE, fault_of, is_sealed, read_manifest
from cluster.models import ModelManifest, read_latest
from cluster.places import place
from cluster.storage import fetch, is_file, list_files, md5_of, new_file, sha256_of, write_bytes
from job.config import TrainConfig
from job.model.load_tensorflow import load_tensorflow

log = logging.getLogger("kuzushiji")

WEIGHTS_FOLDER = ".weights"
DOWNLOAD_TIMEOUT_SECONDS = 60.0
# Keras chooses the format by the suffix: its current format for the first, its legacy format for other .h5 files.
KERAS_SUFFIX, LEGACY_SUFFIX = ".weights.h5", ".h5"


@dataclass(frozen=True)
class Published:
    """A file of ImageNet weights without the top, as `keras.applications` downloads it."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
IMAGENET = {
    "xception": Published(
        f"{_KERAS}/xception/xception_weights_tf_dim_ordering_tf_kernels_notop.h5", "b0042744bf5b25fce3cb969f33bebb97"
    ),
    "resnet152v2": Published(
        f"{_KERAS}/resnet/resnet152v2_weights_tf_dim_ordering_tf_kernels_notop.h5", "ed17cf2e0169df9d443503ef94b23b33"
    ),
    "inceptionresnetv2": Published(
        f"{_KERAS}/inception_resnet_v2/inception_resnet_v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "d19885ff4a710c122648d3b5c3b684e4",
    ),
}


@dataclass(frozen=True)
class Weights:
    """A file with the weights of a base, identified by its SHA-256; or a model folder, by that of its manifest."""

    place: str
    """Path or address."""
    sha256: str
    is_model: bool = False

    @property
    def identity(self) -> str:
        """The value of `TrainConfig.weights`."""
        return f"{'model' if self.is_model else 'sha256'}:{self.sha256}"

    @property
    def suffix(self) -> str:
        return KERAS_SUFFIX if self.place.endswith(KERAS_SUFFIX) else LEGACY_SUFFIX


def weights_option(value: str | None) -> Weights | None:
    """Return the file or model folder that `--weights` names; None for `imagenet`, `none`, and None (not given).

    Raises:
        OptionError: the name does not end in .h5, and there is no model folder of this name.
        InputError: the file does not exist.
        DamageError: the manifest of the model is damaged.
    """
    if value in (None, "imagenet", "none"):
        return None
    given = place(value)
    if given.name.endswith(LEGACY_SUFFIX):
        if not is_file(given):
            raise InputError(f"--weights must be a file that exists. Received: {value}, which does not exist")
        return Weights(str(given), sha256_of(given))
    # An architecture's folder is refused: its latest run may be another one when the command resumes the training.
    if not is_sealed(given):
        latest = read_latest(given)
        mend = f". Name the run, such as {given / latest.run}" if latest else ""
        raise OptionError(
            f"--weights must be imagenet, none, a file that ends in {LEGACY_SUFFIX}, or a model folder, "
            f"<architecture>/<run>, of a finished training. Received: {value}{mend}"
        )
    return Weights(str(given), read_manifest(given, ModelManifest).sha256, is_model=True)


def obtain(config: TrainConfig, given: Weights | None, models: UPath) -> Weights | None:
    """Store the initial weights of a training in `<models>/.weights/`, where all workers read them.

    given: the result of `weights_option`; needed if the config names a file or model. Return None for random
    initialization.

    Raises:
        OptionError: `given` is not the file or model that the config names.
        DamageError: the model does not match its manifest.
        InputError: the weights can't be downloaded, or do not fit the architecture.
    """
    if config.weights == "none":
        return None
    if config.weights == "imagenet":
        shared = _imagenet(config.architecture, models / WEIGHTS_FOLDER)
        return Weights(str(shared), sha256_of(shared))
    if given is None or given.identity != config.weights:
        raise OptionError(f"--weights must be the file of the config. Received: {given}, not {config.weights}")
    if given.is_model:
        return _share_model(given, models / WEIGHTS_FOLDER / given.sha256)
    _check_fit(config.architecture, given)
    shared = models / WEIGHTS_FOLDER / f"{given.sha256}{given.suffix}"
    if not is_file(shared) or sha256_of(shared) != given.sha256:
        _copy(place(given.place), shared)
    return Weights(str(shared), given.sha256)


def _share_model(model: Weights, shared: UPath) -> Weights:
    """Copy a model folder to `shared`. Workers check the copy again when they load it.

    Raises:
        DamageError: a file does not match the manifest, or the manifest has changed since `weights_option`.
    """
    folder = place(model.place)
    manifest = read_manifest(folder, ModelManifest)
    if manifest.sha256 != model.sha256:
        raise DamageError(
            f"{folder} must not change while it is read. Received: another manifest. Run the same command again"
        )
    sizes = list_files(folder)
    if faults := [fault for entry in manifest.entries if (fault := fault_of(folder, entry, sizes))]:
        raise DamageError(f"{folder}: {faults[0]}. Pull the model again")
    sizes = list_files(shared)
    for entry in manifest.entries:
        if fault_of(shared, entry, sizes):
            _copy(folder / entry.name, shared / entry.name)
    write_bytes(shared / MANIFEST_FILE, manifest.raw)
    return Weights(str(shared), model.sha256, is_model=True)


def _imagenet(architecture: str, folder: UPath) -> UPath:
    """Return the published file in `folder`. Download it through Keras' cache if it is missing or its MD5 differs."""
    load_tensorflow(gpus=False)
    import keras

    published = IMAGENET[architecture]
    shared = folder / published.name
    if is_file(shared):
        if md5_of(shared) == published.md5:
            return shared
        log.warning("%s does not match its published MD5: downloading it again", shared)
    log.info("%s: downloading ImageNet weights, unless Keras has cached them: %s", architecture, published.url)
    keras.config.disable_interactive_logging()  # its progress bar would fill the log
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # Keras sets none
    try:
        cached = keras.utils.get_file(
            published.name, published.url, cache_subdir="models", file_hash=published.md5, hash_algorithm="md5"
        )
    except Exception as error:  # Keras raises a plain Exception
        raise InputError(
            f"--weights imagenet must reach {published.url}. Received: {' '.join(str(error).split())}. Download "
            f"it elsewhere and copy it to {shared}, or, for one architecture, name it with --weights. "
            "See docs/models.md#imagenet-weights"
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)
    _copy(place(cached), shared)
    return shared


def _copy(source: UPath, target: UPath) -> None:
    with new_file(target) as temporary:
        fetch(source, temporary)


def _check_fit(architecture: str, file: Weights) -> None:
    """Load the weights once on the driver, because Ray Train would retry the training if a worker failed to load them.

    Raises:
        InputError: the file does not fit the architecture, or has values that are not finite.
    """
    load_tensorflow(gpus=False)
    from job.model.architectures import base

    with local_copy(file) as local, warnings.catch_warnings():
        # Keras only warns about layers that the file lacks.
        warnings.simplefilter("error", UserWarning)
        try:
            model = base(architecture, local)
            if not all(np.isfinite(weight.numpy()).all() for weight in model.weights):
                raise ValueError("it holds values that are not finite")
        except Exception as error:  # Keras and h5py raise many types for invalid files
            raise InputError(
                f"--weights must be a file of the base of {architecture} without its top, as Keras saves it "
                f"({KERAS_SUFFIX}, or {LEGACY_SUFFIX} in its legacy format). Received: {file.place}: "
                f"{squeezed(error, 200)}"
            ) from error


@contextmanager
def local_copy(file: Weights) -> Iterator[str]:
    """Copy the file to this machine and yield the path of the copy, which is removed when the block ends.

    Raises:
        DamageError: the file has changed since `obtain`.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / f"base{file.suffix}"
        fetch(place(file.place), local)
        if sha256_of(place(local)) != file.sha256:
            raise DamageError(
                f"{file.place} must not change during a training. Received: other bytes. Run the same command again"
            )
        yield str(local)

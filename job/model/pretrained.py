"""The weights that a base begins with: found or fetched once, kept beside the models, shared with the workers.

They stand in `<models>/.weights/`, which `pull` leaves out. Only HDF5 is read: it holds numbers, no code.
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

from cluster.errors import DamageError, InputError, OptionError
from cluster.storage import fetch, is_file, md5_of, new_file, place, sha256_of
from job.config import TrainConfig
from job.model.load_tensorflow import load_tensorflow

log = logging.getLogger("kuzushiji")

WEIGHTS_FOLDER = ".weights"
SECONDS_OF_SILENCE = 60.0
# Keras reads a name that ends so in its own form, and other .h5 in the older one.
KERAS_SUFFIX, OLD_SUFFIX = ".weights.h5", ".h5"


@dataclass(frozen=True)
class Published:
    """A file of ImageNet weights without the top, as `keras.applications` fetches it."""

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
class WeightsFile:
    """Where a file is, and what its bytes are."""

    place: str
    sha256: str

    @property
    def identity(self) -> str:
        """What `TrainConfig.weights` says of it."""
        return f"sha256:{self.sha256}"

    @property
    def suffix(self) -> str:
        return KERAS_SUFFIX if self.place.endswith(KERAS_SUFFIX) else OLD_SUFFIX


def handed_over(text: str | None) -> WeightsFile | None:
    """The file that `--weights` names; None for `imagenet`, `none` and no option.

    Raises:
        OptionError: its name does not end in .h5.
        InputError: it is not there.
    """
    if text in (None, "imagenet", "none"):
        return None
    file = place(text)
    if not file.name.endswith(OLD_SUFFIX):
        raise OptionError(f"--weights must be imagenet, none, or a file that ends in {OLD_SUFFIX}. Received: {text}")
    if not is_file(file):
        raise InputError(f"--weights must be imagenet, none, or a file. Received: {text}, which is not there")
    return WeightsFile(str(file), sha256_of(file))


def obtain(config: TrainConfig, handed: WeightsFile | None, models: UPath) -> WeightsFile | None:
    """Put what a training begins with beside the models, where every worker reads it; None where it begins by chance.

    Raises:
        OptionError: the config is of another file than `handed`.
        InputError: it can't be fetched, or does not fit the architecture.
    """
    if config.weights == "none":
        return None
    if config.weights == "imagenet":
        shared = _imagenet(config.architecture, models / WEIGHTS_FOLDER)
        return WeightsFile(str(shared), sha256_of(shared))
    if handed is None or handed.identity != config.weights:
        raise OptionError(f"--weights must be the file of the config. Received: {handed}, not {config.weights}")
    _check_fit(config.architecture, handed)
    shared = models / WEIGHTS_FOLDER / f"{handed.sha256}{handed.suffix}"
    if not is_file(shared) or sha256_of(shared) != handed.sha256:
        _copy(place(handed.place), shared)
    return WeightsFile(str(shared), handed.sha256)


def _imagenet(architecture: str, folder: UPath) -> UPath:
    """The published file, checked by its hash: from the folder, else through Keras' own cache and download."""
    load_tensorflow(gpus=False)
    import keras

    published = IMAGENET[architecture]
    shared = folder / published.name
    if is_file(shared):
        if md5_of(shared) == published.md5:
            return shared
        log.warning("%s is not what its publisher's hash says: it is fetched again", shared)
    log.info("%s: fetches ImageNet weights, unless Keras has them: %s", architecture, published.url)
    keras.config.disable_interactive_logging()  # else its bar goes into logs, where it is noise
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_OF_SILENCE)  # Keras would wait for ever
    try:
        got = keras.utils.get_file(
            published.name, published.url, cache_subdir="models", file_hash=published.md5, hash_algorithm="md5"
        )
    except Exception as error:  # Keras raises a plain one
        raise InputError(
            f"--weights imagenet must reach {published.url}. Received: {' '.join(str(error).split())}. Fetch it "
            f"where you can and put it at {shared}, or, for one architecture, name it with --weights"
        ) from None
    finally:
        socket.setdefaulttimeout(waited)
    _copy(place(got), shared)
    return shared


def _copy(source: UPath, target: UPath) -> None:
    with new_file(target) as temporary:
        fetch(source, temporary)


def _check_fit(architecture: str, file: WeightsFile) -> None:
    """Load it here once: on the workers, Ray Train would try a file that does not fit again and again."""
    load_tensorflow(gpus=False)
    from job.model.architectures import base

    with local_copy(file) as local, warnings.catch_warnings():
        # Keras only warns of layers that a file does not hold.
        warnings.simplefilter("error", UserWarning)
        try:
            model = base(architecture, local)
            if not all(np.isfinite(weight.numpy()).all() for weight in model.weights):
                raise ValueError("it holds values that are not finite")
        except Exception as error:  # Keras and h5py raise all kinds, by what is wrong with a file
            raise InputError(
                f"--weights must be a file of the base of {architecture} without its top, as Keras saves it "
                f"({KERAS_SUFFIX}, or {OLD_SUFFIX} in its older form). Received: {file.place}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None


@contextmanager
def local_copy(file: WeightsFile) -> Iterator[str]:
    """A path on this machine that holds the file while the block runs.

    Raises:
        DamageError: it was changed since.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / f"base{file.suffix}"
        fetch(place(file.place), local)
        if sha256_of(place(local)) != file.sha256:
            raise DamageError(f"{file.place} was changed while a training needed it. Run the same command again")
        yield str(local)

"""Load TensorFlow as the backend of Keras: without messages on the terminal, and with GPU memory growth."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.progress import waiting


def choose_backend() -> None:
    """Make Keras use TensorFlow in this process, whatever the user's `~/.keras/keras.json` says.

    Keras reads the variable at import, so commands and workers call this function first.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"


@contextmanager
def without_chatter() -> Iterator[None]:
    """Redirect standard error to /dev/null while TensorFlow loads and looks for devices.

    No setting turns off the messages of its C++ libraries (github.com/tensorflow/tensorflow/issues/79029). Failures to
    load are not hidden: they raise exceptions.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    silence = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silence, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(silence)


def load_tensorflow(gpus: bool = True) -> None:
    """Import TensorFlow and initialize its devices. gpus: False leaves the GPUs to other processes."""
    choose_backend()
    with waiting("Loading TensorFlow ..."), without_chatter():
        import tensorflow as tf

        configure_gpus(gpus)
        # TensorFloat-32 (10 bits of mantissa) is enough for training, but inference must give the results of CPUs.
        tf.config.experimental.enable_tensor_float_32_execution(False)
        tf.config.list_logical_devices()


def configure_gpus(gpus: bool) -> None:
    """Set memory growth for all GPUs, or hide them if `gpus` is False. Call it before TensorFlow runs any operation."""
    import tensorflow as tf

    if not gpus:
        tf.config.set_visible_devices([], "GPU")
    for gpu in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)

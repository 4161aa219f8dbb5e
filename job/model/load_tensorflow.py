"""Loading TensorFlow: the backend of Keras, no noise on the terminal, and the memory of GPUs."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.progress import waiting


def choose_backend() -> None:
    """Let Keras use TensorFlow in this process, whatever the user's `~/.keras/keras.json` names.

    Keras reads the variable when it is imported: commands and workers call this first.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"


@contextmanager
def without_chatter() -> Iterator[None]:
    """Silence standard error while TensorFlow loads and looks for devices.

    No setting controls what its libraries print then (github.com/tensorflow/tensorflow/issues/79029). Nothing is lost:
    a failure to load raises.
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
    """Import TensorFlow and let it find its devices. Without `gpus`, leave the GPUs to other processes."""
    choose_backend()
    with waiting("TensorFlow loads ..."), without_chatter():
        import tensorflow as tf

        configure_gpus(gpus)
        # TensorFloat-32 (10 bits of mantissa) is enough to train, but a finished model must give what it gives on CPUs.
        tf.config.experimental.enable_tensor_float_32_execution(False)
        tf.config.list_logical_devices()


def configure_gpus(gpus: bool) -> None:
    """Let the use of GPU memory grow as needed, or, without `gpus`, hide the GPUs. Before TensorFlow runs anything."""
    import tensorflow as tf

    if not gpus:
        tf.config.set_visible_devices([], "GPU")
    for gpu in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)

"""Loading TensorFlow in the process that people look at."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_chatter() -> Iterator[None]:
    """Turn standard error away while TensorFlow loads and looks for devices.

    What its libraries print then obeys no setting (github.com/tensorflow/tensorflow/issues/79029), and tells of no
    fault: a failure to load raises.
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
    """Import TensorFlow and let it find its devices; without `gpus`, leave those to other processes."""
    with without_chatter():
        import tensorflow as tf

        if not gpus:
            tf.config.set_visible_devices([], "GPU")
        tf.config.list_logical_devices()

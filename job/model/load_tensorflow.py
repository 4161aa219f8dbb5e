"""Loading TensorFlow in the process that people look at, and how long what comes before the first step takes."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.progress import waiting


class StartUp:
    """What a worker does before its first step, in parts."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._parts: list[str] = []

    def ends(self, part: str) -> None:
        """A part ends now; the next begins."""
        now = time.perf_counter()
        self._parts.append(f"{part} {now - self._last:.1f}")
        self._last = now

    def __str__(self) -> str:
        return f"{self._last - self._began:.1f} s ({', '.join(self._parts)})"


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
    with waiting("TensorFlow loads ..."), without_chatter():
        import tensorflow as tf

        configure_gpus(gpus)
        # 10 bits of mantissa are enough to train, but what a finished model gives shall be what it gives on a CPU.
        tf.config.experimental.enable_tensor_float_32_execution(False)
        tf.config.list_logical_devices()


def configure_gpus(gpus: bool) -> None:
    """Before TensorFlow runs anything: let GPU memory grow as needed, or, without `gpus`, hide the GPUs."""
    import tensorflow as tf

    if not gpus:
        tf.config.set_visible_devices([], "GPU")
    for gpu in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)

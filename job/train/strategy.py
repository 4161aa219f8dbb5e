"""Devices, threads, seeds, precision, determinism: all that determines the bits of a training, apart from its data."""

import os
import re
import socket
import subprocess
import sys

import keras
import tensorflow as tf

from job.config import TrainConfig
from job.model.load_tensorflow import configure_gpus

SECONDS_FOR_REASON = 120
FIND_GPUS = """
import tensorflow as tf
tf.config.list_physical_devices("GPU")
"""


def fault_of_gpus(wanted: int) -> str | None:
    """Return in one line why TensorFlow sees fewer GPUs than `wanted` in this process; None if it sees them."""
    found = len(tf.config.list_physical_devices("GPU"))
    if found >= wanted:
        return None
    return (
        f"TensorFlow must see the GPUs of --gpus-per-worker. Received: {found} of {wanted} on {socket.gethostname()}: "
        f"{_why_no_gpus()}. Install requirements-gpu.lock and a driver for CUDA 12 there, or use --gpus-per-worker 0. "
        "See docs/faq.md"
    )


def _why_no_gpus() -> str:
    """Return TensorFlow's reason, from a new process: it writes it to standard error only, and once per process."""
    try:
        done = subprocess.run(  # noqa: S603 - our own script
            [sys.executable, "-c", FIND_GPUS],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "0"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS_FOR_REASON,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "no reason given"
    lines = [line.rpartition("] ")[2].rstrip(".") for line in done.stderr.splitlines()]
    reasons = [line for line in lines if re.search("cuda|dlopen", line, re.IGNORECASE)]
    return "; ".join(dict.fromkeys(reasons)) or "no reason given"


def configure_tensorflow(config: TrainConfig) -> None:
    """Configure threads, GPUs, determinism, precision and seeds of this process. Call it before any operation runs."""
    tf.config.threading.set_intra_op_parallelism_threads(config.cpus_per_worker)
    # One more thread, so that gradients are transferred while others are computed.
    tf.config.threading.set_inter_op_parallelism_threads(config.cpus_per_worker + 1)
    configure_gpus(gpus=config.gpus_per_worker > 0)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.config.set_dtype_policy(config.precision)
    keras.utils.set_random_seed(config.seed)


def make_strategy(workers: int) -> tf.distribute.Strategy:
    """Return the strategy for several workers, for one worker with several devices, or for a single device."""
    if workers > 1:
        return tf.distribute.MultiWorkerMirroredStrategy()
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()

"""Devices, threads, seeds, precision, determinism: all that the bits of a training depend on besides its data."""

import keras
import tensorflow as tf

from job.config import TrainConfig
from job.model.load_tensorflow import configure_gpus


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

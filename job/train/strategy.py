"""What the bits of a training depend on besides its data, fixed in one place."""

import keras
import tensorflow as tf

from job.config import TrainConfig
from job.model.load_tensorflow import configure_gpus


def fix_what_bits_depend_on(config: TrainConfig) -> None:
    """Threads, seeds, precision, deterministic kernels; before TensorFlow runs anything."""
    tf.config.threading.set_intra_op_parallelism_threads(config.cpus_per_worker)
    # One more, so that gradients travel while others are computed.
    tf.config.threading.set_inter_op_parallelism_threads(config.cpus_per_worker + 1)
    configure_gpus(gpus=config.gpus_per_worker > 0)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.config.set_dtype_policy(config.precision)
    keras.utils.set_random_seed(config.seed)

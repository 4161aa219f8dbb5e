"""The random numbers of a training step: a pure function of (seed, step, row of the global batch).

They do not depend on the number of workers, and checkpoints need no random state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

# TensorFlow's ID of the Philox generator (doi.org/10.1145/2063384.2063405), which makes four numbers per counter value.
PHILOX, NUMBERS_OF_A_COUNT = 1, 4


@dataclass(frozen=True)
class BatchRows:
    """The rows of a global batch that a replica works on. `step` and `first` are scalar tensors in a traced step."""

    step: Any
    first: Any
    """First row of the replica."""
    global_batch_size: int

    def uniform(self, seed: int, shape: Sequence[int]) -> Any:
        """Draw (B, *shape) float32 numbers from 0 to 1 for the whole global batch: a pure function of (seed, step).

        Call it outside functions that XLA compiles: XLA draws other numbers.
        """
        return self._drawn(seed, shape, 0, self.global_batch_size)

    def own_uniform(self, seed: int, shape: Sequence[int], count: Any) -> Any:
        """Return the replica's `count` rows of `uniform`. No other numbers are drawn."""
        return self._drawn(seed, shape, self.first, count)

    def own(self, values: Any, count: Any) -> Any:
        """Return the replica's `count` rows of values of the whole global batch, (B, ...)."""
        return values[self.first : self.first + count]

    def _drawn(self, seed: int, shape: Sequence[int], first: Any, count: Any) -> Any:
        size = math.prod(shape)
        counts = -(-size // NUMBERS_OF_A_COUNT)  # counter values of a row; each row starts at a new one
        key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=tf.stack([tf.cast(seed, tf.int64), self.step]))
        before = tf.cast(first, tf.int64) * counts
        counter += tf.cast(tf.stack([before, tf.zeros_like(before)]), tf.uint64)
        drawn = tf.raw_ops.StatelessRandomUniformV2(
            shape=(count, counts * NUMBERS_OF_A_COUNT), key=key, counter=counter, alg=PHILOX, dtype=tf.float32
        )
        return tf.reshape(drawn[:, :size], (count, *shape))

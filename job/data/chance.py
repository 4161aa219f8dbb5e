"""What is drawn by chance in a step: a pure function of (seed, step, row of the global batch).

Any number of workers draws the same, and checkpoints need no random state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class BatchRows:
    """The rows of a global batch that a replica works on. `step` and `first` are scalar tensors in a traced step."""

    step: Any
    first: Any
    """First row of the replica."""
    global_batch_size: int

    def uniform(self, seed: int, shape: Sequence[int | None]) -> Any:
        """Draw (B, *shape) float32 numbers from 0 to 1 for the whole global batch: a pure function of (seed, step).

        Call it outside functions that XLA compiles: XLA draws other numbers.
        """
        seeds = tf.stack([tf.cast(seed, tf.int64), self.step])
        return tf.random.stateless_uniform((self.global_batch_size, *shape), seed=seeds)

    def own(self, values: Any, count: Any) -> Any:
        """Return the replica's `count` rows of values of the whole global batch, (B, ...)."""
        return values[self.first : self.first + count]

"""Dropout with one mask for the whole global batch, of which each replica uses its rows.

`keras.layers.Dropout` draws the same mask on every worker, so that crops share masks by accident and the number of
workers matters. Here a mask is a pure function of (seed, layer, step): nothing to be saved with a checkpoint either.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True)
class BatchRows:
    """Which rows of which global batch a replica works on; tensors while the step is traced."""

    step: Any
    first: Any
    global_batch_size: int


_masks: ContextVar[Mapping[str, Any] | None] = ContextVar("masks", default=None)


@contextmanager
def dropout_masks(masks: Mapping[str, Any]) -> Iterator[None]:
    """Dropout is on within: layer name to its mask. A context variable, since Keras hands nothing else through to a
    layer.
    """
    token = _masks.set(masks)
    try:
        yield
    finally:
        _masks.reset(token)


class SharedDropout(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Stands in for `keras.layers.Dropout` while training; outside of `dropout_masks` it passes its input on."""

    def __init__(self, rate: float, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate, self.seed = rate, seed

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.features = input_shape[1:]

    def mask(self, rows: BatchRows, count: Any) -> Any:
        """(count, ...) bool, what is kept of each of the rows. Drawn outside of what XLA compiles, which would draw
        other numbers.
        """
        shape = (rows.global_batch_size, *self.features)
        drawn = tf.random.stateless_uniform(shape, seed=tf.stack([tf.cast(self.seed, tf.int64), rows.step]))
        return drawn[rows.first : rows.first + count] >= self.rate

    def call(self, inputs: Any, training: bool = False) -> Any:
        masks = _masks.get()
        if masks is None or not training:
            return inputs
        return tf.where(masks[self.name], inputs / (1 - self.rate), tf.zeros_like(inputs))

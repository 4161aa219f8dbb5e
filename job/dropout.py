"""Dropout with one mask for the whole global batch, of which each replica uses its rows.

`keras.layers.Dropout` draws the same mask on every worker, so that crops share masks by accident and the number of
workers matters. Here a mask is a pure function of (seed, layer, step): nothing to be saved with a checkpoint either.
"""

from collections.abc import Iterator
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


_rows: ContextVar[BatchRows | None] = ContextVar("rows", default=None)


@contextmanager
def batch_rows(rows: BatchRows) -> Iterator[None]:
    """Dropout is on within, for these rows. A context variable, since Keras hands nothing else through to a layer."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


class SharedDropout(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Stands in for `keras.layers.Dropout` while training; outside of `batch_rows` it passes its input on."""

    def __init__(self, rate: float, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate, self.seed = rate, seed

    def call(self, inputs: Any, training: bool = False) -> Any:
        rows = _rows.get()
        if rows is None or not training:
            return inputs
        shape = (rows.global_batch_size, *inputs.shape[1:])
        drawn = tf.random.stateless_uniform(shape, seed=tf.stack([tf.cast(self.seed, tf.int64), rows.step]))
        mine = drawn[rows.first : rows.first + tf.shape(inputs)[0]]
        return tf.where(mine >= self.rate, inputs / (1 - self.rate), tf.zeros_like(inputs))

"""Dropout with one mask for the whole global batch; each replica uses the rows of its crops.

`keras.layers.Dropout` draws the same mask on every worker: crops of different workers share masks, and results depend
on the number of workers. Here a mask is a pure function of (seed, layer, step), so checkpoints need no random state.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf

from job.data.chance import BatchRows

_masks: ContextVar[Mapping[str, Any] | None] = ContextVar("masks", default=None)


@contextmanager
def dropout_masks(masks: Mapping[str, Any]) -> Iterator[None]:
    """Enable dropout in `SharedDropout` layers.

    masks: layer name to its mask. A context variable passes them, since Keras passes no extra arguments to layers.
    """
    token = _masks.set(masks)
    try:
        yield
    finally:
        _masks.reset(token)


class SharedDropout(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Replaces `keras.layers.Dropout` in training. Outside `dropout_masks` it returns its input."""

    def __init__(self, rate: float, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate, self.seed = rate, seed

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.features = input_shape[1:]

    def mask(self, rows: BatchRows, count: Any) -> Any:
        """Return a (count, *features) bool mask: True for values to keep. rows: the replica's. count: their number.

        Call it outside functions that XLA compiles, like `BatchRows.uniform`.
        """
        return rows.own_uniform(self.seed, self.features, count) >= self.rate

    def call(self, inputs: Any, training: bool = False) -> Any:
        masks = _masks.get()
        if masks is None or not training:
            return inputs
        return tf.where(masks[self.name], inputs / (1 - self.rate), tf.zeros_like(inputs))

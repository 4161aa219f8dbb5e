"""Augmentation: distort each crop of a step a little, so that a model also reads handwriting that the dataset lacks.

Keras' own augmentation layers draw random numbers for the rows of one worker, so their results would depend on the
number of workers.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from job.data.chance import BatchRows
from preprocessing.records import SIDE

# The limits of `--augment standard`; each value is drawn uniformly up to its limit in both directions.
ROTATION = math.radians(6)
SHEAR = 0.1  # pixels to the side per pixel down
LOG_ZOOM = math.log(1.14)  # on each axis
SHIFT = 5.0  # pixels
ELASTIC, GRID = 3.5, 5  # pixels that each of GRID x GRID points moves along each axis, and points per axis
GAIN = 0.2  # of the grey levels
LOG_GAMMA = math.log(1.4)
STROKE = 0.5  # fraction of the way to the lightest or darkest of 3 x 3 pixels
ERASED = 0.25  # fraction of the crops
LEAST_ERASED, MOST_ERASED = 0.1, 0.35  # fraction of the side of a crop

SEED_OFFSET = 1 << 62  # the seeds of dropout layers start at seed + (1 << 32)
NUMBERS = 14 + 2 * GRID**2  # random numbers per crop


def augmented(images: Any, rows: BatchRows, seed: int) -> Any:
    """Return distorted crops, (n, 80, 80, 1) float32 from 0 to 255. Pixels from outside of a crop are black.

    Args:
        images: (n, 80, 80, 1), from 0 to 255, with paper lighter than ink.
        rows: their rows in the global batch.
        seed: random seed of the training.
    """
    # Compute for the whole batch, then take the own rows: vectorized functions round differently for fewer rows.
    drawn = rows.uniform(seed + SEED_OFFSET, (NUMBERS,))
    rotation, shear, zoom_x, zoom_y, shift_x, shift_y, gain, gamma, stroke = tf.unstack(2 * drawn[:, :9] - 1, axis=1)
    transforms = _transforms(
        ROTATION * rotation,
        SHEAR * shear,
        tf.exp(LOG_ZOOM * zoom_x),
        tf.exp(LOG_ZOOM * zoom_y),
        SHIFT * shift_x,
        SHIFT * shift_y,
    )
    levels = tf.stack([STROKE * stroke, tf.exp(LOG_GAMMA * gamma), 1 + GAIN * gain], axis=1)
    count = tf.shape(images)[0]
    drawn, transforms, levels = (rows.own(values, count) for values in (drawn, transforms, levels))
    moves = tf.reshape(ELASTIC * (2 * drawn[:, 14:] - 1), (-1, GRID, GRID, 2))
    x = _warped(tf.cast(images, tf.float32), transforms, moves)
    stroke, gamma, gain = tf.unstack(levels[:, None, None, None], axis=-1)
    x = gain * 255 * tf.exp(gamma * tf.math.log(_with_stroke(x, stroke) / 255))  # `tf.pow` takes 5 times as long
    return tf.minimum(_erased(x, drawn[:, 9:14]), 255)


def _transforms(angle: Any, shear: Any, zoom_x: Any, zoom_y: Any, shift_x: Any, shift_y: Any) -> Any:
    """Return (n, 2, 3) affine transforms about the centre: from pixels (x, y, 1) of the result to those of the crop."""
    cosine, sine = tf.cos(angle), tf.sin(angle)
    # The rotation times the shear times the zoom.
    a, b = cosine / zoom_x, (cosine * shear - sine) / zoom_y
    c, d = sine / zoom_x, (sine * shear + cosine) / zoom_y
    middle = (SIDE - 1) / 2
    x = middle - (a + b) * middle + shift_x
    y = middle - (c + d) * middle + shift_y
    return tf.reshape(tf.stack([a, b, x, c, d, y], axis=1), (-1, 2, 3))


def _warped(x: Any, transforms: Any, moves: Any) -> Any:
    """Warp crops by transforms and by an elastic distortion, with bilinear interpolation.

    TensorFlow itself only warps by transforms. The elastic distortion is that of doi.org/10.1109/ICDAR.2003.1227801.

    moves: (n, GRID, GRID, 2), pixels along x and y that each point of the grid moves.
    """
    # Between two points of the grid, pixels move by a mean of both moves, weighted by cosines.
    distance = np.linspace(0, GRID - 1, SIDE, dtype=np.float32)[:, None] - np.arange(GRID, dtype=np.float32)
    weights = np.where(np.abs(distance) < 1, np.cos(np.pi / 2 * distance) ** 2, 0)
    moved = tf.einsum("yi,nijc,xj->cnyx", weights, moves, weights)
    columns, lines = np.meshgrid(np.arange(SIDE, dtype=np.float32), np.arange(SIDE, dtype=np.float32))
    transforms = transforms[..., None, None]
    sources = (
        transforms[:, axis, 0] * columns + transforms[:, axis, 1] * lines + transforms[:, axis, 2] + moved[axis]
        for axis in (0, 1)
    )
    # A black border; coordinates farther out are clipped to it.
    width = SIDE + 3
    pixels = tf.reshape(tf.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0))), (-1, width * width))
    right, down = (tf.clip_by_value(source + 1, 0, SIDE + 1) for source in sources)
    left, top = tf.floor(right), tf.floor(down)
    right, down = right - left, down - top
    first = tf.cast(top * width + left, tf.int32)
    upper_left, upper_right, lower_left, lower_right = (
        tf.gather(pixels, first + offset, batch_dims=1) for offset in (0, 1, width, width + 1)
    )
    upper = upper_left + right * (upper_right - upper_left)
    lower = lower_left + right * (lower_right - lower_left)
    return (upper + down * (lower - upper))[..., None]


def _with_stroke(x: Any, weight: Any) -> Any:
    """Blend crops with the lightest (weight > 0, thinner strokes) or darkest (bolder ones) of 3 x 3 pixels."""
    changed = tf.where(weight > 0, _of_neighbours(x, tf.maximum), _of_neighbours(x, tf.minimum))
    return x + tf.abs(weight) * (changed - x)


def _of_neighbours(x: Any, better: Callable[[Any, Any], Any]) -> Any:
    """Return the `better` of 3 x 3 pixels, within the crop. On a CPU, this is four times as fast as pooling."""
    bordered = tf.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), "SYMMETRIC")
    x = better(better(bordered[:, :-2], bordered[:, 1:-1]), bordered[:, 2:])
    return better(better(x[:, :, :-2], x[:, :, 1:-1]), x[:, :, 2:])


def _erased(x: Any, drawn: Any) -> Any:
    """Fill a rectangle of some crops with the crop's mean. drawn: (n, 5) random numbers from 0 to 1."""
    whether, height, width, middle_y, middle_x = tf.unstack(drawn, axis=1)
    pixels = tf.range(SIDE, dtype=tf.float32)[None] + 0.5

    def inside(middle: Any, size: Any) -> Any:
        half = SIDE * (LEAST_ERASED + (MOST_ERASED - LEAST_ERASED) * size) / 2
        return tf.abs(pixels - SIDE * middle[:, None]) < half[:, None]

    rectangle = inside(middle_y, height)[:, :, None] & inside(middle_x, width)[:, None, :]
    erased = rectangle[..., None] & (whether < ERASED)[:, None, None, None]
    return tf.where(erased, tf.reduce_mean(x, axis=(1, 2, 3), keepdims=True), x)

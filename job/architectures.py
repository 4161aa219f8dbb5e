"""The classifiers. Crops in: N x 80 x 80 x 1, 0..255, scaled inside; N x classes probabilities out (softmax).

Each is a plain function of the number of classes, with layers of Keras' own only, so that a saved model loads anywhere.
"""

from collections.abc import Callable

import keras
from keras import layers

SIDE = 80


def baseline(num_classes: int) -> keras.Model:
    """The study's convolutional net: 37,934,274 parameters at 514 classes, 152 MB of gradients a step."""
    inputs = keras.Input((SIDE, SIDE, 1))
    x = layers.Rescaling(1 / 255)(inputs)
    for filters in (32, 64, 128, 256):
        x = layers.Conv2D(filters, 3, padding="same")(x)
        x = layers.MaxPooling2D()(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
    x = layers.Flatten()(x)
    for units in (5000, 1000):
        x = layers.Dense(units)(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
        x = layers.Dropout(0.4)(x)
    return keras.Model(inputs, layers.Dense(num_classes, activation="softmax")(x), name="baseline")


ARCHITECTURES: dict[str, Callable[[int], keras.Model]] = {"baseline": baseline}

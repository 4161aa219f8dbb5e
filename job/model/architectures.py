"""The classifiers. Crops in: N x 80 x 80 x 1, 0..255, scaled inside; N x classes probabilities out (softmax).

Each is a plain function of the number of classes, with layers of Keras' own only, so that a saved model loads anywhere.
Layers, recipes (`config.py`) and what each reached are those of an earlier study on Kaggle's crops, but for one defect:
it fed the ImageNet bases 0..255. Scaling and softmax stay float32 where the layers between compute in bfloat16.
"""

from collections.abc import Callable
from typing import Any, Literal

import keras
from keras import layers

from preprocessing.records import SIDE

BASELINE_HEAD = (5000, 1000)
HEAD = (10000, 5000, 1000)
FCN_FILTERS = (32, 64, 128, 256, 512, 1028)

Unfreeze = Literal["last", "all"]

# Those that XLA is to compile on a GPU. On an H100 `baseline` trains 1.9 times as fast with it, and with batch norm
# that is not synchronized, as without both. For `fcn` XLA asks for 66.6 GiB to train on 8 crops. Others were not tried.
XLA_COMPILES = ("baseline",)

# Their names in `keras.applications`.
BASES = {"xception": "Xception", "resnet152v2": "ResNet152V2", "inceptionresnetv2": "InceptionResNetV2"}


def baseline(num_classes: int) -> keras.Model:
    """Four convolutions and two wide dense layers: 37,934,274 parameters at 514 classes."""
    inputs = keras.Input((SIDE, SIDE, 1))
    x = layers.Rescaling(1 / 255, dtype="float32")(inputs)
    for filters in (32, 64, 128, 256):
        x = layers.Conv2D(filters, 3, padding="same")(x)
        x = layers.MaxPooling2D()(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
    x = _dense(layers.Flatten()(x), BASELINE_HEAD, dropout=0.4)
    return keras.Model(inputs, _probabilities(x, num_classes), name="baseline")


def xception(num_classes: int, weights: str | None = None, unfreeze: Unfreeze = "last") -> keras.Model:
    """Xception (arxiv.org/abs/1610.02357) with a wide head: 96,935,994 parameters at 514 classes.

    weights: file of the base's weights without its top, as Keras saves them; None: chance. `last` unfreezes its last 6
    layers, block 14.
    """
    return _transfer("xception", num_classes, weights, unfreeze, last=6)


def resnet152v2(num_classes: int, weights: str | None = None, unfreeze: Unfreeze = "last") -> keras.Model:
    """ResNet152V2 (arxiv.org/abs/1603.05027) with a wide head: 134,406,162 parameters at 514 classes.

    weights: as for `xception`. The study names no number of layers here: `last` unfreezes 6 as in `xception`, the last
    convolution and the batch norms around it.
    """
    return _transfer("resnet152v2", num_classes, weights, unfreeze, last=6)


def inceptionresnetv2(num_classes: int, weights: str | None = None, unfreeze: Unfreeze = "last") -> keras.Model:
    """InceptionResNetV2 (arxiv.org/abs/1602.07261) with a wide head: 125,291,250 parameters at 514 classes.

    weights: as for `xception`. `last` unfreezes its last 11 layers.
    """
    return _transfer("inceptionresnetv2", num_classes, weights, unfreeze, last=11)


def fcn(num_classes: int, input_size: tuple[int | None, int | None] = (None, None)) -> keras.Model:
    """Seven convolutions at full resolution, then the maximum over the image: 11,072,230 parameters at 514 classes.

    71 GMAC forward for each crop of 80 x 80, 550 times those of `baseline`, and some 200 MB of activations a crop to
    train. input_size: height and width in px; by default any, so that it takes whole lines of a page too.
    """
    inputs = keras.Input((*input_size, 1))
    x = layers.Rescaling(1 / 255, dtype="float32")(inputs)
    for filters in FCN_FILTERS:
        x = layers.Conv2D(filters, 3, padding="same")(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
    x = layers.Conv2D(num_classes, 3, padding="same")(x)
    # In float32, or more classes would tie: bfloat16 has 8 bits.
    x = layers.BatchNormalization(dtype="float32")(x)
    x = layers.ReLU(dtype="float32")(x)
    x = layers.GlobalMaxPooling2D(dtype="float32")(x)
    return keras.Model(inputs, layers.Softmax(dtype="float32")(x), name="fcn")


def base(architecture: str, weights: str | None) -> keras.Model:
    """What an architecture of `BASES` has below its head: crops in, scaled as it was trained, feature maps out.

    weights: as for `xception`.
    """
    inputs = keras.Input((SIDE, SIDE, 1))
    # -1..1 is what all three were trained with: `preprocess_input` of their modules.
    x = layers.Rescaling(1 / 127.5, offset=-1, dtype="float32")(inputs)
    x = layers.Concatenate()([x, x, x])
    model = getattr(keras.applications, BASES[architecture])(include_top=False, weights=None, input_tensor=x)
    if weights is not None:
        model.load_weights(weights)
    return model


def _transfer(architecture: str, num_classes: int, weights: str | None, unfreeze: Unfreeze, last: int) -> keras.Model:
    """A base under three dense layers; frozen batch norms stay in inference mode by Keras."""
    below = base(architecture, weights)
    if unfreeze == "last":
        for layer in below.layers[:-last]:
            layer.trainable = False
    x = layers.GlobalAveragePooling2D()(below.output)
    x = _dense(layers.Dropout(0.2)(x), HEAD, dropout=0.3)
    return keras.Model(below.inputs[0], _probabilities(x, num_classes), name=architecture)


def _dense(x: Any, widths: tuple[int, ...], dropout: float) -> Any:
    for width in widths:
        x = layers.Dense(width)(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
        x = layers.Dropout(dropout)(x)
    return x


def _probabilities(x: Any, num_classes: int) -> Any:
    return layers.Dense(num_classes, activation="softmax", dtype="float32")(x)


ARCHITECTURES: dict[str, Callable[..., keras.Model]] = {
    "baseline": baseline,
    "xception": xception,
    "resnet152v2": resnet152v2,
    "inceptionresnetv2": inceptionresnetv2,
    "fcn": fcn,
}

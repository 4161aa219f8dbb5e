"""The classifiers. Input: N x 80 x 80 x 1 crops, 0..255, scaled inside. Output: N x K probabilities of K classes.

Each architecture is a function of the number of classes and uses built-in Keras layers only, so that a saved model
loads without this package. `resnet` is the recommended one. Layers, recipes and reported results (`job/config.py`) of
the others are those of an earlier study on Kaggle's crops, with one correction: the study fed 0..255 to the ImageNet
bases; here they get the range that they were trained on. Scaling and softmax are always float32; with mixed precision,
the layers between them compute in bfloat16.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import keras
from keras import layers

from preprocessing.records import SIDE

RESNET_BLOCKS = ((64, 2), (128, 2), (128, 1), (256, 2), (256, 1))  # filters and stride
RESNET_FEATURES = 512
BASELINE_HEAD = (5000, 1000)
HEAD = (10000, 5000, 1000)
FCN_FILTERS = (32, 64, 128, 256, 512, 1028)

Unfreeze = Literal["last", "all"]

# Architectures to compile with XLA on a GPU. On an H100, XLA and unsynchronized batch norm together train `baseline`
# 1.9 times as fast. For `fcn`, XLA requests 66.6 GiB to train on 8 crops. The others were not tried.
XLA_COMPILES = ("baseline",)


class Base(NamedTuple):
    """A pretrained base."""

    name: str
    """In `keras.applications`."""
    last: int
    """The number of last layers that are trained with `unfreeze="last"`."""


# arxiv.org/abs/1610.02357, 1603.05027 and 1602.07261. The study trained block 14 of Xception, 6 layers. For ResNet152V2
# it names no number: as for Xception, which is the last convolution and the batch norms around it.
BASES = {
    "xception": Base("Xception", last=6),
    "resnet152v2": Base("ResNet152V2", last=6),
    "inceptionresnetv2": Base("InceptionResNetV2", last=11),
}


def resnet(num_classes: int) -> keras.Model:
    """Build a small residual net (arxiv.org/abs/1512.03385): 3,105,698 parameters at 514 classes.

    It has plain convolutions, most of them 3x3, and a small head: a weighted average over the 5 x 5 positions of the
    last feature map (arxiv.org/abs/1804.01259) instead of wide dense layers. The forward pass takes 147 MMAC per crop;
    `baseline` takes 128.
    """
    inputs = keras.Input((SIDE, SIDE, 1))
    x = layers.Rescaling(1 / 255, dtype="float32")(inputs)
    x = _norm_relu(_convolution(x, 32, 5, strides=2))
    x = _norm_relu(_convolution(x, 32, 3))
    for filters, strides in RESNET_BLOCKS:
        x = _residual(x, filters, strides)
    x = _norm_relu(_convolution(x, RESNET_FEATURES, 1))
    x = layers.Reshape((-1, RESNET_FEATURES))(x)  # LiteRT's converter fails on a sum over two axes
    average = keras.initializers.Constant(1 / x.shape[1])
    x = layers.EinsumDense("abc,bc->ac", RESNET_FEATURES, kernel_initializer=average)(x)
    x = layers.Dropout(0.25)(x)
    return keras.Model(inputs, _probabilities(x, num_classes), name="resnet")


def _residual(x: Any, filters: int, strides: int) -> Any:
    """Build two convolutions and a shortcut. The last scale starts at 0, so the block begins as its shortcut alone."""
    shortcut = x
    if strides > 1:  # a 1x1 convolution with strides would skip three of four positions
        shortcut = layers.AveragePooling2D(strides)(shortcut)
    if x.shape[-1] != filters:
        shortcut = layers.BatchNormalization()(_convolution(shortcut, filters, 1))
    x = _norm_relu(_convolution(x, filters, 3, strides))
    x = layers.BatchNormalization(gamma_initializer="zeros")(_convolution(x, filters, 3))
    return layers.ReLU()(layers.Add()([x, shortcut]))


def _convolution(x: Any, filters: int, size: int, strides: int = 1) -> Any:
    # Without bias: the batch norm that follows has one.
    initializer = keras.initializers.HeNormal()
    return layers.Conv2D(filters, size, strides, padding="same", use_bias=False, kernel_initializer=initializer)(x)


def _norm_relu(x: Any) -> Any:
    # Without scale: the layer that follows the ReLU has one.
    return layers.ReLU()(layers.BatchNormalization(scale=False)(x))


def baseline(num_classes: int) -> keras.Model:
    """Build four convolutions and two wide dense layers: 37,934,274 parameters at 514 classes."""
    inputs = keras.Input((SIDE, SIDE, 1))
    x = layers.Rescaling(1 / 255, dtype="float32")(inputs)
    for filters in (32, 64, 128, 256):
        x = layers.Conv2D(filters, 3, padding="same")(x)
        x = layers.MaxPooling2D()(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
    x = _dense(layers.Flatten()(x), BASELINE_HEAD, dropout=0.4)
    return keras.Model(inputs, _probabilities(x, num_classes), name="baseline")


def fcn(num_classes: int) -> keras.Model:
    """Build seven convolutions at full resolution and global max pooling: 11,072,230 parameters at 514 classes.

    The forward pass takes 71 GMAC per 80 x 80 crop, 550 times that of `baseline`. Training needs about 200 MB of
    activations per crop. The input has any height and width, such as that of a line of a page.
    """
    inputs = keras.Input((None, None, 1))
    x = layers.Rescaling(1 / 255, dtype="float32")(inputs)
    for filters in FCN_FILTERS:
        x = layers.Conv2D(filters, 3, padding="same")(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
    x = layers.Conv2D(num_classes, 3, padding="same")(x)
    # In float32: with the 8 significant bits of bfloat16, more classes would have equal scores.
    x = layers.BatchNormalization(dtype="float32")(x)
    x = layers.ReLU(dtype="float32")(x)
    x = layers.GlobalMaxPooling2D(dtype="float32")(x)
    return keras.Model(inputs, layers.Softmax(dtype="float32")(x), name="fcn")


def base(architecture: str, weights: str | None) -> keras.Model:
    """Build the base of an architecture in `BASES`: N x 80 x 80 x 1 crops in, 0..255; feature maps out.

    weights: file of the base's weights without its top, as saved by Keras; None: random initialization.
    """
    inputs = keras.Input((SIDE, SIDE, 1))
    # All three were trained on -1..1, see `preprocess_input` of their modules.
    x = layers.Rescaling(1 / 127.5, offset=-1, dtype="float32")(inputs)
    x = layers.Concatenate()([x, x, x])
    model = getattr(keras.applications, BASES[architecture].name)(include_top=False, weights=None, input_tensor=x)
    if weights is not None:
        model.load_weights(weights)
    return model


def transfer(
    architecture: str, num_classes: int, weights: str | None = None, unfreeze: Unfreeze = "last"
) -> keras.Model:
    """Build a base in `BASES` with a head of dense layers. Keras keeps frozen batch norms in inference mode.

    weights: as for `base`. unfreeze: `all` trains the whole base, `last` its last layers.
    """
    base_model = base(architecture, weights)
    if unfreeze == "last":
        for layer in base_model.layers[: -BASES[architecture].last]:
            layer.trainable = False
    x = layers.GlobalAveragePooling2D()(base_model.output)
    x = _dense(layers.Dropout(0.2)(x), HEAD, dropout=0.3)
    return keras.Model(base_model.inputs[0], _probabilities(x, num_classes), name=architecture)


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
    "resnet": resnet,
    "baseline": baseline,
    **{name: partial(transfer, name) for name in BASES},
    "fcn": fcn,
}

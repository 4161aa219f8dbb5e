"""The initial model of a training: with random weights, with a pretrained base, or with those of a trained model.

In the last case, classes that both models have keep their trained weights.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError, OptionError, squeezed
from cluster.places import place
from job.config import TRANSFER, TrainConfig
from job.model.folder import CONFIG_FILE, LABELS_FILE, load_checked, read_json, read_trained_on
from job.model.pretrained import Weights, local_copy
from preprocessing.classes import CLASSES_FILE, read_class_names


def initial_model(
    config: TrainConfig, weights: Weights | None, class_names: Sequence[str]
) -> tuple[Any, NDArray[np.bool_]]:
    """Build the model of a training with its initial weights.

    Return it, and which of its K classes have the weights of a trained model, (K,). weights: what `obtain` returned.

    Raises:
        DamageError: the weights have changed since `obtain`.
        InputError: the trained model has other layers.
    """
    from job.model.architectures import ARCHITECTURES

    options = {"unfreeze": config.unfreeze} if config.architecture in TRANSFER else {}
    build = partial(ARCHITECTURES[config.architecture], len(class_names), **options)
    none = np.zeros(len(class_names), bool)
    if weights is None:
        return build(), none
    if not weights.is_model:
        with local_copy(weights) as file:
            return build(weights=file), none
    model = build()
    return model, start_from(model, class_names, place(weights.place))


def check_start(folder: UPath, architecture: str, dataset: UPath, margin: float) -> str:
    """Check that a training can start from a model. Return a line about its classes. margin: of the dataset's crops.

    Raises:
        OptionError: the model is of another architecture, or was trained on crops of another margin.
        InputError: the dataset has no file of classes.
        DamageError: the model's config is missing, or does not match its manifest.
    """
    of_model = read_trained_on(folder).margin  # checks the config
    found = read_json(folder / CONFIG_FILE).get("architecture")
    if found != architecture:
        raise OptionError(
            f"--weights must be a model of the architecture that is trained, {architecture}. Received: {folder}, a "
            f"model of {str(found)[:40]}"
        )
    if of_model != margin:
        raise OptionError(
            f"--dataset must have the margin of the model of --weights, {of_model:g}. Received: {margin:g}. Prepare it "
            f"with --margin {of_model:g}"
        )
    names, known = read_class_names(dataset / CLASSES_FILE), read_class_names(folder / LABELS_FILE)
    both = len({*names} & {*known})
    return f"starts from {folder}: {both} classes keep their weights, {len(names) - both} start fresh"


def start_from(model: Any, class_names: Sequence[str], folder: UPath) -> NDArray[np.bool_]:
    """Copy the weights of a trained model into a new one of the same architecture.

    Return which of the K classes got trained weights, (K,).

    In the last layer with a kernel, and in the batch norm that follows it in `fcn`, only classes that both models have
    get the trained weights; the others keep those of the new model.

    Raises:
        DamageError: the model does not match its manifest, or can't be loaded.
        InputError: the model has other layers.
    """
    trained, names = load_checked(folder)
    index_of = {name: index for index, name in enumerate(names)}
    own = [index for index, name in enumerate(class_names) if name in index_of]
    theirs = [index_of[class_names[index]] for index in own]
    with_kernel = [any(len(weight.shape) > 1 for weight in layer.weights) for layer in model.layers]
    last = len(with_kernel) - 1 - with_kernel[::-1].index(True)
    try:
        for number, (layer, source) in enumerate(zip(model.layers, trained.layers, strict=True)):
            for variable, given in zip(layer.weights, source.weights, strict=True):
                value = given.numpy()
                if number >= last:
                    of_classes = variable.numpy()
                    of_classes[..., own] = value[..., theirs]
                    value = of_classes
                variable.assign(value)
    except (ValueError, IndexError) as error:  # the numbers of layers or weights differ, or the shapes
        raise InputError(
            f"--weights must be a model with the layers of {model.name}. Received: {folder}: {squeezed(error, 200)}"
        ) from error
    return np.isin(np.arange(len(class_names)), own)

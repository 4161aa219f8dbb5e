"""Pictures for the report of a model: confused crops, augmented crops, and responses of convolutions."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from cluster.errors import DamageError
from job.data.staging import StagedDataset
from job.metrics import shown
from job.report import html

BOX_FIELDS = ("x", "y", "width", "height")
MAX_PAIRS = 24  # pictures of confusions
MAX_AUGMENTED = 40
MAX_CHANNELS = 24  # of a convolution
MAX_LAYERS = 4  # convolutions


def pairs(misclassified: pd.DataFrame, data: StagedDataset) -> Iterator[str]:
    """Show a pair of crops for each of the most frequent confusions.

    Left: a misclassified test crop. Right: a training crop of the predicted class; black if there is none.

    Raises:
        DamageError: a misclassified crop or its predicted class is not of the dataset.
    """
    test, train = data.splits["test"], data.splits["train"]
    test_index = {
        (page_id, *box): i for i, (page_id, box) in enumerate(zip(test.page_ids(), test.boxes.tolist(), strict=True))
    }
    class_index = {name: i for i, name in enumerate(data.class_names)}
    images, captions = [], []
    counts = misclassified.groupby(["label", "predicted"], sort=True).size()
    counts = counts.sort_values(ascending=False, kind="stable")
    for label, predicted, count in counts.head(MAX_PAIRS).reset_index().itertuples(index=False, name=None):
        confused = misclassified[(misclassified["label"] == label) & (misclassified["predicted"] == predicted)]
        first = confused.iloc[0]
        crop = test_index.get((first["image_id"], *(int(first[field]) for field in BOX_FIELDS)))
        if crop is None or predicted not in class_index:
            raise DamageError(
                "the misclassified crops of a model must be of the dataset that it was trained on. Received: "
                f"{shown(label)} on {first['image_id'][:80]!r}, predicted {shown(predicted)}. Pull the model again"
            )
        of_predicted = np.flatnonzero(train.labels == class_index[predicted])
        pair = [test.images[crop][:, :, 0]]
        pair.append(train.images[of_predicted[0]][:, :, 0] if len(of_predicted) else np.zeros_like(pair[0]))
        images.append(np.hstack(pair))
        captions.append(f"{shown(label)} → {shown(predicted)} ({count})")
    yield html.crops(images, captions)


def augmented_crops(data: StagedDataset) -> Iterator[str]:
    """Show training crops, each with an augmented copy such as a training step makes."""
    import tensorflow as tf

    from job.data.augment import augmented
    from job.data.chance import BatchRows

    crops = data.splits["train"].images[:MAX_AUGMENTED]
    after = augmented(crops, BatchRows(tf.constant(0, tf.int64), 0, len(crops)), seed=0).numpy().astype(np.uint8)
    yield html.paragraph("Each pair: a training crop, and an augmented copy. Each step makes new copies.")
    pairs = [np.hstack(pair) for pair in zip(crops[..., 0], after[..., 0], strict=True)]
    yield html.crops(pairs, [chr(code_point) for code_point in data.splits["train"].code_points[:MAX_AUGMENTED]])


def responses(model: Any, data: StagedDataset) -> Iterator[str]:
    """Show the outputs of the first convolutions for one test crop."""
    import keras

    crop = data.splits["test"].images[:1]
    yield html.crops([crop[0, :, :, 0]], [chr(int(data.splits["test"].code_points[0]))])
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)][:MAX_LAYERS]
    if not layers:
        return
    outputs = keras.Model(model.inputs[0], [layer.output for layer in layers])(crop, training=False)
    for layer, output in zip(layers, outputs if len(layers) > 1 else [outputs], strict=True):
        channels = np.moveaxis(np.asarray(output, np.float32)[0], -1, 0)[:MAX_CHANNELS]
        low, high = channels.min(axis=(1, 2), keepdims=True), channels.max(axis=(1, 2), keepdims=True)
        grey = (255 * (channels - low) / np.maximum(high - low, 1e-9)).astype(np.uint8)
        shape = f"{channels.shape[1]} x {channels.shape[2]}"
        yield html.paragraph(f"{layer.name}: {len(grey)} of {output.shape[-1]} filters, {shape}", "quiet")
        yield html.crops(list(grey), [""] * len(grey))

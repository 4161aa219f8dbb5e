"""A training's curves for TensorBoard, beside its models: `tensorboard --logdir <models>/tensorboard`."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upath import UPath

TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "accuracy": "accuracy/train",
    "val_accuracy": "accuracy/validation",
    "learning_rate": "learning_rate",
    "crops_per_s": "speed/crops_per_s",
    "seconds": "speed/seconds_an_epoch",
    "data_wait": "speed/data_wait",
}


def curves_folder(models: UPath, architecture: str, run: str) -> UPath:
    return models / "tensorboard" / architecture / run


def events_file(epoch: int) -> str:
    """An epoch's file: a name to each, for TensorBoard never looks again at what it has read to the end."""
    return f"events.out.tfevents.{epoch:05d}"


def events_of(row: Mapping[str, Any]) -> bytes:
    """row: of an epoch, as in `history.jsonl`."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as temporary:
        with SummaryWriter(temporary) as writer:
            for key, tag in TAGS.items():
                writer.add_scalar(tag, row[key], row["step"])
        (written,) = Path(temporary).iterdir()
        return written.read_bytes()

"""A training's curves for TensorBoard, beside its models: `tensorboard --logdir <models>/tensorboard`."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upath import UPath

EVENTS_FILE = "events.out.tfevents.epochs"  # TensorBoard finds a file by what its name begins with
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


def curves_file(models: UPath, architecture: str, run: str) -> UPath:
    return models / "tensorboard" / architecture / run / EVENTS_FILE


def events_of(history: Sequence[Mapping[str, Any]]) -> bytes:
    """All epochs so far: written anew each time, so that whoever goes on from a checkpoint tells no epoch twice.

    history: a row an epoch, as in `history.jsonl`.
    """
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as temporary:
        with SummaryWriter(temporary) as writer:
            for row in history:
                for key, tag in TAGS.items():
                    writer.add_scalar(tag, row[key], row["step"])
        (written,) = Path(temporary).iterdir()
        return written.read_bytes()

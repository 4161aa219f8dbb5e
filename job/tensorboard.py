"""A training's curves for TensorBoard, beside its models: `tensorboard --logdir <models>/tensorboard`."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from upath import UPath

from cluster.storage import write_bytes

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


def write_curves(folder: UPath, history: Sequence[Mapping[str, Any]]) -> None:
    """Write all epochs anew, as one file: whoever goes on after a checkpoint tells no epoch twice.

    history: a row an epoch, as in `history.jsonl`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        with SummaryWriter(temporary) as writer:
            for row in history:
                for key, tag in TAGS.items():
                    writer.add_scalar(tag, row[key], row["step"])
        (written,) = Path(temporary).iterdir()
        write_bytes(folder / EVENTS_FILE, written.read_bytes())

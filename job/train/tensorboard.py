"""A training's curves for TensorBoard, beside its models: `tensorboard --logdir <models>/tensorboard`."""

import time
from collections.abc import Callable
from threading import Thread

from upath import UPath

from job.report.side_files import write_side_file
from job.train.result import EpochRow
from preprocessing.records import frame

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


def begin_to_write(folder: UPath, row: EpochRow, say: Callable[[str], object]) -> Thread:
    """Write an epoch's numbers, while the training goes on: it must not wait for a slow bucket.

    Each epoch has a file of its own, for TensorBoard never looks again at one that it has
    read to the end; an epoch that is written again, after a worker was lost, takes the place of the first.
    """
    target = folder / f"events.out.tfevents.{row.epoch:05d}"
    thread = Thread(target=write_side_file, args=(target, lambda: events_of(row), say), daemon=True)
    thread.start()
    return thread


def events_of(row: EpochRow) -> bytes:
    """A file of TensorBoard's: TFRecords, of its version and of one step's numbers."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=getattr(row, key)) for key, tag in TAGS.items()]
    head = Event(wall_time=time.time(), file_version="brain.Event:2")
    numbers = Event(wall_time=time.time(), step=row.step, summary=Summary(value=values))
    return b"".join(frame(event.SerializeToString()) for event in (head, numbers))

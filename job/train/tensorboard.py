"""Curves of a training for TensorBoard, next to the models: `tensorboard --logdir <models>/tensorboard`."""

import time
from collections.abc import Callable
from threading import Thread

from upath import UPath

from job.report.side_files import write_side_file
from job.train.checkpoint import EpochRow
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


def write_in_background(folder: UPath, row: EpochRow, log: Callable[[str], object]) -> Thread:
    """Write the metrics of an epoch in a thread: the training must not wait for a slow bucket.

    Each epoch has its own file, since TensorBoard does not reread a file that it has read to the end. An epoch that is
    repeated after a worker failure overwrites its file. A failure to write is logged.
    """
    target = folder / f"events.out.tfevents.{row.epoch:05d}"
    thread = Thread(target=write_side_file, args=(target, lambda: events_of(row), log), daemon=True)
    thread.start()
    return thread


def events_of(row: EpochRow) -> bytes:
    """Return an event file of TensorBoard: two TFRecords, the version of the format and the scalars of one step."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=getattr(row, key)) for key, tag in TAGS.items()]
    header = Event(wall_time=time.time(), file_version="brain.Event:2")
    scalars = Event(wall_time=time.time(), step=row.step, summary=Summary(value=values))
    return b"".join(frame(event.SerializeToString()) for event in (header, scalars))

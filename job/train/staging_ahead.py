"""Stage the crops of a worker in a thread, while TensorFlow loads in the main thread."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Event

import ray.train

from cluster.errors import DamageError
from cluster.manifest import read_manifest
from cluster.places import place
from job.data.partitions import Partitions
from job.data.staging import StagedDataset, staged_shards
from job.train.board import Reporter
from job.train.job import TrainJob
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest


class StagingEndedError(Exception):
    """Staging was stopped because the worker ends."""


@contextmanager
def staging_ahead(job: TrainJob) -> Iterator[Callable[[], tuple[Partitions, StagedDataset]]]:
    """Stage the partitions that this worker holds, in a thread, while the block runs.

    When the block ends, staging stops, at the latest after its current shard, and the staged dataset is released.

    Yields:
        A function that waits for the staged dataset. It raises the exceptions of `staged_partitions`.
    """
    end = Event()
    with ExitStack() as stack, ThreadPoolExecutor(1, "staging") as thread:
        staged = thread.submit(lambda: stack.enter_context(staged_partitions(job, end)))
        try:
            yield staged.result
        finally:
            end.set()


@contextmanager
def staged_partitions(job: TrainJob, end: Event | None = None) -> Iterator[tuple[Partitions, StagedDataset]]:
    """Stage the partitions that this worker holds. end: stops the staging once it is set.

    Raises:
        InputError, OptionError, DamageError, KuzushijiError: as `staged_shards`.
        DamageError: the dataset was replaced since the run began, also if before a restart of the workers.
        StagingEndedError: `end` was set.
    """
    context, config = ray.train.get_context(), job.config
    manifest = read_manifest(place(job.dataset), DatasetManifest)
    if manifest.sha256 != job.dataset_manifest_sha256:
        raise DamageError(
            "--dataset must be the same on all hosts and not change during a training. Received: another one at "
            f"{job.dataset} on {socket.gethostname()}. Put the dataset back and run the same command again, or train "
            "on the new one with another --run"
        )
    rank, workers = context.get_world_rank(), context.get_world_size()
    partitions = Partitions.of(
        manifest, config.partitions, config.global_batch_size, config.seed, rank=rank, workers=workers
    )
    # All workers of the first host show progress: any of them may be the one that stages what they share.
    reporter = Reporter(job.board, config.architecture, context.get_node_rank())
    shards = {split: partitions.held_shards(split) for split in SPLITS}

    def check() -> None:
        if end and end.is_set():
            raise StagingEndedError

    with staged_shards(place(job.dataset), manifest, shards, reporter.progress, check, reporter.log) as dataset:
        yield partitions, dataset

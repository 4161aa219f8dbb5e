"""What a worker stages before it trains, in a thread, while TensorFlow loads in another."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Event

import ray.train

from cluster.manifest import read_manifest
from cluster.storage import place
from job.data.partitions import Partitions
from job.data.staging import StagedDataset, staged_shards
from job.train.display import Reporter
from job.train.run import TrainJob
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest


class StagingEndedError(Exception):
    """Staging ended early, because the worker does."""


@contextmanager
def staging_ahead(job: TrainJob) -> Iterator[Callable[[], tuple[Partitions, StagedDataset]]]:
    """Stage the partitions that this worker holds in a thread, while the block runs.

    Yields a function that waits for them, and raises as `staged_partitions`. When the block ends, staging ends at once,
    or with the shard that it is at, and what was staged is given up.
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
    """Stage the partitions that this worker holds. end: ends the staging once it is set.

    Raises:
        InputError, OptionError, DamageError, KuzushijiError: as `staged_shards`.
        StagingEndedError: `end` was set.
    """
    context, config = ray.train.get_context(), job.config
    manifest = read_manifest(place(job.dataset), DatasetManifest)
    rank, workers = context.get_world_rank(), context.get_world_size()
    partitions = Partitions.of(
        manifest, config.partitions, config.global_batch_size, config.seed, rank=rank, workers=workers
    )
    # Shown by the workers of the first host: which of them stages what they share is up to chance.
    reporter = Reporter(job.board, config.architecture, context.get_node_rank())
    shards = {split: partitions.held_shards(split) for split in SPLITS}

    def check() -> None:
        if end and end.is_set():
            raise StagingEndedError

    with staged_shards(place(job.dataset), manifest, shards, reporter.progress, check) as dataset:
        yield partitions, dataset

"""What each Ray Train worker does, from the start of its process to the sealed model folder."""

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray.train
import tensorflow as tf

from cluster.errors import DamageError, InputError, KuzushijiError, OptionError
from cluster.manifest import is_sealed, read_manifest
from cluster.storage import place
from job.data.partitions import Partitions
from job.data.staging import StagedDataset, staged_shards
from job.model.start import initial_model
from job.train.display import Reporter, StartUp
from job.train.rendezvous import shared_failure
from job.train.run import Failure, TrainJob
from job.train.step import out_of_memory_message
from job.train.strategy import configure_tensorflow, make_strategy
from job.train.training import Training
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest


def train_worker(job: TrainJob, start_up: StartUp) -> Failure | None:
    """Train, evaluate, and write the model folder.

    Returns None, or a failure that all workers share and a restart would not fix. Ray Train restarts all workers after
    any exception that is raised here.
    """
    if is_sealed(place(job.folder)):  # a worker failed after the folder was sealed, and all were restarted
        return None
    configure_tensorflow(job.config)
    # Before any computation: collectives can be configured only before TensorFlow runs operations.
    strategy = make_strategy(ray.train.get_context().get_world_size())
    with ExitStack() as stack:
        own, partitions, dataset, model = None, None, None, None
        try:
            partitions, dataset = stack.enter_context(staged_partitions(job))
            start_up.ends("connecting and staging")
            model = initial_model(job.config, job.weights, dataset.class_names)
        except (DamageError, InputError, OptionError) as error:
            own = Failure(str(error), traceback.format_exc())
        # Of any worker: the others would wait for it in the first collective.
        failure = shared_failure(job.board, job.config.architecture, own)
        if failure or not partitions or not dataset or not model:
            return failure
        training = Training(job, strategy, partitions, dataset, start_up, model)
        stack.callback(training.step_limit.stop)
        training.resume(place(job.checkpoints))
        start_up.ends("building the model")
        try:
            while not training.finished():
                training.run_epoch()
            predictions = training.predict_best()
        except KuzushijiError as error:
            return Failure(str(error), traceback.format_exc())
        except tf.errors.ResourceExhaustedError as error:
            if training.workers > 1:  # the other workers wait for this one in a collective until its process exits
                raise
            return Failure(out_of_memory_message(error), traceback.format_exc())
        try:
            training.write(predictions)
        except DamageError as error:  # another training of the same name was faster
            return Failure(str(error), traceback.format_exc())
    return None


@contextmanager
def staged_partitions(job: TrainJob) -> Iterator[tuple[Partitions, StagedDataset]]:
    """Stage the partitions that this worker holds.

    Raises:
        InputError, OptionError, DamageError, KuzushijiError: as `staged_shards`.
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
    with staged_shards(place(job.dataset), manifest, shards, reporter.progress) as dataset:
        yield partitions, dataset

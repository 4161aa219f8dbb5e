"""The work of a Ray Train worker once TensorFlow is loaded, up to the sealed model folder."""

import traceback
from collections.abc import Callable
from contextlib import ExitStack

import keras
import ray.train
import tensorflow as tf

from cluster.errors import DamageError, InputError, KuzushijiError, OptionError
from cluster.places import place
from job.data.partitions import Partitions
from job.data.staging import StagedDataset
from job.model.start import initial_model
from job.train.board import StartUp
from job.train.job import Failure, TrainJob
from job.train.rendezvous import shared_failure
from job.train.result import write_result
from job.train.step import out_of_memory_message
from job.train.strategy import configure_tensorflow, make_strategy
from job.train.training import Training


def train_worker(
    job: TrainJob, start_up: StartUp, staged: Callable[[], tuple[Partitions, StagedDataset]]
) -> Failure | None:
    """Train, evaluate, and write the model folder. staged: the function that `staging_ahead` yields.

    Return None, or a failure that all workers share and a restart would not fix. Ray Train restarts all workers after
    any exception that is raised here.
    """
    configure_tensorflow(job.config)
    # Before any computation: collectives can be configured only before TensorFlow runs operations.
    strategy = make_strategy(ray.train.get_context().get_world_size())
    with ExitStack() as stack:
        own, partitions, dataset, start = None, None, None, None
        try:
            partitions, dataset = staged()
            start_up.ends("connecting and staging")
            # Set the seed again: Keras draws the seeds of initial weights from Python's `random`, and so do retried
            # requests.
            keras.utils.set_random_seed(job.config.seed)
            start = initial_model(job.config, job.weights, dataset.class_names)
        except (DamageError, InputError, OptionError) as error:
            own = Failure(str(error), traceback.format_exc(), type(error))
        # If any worker has a failure, all return it: otherwise they would wait for that worker in the first collective.
        failure = shared_failure(job.board, job.config.architecture, own)
        if failure or not partitions or not dataset or not start:
            return failure
        training = Training(job, strategy, partitions, dataset, start_up, *start)
        stack.callback(training.step_limit.stop)
        try:
            training.resume(place(job.checkpoints))
        except DamageError as error:
            own = Failure(str(error), traceback.format_exc(), type(error))
        except tf.errors.ResourceExhaustedError as error:
            own = Failure(out_of_memory_message(error), traceback.format_exc())
        if failure := shared_failure(job.board, job.config.architecture, own):
            return failure
        start_up.ends("building the model")
        try:
            while not training.finished():
                training.run_epoch()
            predictions = training.predict_best()
        except KuzushijiError as error:
            return Failure(str(error), traceback.format_exc(), type(error))
        except tf.errors.ResourceExhaustedError as error:
            if training.workers > 1:  # the other workers wait for this one in a collective until its process exits
                raise
            return Failure(out_of_memory_message(error), traceback.format_exc())
        try:
            write_result(training, predictions)
        except DamageError as error:  # another training of the same name was faster
            return Failure(str(error), traceback.format_exc(), type(error))
    return None

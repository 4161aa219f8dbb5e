"""One Ray Train run: an architecture on a dataset, from the workers' start to the sealed model folder."""

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from upath import UPath

from cluster.errors import KuzushijiError, OptionError
from cluster.manifest import read_manifest
from cluster.models import ModelManifest, point_to_latest
from cluster.runtime import cause_of
from cluster.storage import (
    arrow_filesystem,
    is_file,
    list_folders,
    read_bytes,
    remove_file,
    remove_folder,
    remove_temporaries,
    write_bytes,
    writing_in,
)
from job.config import MAY_DIFFER, TrainConfig
from job.model.folder import METRICS_FILE, finished_config, read_json
from job.model.load_tensorflow import choose_backend
from job.model.pretrained import WeightsFile
from job.train.tensorboard import curves_folder

log = logging.getLogger("kuzushiji")

RUNS_FOLDER = ".runs"


@dataclass(frozen=True)
class TrainJob:
    """What each worker of a run gets."""

    config: TrainConfig
    weights: WeightsFile | None
    """The pretrained weights; None: random initialization."""
    dataset: str
    """Place of the dataset folder."""
    folder: str
    """Place of the model folder to write."""
    checkpoints: str
    """Place of the folder of all checkpoints of the run."""
    curves: str
    """Place of the folder of the curves for TensorBoard."""
    run: str
    """Name of the run."""
    board: Any
    """Handle of the actor `display.Board`."""


@dataclass(frozen=True)
class Failure:
    """A failure that all workers have alike, and that a restart would not mend. (Ray Train retries what is raised.)"""

    what: str
    """One line for the user."""
    where: str
    """The traceback, for --debug."""


@dataclass(frozen=True)
class Run:
    """A training with a name. While it is not finished, `<models>/.runs/` holds what it was begun with and its
    checkpoints.
    """

    name: str
    config: TrainConfig
    dataset: UPath
    dataset_manifest_sha256: str
    models: UPath

    @property
    def folder(self) -> UPath:
        return self.models / self.config.architecture / self.name

    @property
    def _train_name(self) -> str:
        return f"{self.config.architecture}-{self.name}"

    @property
    def _checkpoints(self) -> UPath:
        return self.models / RUNS_FOLDER / self._train_name

    @property
    def _begun_with(self) -> UPath:
        return self.models / RUNS_FOLDER / f"{self._train_name}.json"

    def is_finished(self) -> bool:
        """Whether there is nothing to do.

        Raises:
            OptionError: the run was begun with other options.
            DamageError: what it was begun with can't be read.
        """
        finished = finished_config(self.folder)
        if finished is not None:
            self._refuse_other(finished)
        elif is_file(self._begun_with):
            self._refuse_other(read_json(self._begun_with))
        return finished is not None

    def metrics(self) -> dict[str, Any]:
        """Of the finished run.

        Raises:
            DamageError: they can't be read.
        """
        return read_json(self.folder / METRICS_FILE)

    def _options(self) -> dict[str, Any]:
        return self.config.model_dump() | {"dataset_manifest_sha256": self.dataset_manifest_sha256}

    def _refuse_other(self, earlier: dict[str, Any]) -> None:
        now = self._options()
        differing = [key for key in now if key not in MAY_DIFFER and earlier.get(key) != now[key]]
        if differing:
            what = ", ".join(
                f"{key} (then {str(earlier.get(key))[:16]}, now {str(now[key])[:16]})" for key in differing
            )
            raise OptionError(
                f"a run that is called again must have the same options. Received: {what}. "
                f"Name another --run than {self.name}"
            )

    def fit(self, weights: WeightsFile | None, board: Any) -> None:
        """A process a worker, spread over the hosts; all begin again from the last checkpoint when one is lost.

        Raises:
            KuzushijiError: the training itself can't go on; nothing is tried again.
            Exception: whatever the last of the tries failed of; the run can be called again.
        """
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from job.train.display import LogFailures
        from job.train.rendezvous import Rendezvous

        self._drop_torn_list()
        write_bytes(self._begun_with, (json.dumps(self._options(), indent=2) + "\n").encode())
        config, storage = self.config, self.models / RUNS_FOLDER
        job = TrainJob(
            config=config,
            weights=weights,
            dataset=str(self.dataset),
            folder=str(self.folder),
            checkpoints=str(self._checkpoints),
            curves=str(curves_folder(self.models, config.architecture, self.name)),
            run=self.name,
            board=board,
        )
        trainer = DataParallelTrainer(
            _work,
            backend_config=Rendezvous(),
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker={"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker},
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name=self._train_name,
                storage_path=storage.path,
                storage_filesystem=arrow_filesystem(storage),
                # Two: a recovery can begin from the checkpoint before the last.
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                failure_config=FailureConfig(max_failures=config.max_failures),
                callbacks=[LogFailures(board, config.architecture)],
            ),
        )
        try:
            failure: Failure | None = trainer.fit().return_value
        except Exception as error:
            with writing_in(self.models):
                raise cause_of(error) from error  # which holds the worker's traceback, for --debug
        if failure:
            raise KuzushijiError(failure.what) from RuntimeError(failure.where)
        self.tidy()

    def _drop_torn_list(self) -> None:
        """Begin anew, with the same result, where Ray Train's list of checkpoints can't be used: it is written in
        place, so that who is killed just then leaves a part of it. Ray would refuse it each time.
        """
        snapshot = self._checkpoints / "checkpoint_manager_snapshot.json"
        if not is_file(snapshot):
            return
        for _ in range(3):  # who was left behind may just be writing it
            try:
                listed = json.loads(read_bytes(snapshot))["checkpoint_results"]
                if {one["checkpoint_dir_name"] for one in listed} <= set(list_folders(self._checkpoints)):
                    return
            except (ValueError, KeyError, TypeError):
                pass
            time.sleep(1)
        log.warning("%s is torn, or names what is gone: %s begins anew", snapshot, self._train_name)
        remove_folder(self._checkpoints)

    def tidy(self) -> None:
        """After the folder was sealed: nobody goes on from the checkpoints, which are larger than the model."""
        point_to_latest(self.folder, read_manifest(self.folder, ModelManifest))  # it may have been killed just before
        remove_temporaries(self.folder)
        remove_folder(self._checkpoints)
        remove_file(self._begun_with)


def _work(config: dict[str, TrainJob]) -> Failure | None:
    """The function that Ray Train runs on each worker. The rest is imported there: the driver needs no TensorFlow."""
    job = config["job"]
    choose_backend()
    from job.train.display import LogLine, StartUp

    start_up = StartUp()
    import ray.train

    if ray.train.get_context().get_world_rank() == 0:
        text = "the workers have started; TensorFlow takes a while to load"
        job.board.post.remote(LogLine(job.config.architecture, text))
    from job.train.worker import train_worker

    start_up.ends("loading TensorFlow")
    return train_worker(job, start_up)

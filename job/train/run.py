"""One Ray Train run: an architecture on a dataset, from the start of the workers to the sealed model folder."""

import json
import logging
import threading
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

from upath import UPath

from cluster.errors import DamageError, OptionError, one_line
from cluster.lock import locked
from cluster.manifest import is_sealed, read_manifest
from cluster.models import ModelManifest, point_to_latest
from cluster.places import arrow_filesystem, place
from cluster.runtime import cause_of
from cluster.storage import (
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
from job.model.pretrained import Weights
from job.train.job import Failure, TrainJob

log = logging.getLogger("kuzushiji")

RUNS_FOLDER = ".runs"
# Seconds after the deadline of a drained node in which a worker on another node may finish the upload of a checkpoint.
# `relax_collectives_on_preemption` stays off: with it, a check for drained nodes would not wait for all workers, and a
# worker that is late would hang in it (Ray 2.60, `SynchronizationActor.set_required_ranks`).
UPLOAD_GRACE_SECONDS = 60

REMOVED = {"class_weights": "none"}  # options of earlier releases, with the only value that a run may have


@dataclass(frozen=True)
class Run:
    """A named training. Until it is finished, `<models>/.runs/` holds its options and its checkpoints."""

    name: str
    config: TrainConfig
    dataset: UPath
    dataset_manifest_sha256: str
    models: UPath
    lost: threading.Event = field(default_factory=threading.Event, compare=False)
    """Set when another process has taken over the run. This process must not continue to train it."""

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
    def _lock_file(self) -> UPath:
        return self.models / RUNS_FOLDER / f"{self._train_name}.lock"

    @property
    def _options_file(self) -> UPath:
        return self.models / RUNS_FOLDER / f"{self._train_name}.json"

    def locked(self) -> AbstractContextManager[None]:
        """Return a context manager that keeps other processes from training the run.

        A second process would remove the checkpoints of the first, see `checkpoint.remove_unknown`.

        Raises:
            OptionError: another process trains the run.
        """
        return locked(self._lock_file, f"--run {self.name} of {self.config.architecture}", self.lost)

    def is_finished(self) -> bool:
        """Return whether the model folder is sealed.

        Raises:
            OptionError: the run was started with other options.
            DamageError: the file with these options can't be read.
        """
        finished = finished_config(self.folder)
        if finished is not None:
            self._check_same_options(finished)
        elif is_file(self._options_file):
            self._check_same_options(read_json(self._options_file))
        return finished is not None

    def metrics(self) -> dict[str, Any]:
        """Return `metrics.json` of the finished run.

        Raises:
            DamageError: it can't be read.
        """
        return read_json(self.folder / METRICS_FILE)

    def _options(self) -> dict[str, Any]:
        return self.config.model_dump() | {"dataset_manifest_sha256": self.dataset_manifest_sha256}

    def _check_same_options(self, earlier: dict[str, Any]) -> None:
        if removed := [name for name, value in REMOVED.items() if earlier.get(name, value) != value]:
            raise OptionError(
                f"a run must have no option that was removed since it began. Received: {removed[0]} "
                f"{str(earlier[removed[0]])[:16]}. Use another --run than {self.name}"
            )
        now = self._options()
        # An option that is missing was added after the release that started the run. The run used what is now its
        # default.
        fields = TrainConfig.model_fields.items()
        earlier = {name: field.default for name, field in fields if not field.is_required()} | earlier
        differing = [key for key in now if key not in MAY_DIFFER and earlier.get(key) != now[key]]
        if differing:
            changes = ", ".join(
                f"{key} (was {str(earlier.get(key))[:16]}, now {str(now[key])[:16]})" for key in differing
            )
            raise OptionError(
                f"a run must be resumed with the same options. Received: {changes}. "
                f"Use the same options, or another --run than {self.name}. See docs/models.md#resume-a-training"
            )

    def fit(self, weights: Weights | None, board: Any) -> None:
        """Train with Ray Train: one process per worker, spread over the hosts.

        If a worker fails, all workers restart from the last checkpoint. Call it within `locked`. weights: the
        pretrained weights; None: random initialization. board: handle of the actor `board.Board`.

        Raises:
            KuzushijiError: a failure that a restart would not fix; it is not retried.
            Exception: the failure of the last attempt. The run can be resumed.
        """
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from job.train.callbacks import LogFailures, ReportStarts
        from job.train.rendezvous import Rendezvous

        self._drop_torn_list()
        # Before Ray Train: with permissions for objects only, gcsfs takes an empty bucket for a missing one, and tries
        # to create it (github.com/fsspec/gcsfs/issues/699).
        write_bytes(self._options_file, (json.dumps(self._options(), indent=2) + "\n").encode())
        config, storage = self.config, self.models / RUNS_FOLDER
        job = TrainJob(
            config=config,
            weights=weights,
            dataset=str(self.dataset),
            dataset_manifest_sha256=self.dataset_manifest_sha256,
            folder=str(self.folder),
            checkpoints=str(self._checkpoints),
            curves=str(self.models / "tensorboard" / config.architecture / self.name),
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
                # Two: a restart may use the second-last checkpoint.
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                failure_config=FailureConfig(max_failures=config.max_failures, preemption_grace_s=UPLOAD_GRACE_SECONDS),
                callbacks=[LogFailures(board, config.architecture), ReportStarts(board, config.architecture)],
            ),
        )
        try:
            failure: Failure | None = trainer.fit().return_value
        except Exception as error:
            finished = False
            with suppress(Exception):  # a second failure must not hide the first
                finished = self.is_finished()
            if not finished:
                with writing_in(self.models):
                    raise cause_of(error) from error  # `error` holds the worker's traceback, for --debug
            failure = None
            text = "%s: the training ended with an error after the model was finished; its report may be missing: %s"
            log.warning(text, config.architecture, one_line(cause_of(error)))
        if failure:
            raise failure.kind(failure.message) from RuntimeError(failure.traceback)
        self._tidy()

    def _drop_torn_list(self) -> None:
        """Remove all checkpoints if Ray Train's list of them can't be used. The run then restarts with the same result.

        Ray Train writes the list in place: a process that is killed meanwhile leaves a part of it, and Ray Train would
        fail on it each time. A list that names missing checkpoints can't be used either.

        Raises:
            DamageError: the list is complete, but was not written by this version of Ray. Nothing is removed.
        """
        snapshot = self._checkpoints / "checkpoint_manager_snapshot.json"
        if not is_file(snapshot):
            return
        for _ in range(3):  # a process of an earlier attempt may still be writing it
            try:
                content = json.loads(read_bytes(snapshot))
            except ValueError:
                pass
            else:
                if self._names_in(snapshot, content) <= set(list_folders(self._checkpoints)):
                    return
            time.sleep(1)
        log.warning("%s is corrupt or lists missing checkpoints: %s restarts from epoch 1", snapshot, self._train_name)
        remove_folder(self._checkpoints)

    def _names_in(self, snapshot: UPath, content: Any) -> set[str]:
        """Return the names of the checkpoints that Ray Train lists."""
        import ray

        try:
            if content["ray_version"] != ray.__version__:
                raise ValueError(f"of Ray {content['ray_version']}")
            return {entry["checkpoint_dir_name"] for entry in content["checkpoint_results"]}
        except (KeyError, TypeError, ValueError) as error:
            raise DamageError(
                f"{snapshot} must be a list of checkpoints of Ray {ray.__version__}. Received: another one ({error}). "
                f"Finish the run with the Ray version that started it, or remove {self._checkpoints}"
            ) from error

    def tidy(self) -> None:
        """Complete the cleanup of a finished run that was killed, unless another process holds the run's lock."""
        if is_file(self._options_file):
            with suppress(OptionError), self.locked():
                self._tidy()
        else:
            point_to_latest(self.folder, read_manifest(self.folder, ModelManifest))

    def _tidy(self) -> None:
        """Remove the checkpoints and the options of a finished run. Checkpoints are larger than the model."""
        # `latest.json`, too: the run may have been killed between sealing the folder and updating `latest.json`.
        point_to_latest(self.folder, read_manifest(self.folder, ModelManifest))
        remove_temporaries(self.folder)
        remove_folder(self._checkpoints)
        remove_file(self._options_file)


def _work(config: dict[str, TrainJob]) -> Failure | None:
    """Do the work of one Ray Train worker. Imports are local, so that the driver does not load TensorFlow."""
    job = config["job"]
    if is_sealed(place(job.folder)):  # a worker failed after the folder was sealed, so all were restarted
        return None
    choose_backend()
    from job.train.board import LogLine, StartUp
    from job.train.staging_ahead import staging_ahead

    start_up = StartUp()
    import ray.train

    if ray.train.get_context().get_world_rank() == 0:
        text = "the workers have started; TensorFlow takes a while to load"
        job.board.post.remote(LogLine(job.config.architecture, text))
        job.board.set_workers.remote(job.config.architecture, True)
    with staging_ahead(job) as staged:
        if job.config.gpus_per_worker:
            from job.train.rendezvous import shared_failure
            from job.train.strategy import fault_of_gpus

            fault = fault_of_gpus(job.config.gpus_per_worker)
            failure = shared_failure(job.board, job.config.architecture, Failure(fault, "") if fault else None)
            if failure:
                return failure
        from job.train.worker import train_worker

        start_up.ends("loading TensorFlow")
        return train_worker(job, start_up, staged)

"""The driver of a training: checks what can be checked at once, then hands it to Ray Train."""

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

from upath import UPath

from cluster.errors import DamageError, InputError, OptionError
from cluster.manifest import DatasetManifest, ModelManifest, read_manifest, verify
from cluster.models import point_to_latest
from cluster.runtime import cause_of, ray_session
from cluster.storage import is_local, plain_name, remove_folder, write_bytes
from job.config import TrainConfig
from job.model_folder import finished_config
from job.startup import without_chatter
from preprocessing.split import SPLITS

log = logging.getLogger("kuzushiji")

RUNS_FOLDER = ".runs"
# How often lost workers are replaced before a run is given up.
MAX_FAILURES = 3
# What may differ when a run is called again: the result hangs on none of these but by rounding.
PLACEMENT = {"workers", "gpus_per_worker", "cpus_per_worker"}


def new_run_name() -> str:
    """A name that no earlier run has: the time, to the microsecond."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")


def default_cpus_per_worker(workers: int) -> int:
    """An equal share of this machine, or 1 on a cluster, whose hosts this machine does not know."""
    return 1 if os.environ.get("RAY_ADDRESS") else max(1, (os.cpu_count() or 1) // workers)


def train(dataset: UPath, models: UPath, config: TrainConfig, run: str) -> tuple[UPath, bool]:
    """Train, evaluate and seal `<models>/<architecture>/<run>/`; a run that is called again continues.

    Returns the model folder, and whether there was anything to do.

    Raises:
        OptionError: more workers than crops in a batch, or the run was begun with other options.
        InputError, DamageError: the dataset can't be used, or is not what its manifest says.
    """
    _check_run(run)
    manifest = _check_dataset(dataset)
    config = _fit_batch(manifest, config)
    folder = models / config.architecture / run
    name = f"{config.architecture}-{run}"
    begun_with = models / RUNS_FOLDER / f"{name}.json"
    now = config.model_dump() | {"dataset_manifest_sha256": manifest.sha256}
    finished = finished_config(folder)
    if finished is not None:
        _refuse_other(run, finished, now)
        point_to_latest(folder, read_manifest(folder, ModelManifest))  # it may have been killed just before
    else:
        if begun_with.is_file():
            _refuse_other(run, json.loads(begun_with.read_bytes()), now)
        else:
            write_bytes(begun_with, (json.dumps(now, indent=2) + "\n").encode())
        with ray_session(at_least_cpus=config.workers * config.cpus_per_worker):
            _fit(dataset, models, config, run, folder)
    # The folder is sealed: nobody continues from the checkpoints, which are three times as large as the model.
    remove_folder(models / RUNS_FOLDER / name)
    begun_with.unlink(missing_ok=True)
    return folder, finished is None


def _check_run(run: str) -> None:
    try:
        plain_name(run, "--run")
    except InputError as error:
        raise OptionError(str(error)) from None
    if run.endswith(".json"):
        raise OptionError(f"--run must not end in .json, which names files beside the runs. Received: {run}")


def _check_dataset(dataset: UPath) -> DatasetManifest:
    """The manifest, after all files of a local dataset were hashed: a retry of the workers would not mend them."""
    manifest = read_manifest(dataset, DatasetManifest)
    faults = verify(dataset)[1] if is_local(dataset) else []
    if faults:
        raise DamageError(f"{dataset}: {'; '.join(faults)}. Run the same prepare again: it makes again what is damaged")
    return manifest


def _fit_batch(manifest: DatasetManifest, config: TrainConfig) -> TrainConfig:
    """Lower the global batch size to the number of crops where there are fewer, and say so."""
    of_split = {split: sum(shard.examples for shard in manifest.shards_of(split)) for split in SPLITS}
    if not all(of_split.values()):
        raise InputError(f"--dataset must have crops in every split. Received: {of_split}")
    crops = of_split["train"]
    size = min(config.global_batch_size, crops)
    if size < config.global_batch_size:
        log.warning(
            "--global-batch-size %d is lowered to %d, all crops there are to train on", config.global_batch_size, size
        )
    replicas = config.workers * max(1, config.gpus_per_worker)
    if replicas > size:
        raise OptionError(
            f"each worker (and GPU) must get a crop of each batch. Received: {replicas} for a batch of {size}"
        )
    return config.model_copy(update={"global_batch_size": size})


def _refuse_other(run: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in now if key not in PLACEMENT and earlier.get(key) != now[key]]
    if differing:
        what = ", ".join(f"{key} (then {str(earlier.get(key))[:16]}, now {str(now[key])[:16]})" for key in differing)
        raise OptionError(
            f"a run that is called again must have the same options. Received: {what}. Name another --run than {run}"
        )


def _fit(dataset: UPath, models: UPath, config: TrainConfig, run: str, folder: UPath) -> None:
    """One Ray Train run: a process a worker, spread over the hosts, restarted from the last checkpoint when one is
    lost.
    """
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    from job.board import TellFailures, watched

    with without_chatter():  # it imports TensorFlow only to see that it is there
        from ray.train.tensorflow import TensorflowTrainer

    storage = models / RUNS_FOLDER
    log.info("%s: %d workers start; TensorFlow takes half a minute to load", config.architecture, config.workers)
    with watched() as board:
        trainer = TensorflowTrainer(
            _work,
            train_loop_config={
                "config": config.model_dump(),
                "dataset": str(dataset),
                "folder": str(folder),
                "run": run,
                "board": board,
            },
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker={"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker},
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name=f"{config.architecture}-{run}",
                storage_path=storage.path,
                storage_filesystem=None if is_local(storage) else PyFileSystem(FSSpecHandler(storage.fs)),
                # Two: a recovery can begin from the checkpoint before the last.
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                callbacks=[TellFailures(board)],
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise cause_of(error) from None


def _work(job: dict[str, Any]) -> None:
    """Imported on the worker: the driver needs no TensorFlow."""
    from job.worker import train_worker

    train_worker(job)

"""The driver of a training: checks what can be checked at once, then hands it to Ray Train."""

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

from upath import UPath

from cluster.errors import DamageError, InputError, OptionError
from cluster.manifest import DatasetManifest, read_manifest, verify
from cluster.runtime import cause_of, ray_session
from cluster.storage import is_local, plain_name, remove_folder, write_bytes
from job.config import TrainConfig
from job.model_folder import finished_config
from job.startup import without_chatter

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
    plain_name(run, "--run")
    manifest = _check_dataset(dataset)
    config = _fit_batch(manifest, config)
    folder = models / config.architecture / run
    finished = finished_config(folder)
    if finished is not None:
        _refuse_other(run, finished, config.model_dump())
        return folder, False
    name = f"{config.architecture}-{run}"
    _remember(models / RUNS_FOLDER / f"{name}.json", run, config, manifest)
    with ray_session(at_least_cpus=config.workers * config.cpus_per_worker):
        _fit(dataset, models, config, run, folder)
    # The folder is sealed: nobody continues from the checkpoints, which are three times as large as the model.
    remove_folder(models / RUNS_FOLDER / name)
    (models / RUNS_FOLDER / f"{name}.json").unlink(missing_ok=True)
    return folder, True


def _check_dataset(dataset: UPath) -> DatasetManifest:
    """The manifest, after all files of a local dataset were hashed: a retry of the workers would not mend them."""
    manifest = read_manifest(dataset, DatasetManifest)
    faults = verify(dataset)[1] if is_local(dataset) else []
    if faults:
        raise DamageError(f"{dataset}: {'; '.join(faults)}. Run the same prepare again: it makes again what is damaged")
    return manifest


def _fit_batch(manifest: DatasetManifest, config: TrainConfig) -> TrainConfig:
    """Lower the global batch size to the number of crops where there are fewer, and say so."""
    crops = sum(shard.examples for shard in manifest.shards_of("train"))
    if not crops:
        raise InputError("--dataset must have crops to train on. Received: none")
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
        what = ", ".join(f"{key} (then {earlier.get(key)}, now {now[key]})" for key in differing)
        raise OptionError(
            f"a run that is called again must have the same options. Received: {what}. Name another --run than {run}"
        )


def _remember(path: UPath, run: str, config: TrainConfig, manifest: DatasetManifest) -> None:
    """Keep what a run was begun with beside Ray Train's files, or hold a continued run to it."""
    now = config.model_dump() | {"dataset": manifest.fingerprint}
    if path.is_file():
        _refuse_other(run, json.loads(path.read_bytes()), now)
    else:
        write_bytes(path, (json.dumps(now, indent=2) + "\n").encode())


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

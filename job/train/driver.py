"""The driver of trainings: checks what can be checked at once, then hands each architecture to Ray Train.

They run side by side where the hosts hold them, else one after the other. One that fails takes no other along.
"""

import importlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from upath import UPath

from cluster.errors import DamageError, InputError, OptionError, one_line
from cluster.manifest import read_manifest, verify
from cluster.runtime import ray_session
from cluster.storage import is_local, plain_name
from job.config import RECIPES, TrainConfig
from job.model.pretrained import WeightsFile, obtain
from job.report.side_files import REPORT_SUFFIX
from job.train.run import Run
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest

log = logging.getLogger("kuzushiji")

SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Outcome:
    """How the run of one architecture ended."""

    architecture: str
    folder: UPath
    """Sealed, if there is no error."""
    trained: bool
    """False: the run was finished before."""
    metrics: dict[str, Any]
    """What `metrics.json` holds; nothing, if there is an error."""
    error: Exception | None = None


def new_run_name() -> str:
    """A name that no earlier run has: the time, to the microsecond."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")


def default_cpus_per_worker(workers: int) -> int:
    """An equal share of this machine, or 1 on a cluster, whose hosts this machine does not know."""
    return 1 if os.environ.get("RAY_ADDRESS") else max(1, (os.cpu_count() or 1) // workers)


def train(
    dataset: UPath, models: UPath, configs: Sequence[TrainConfig], run: str, handed: WeightsFile | None = None
) -> list[Outcome]:
    """Train, evaluate and seal `<models>/<architecture>/<run>/` for each config; a run that is called again continues.

    handed: the file of `TrainConfig.weights`, if one was handed over. The outcomes come in the order of the configs,
    which need the same workers, CPUs and GPUs. Failures are in them, unless there is one config alone.

    Raises:
        Exception: what the training of a config alone failed of.
        OptionError: more workers than crops in a batch, or a run was begun with other options; nothing was started.
        InputError, DamageError: the dataset can't be used, or is not what its manifest says.
    """
    began = time.monotonic()
    _check_run(run)
    manifest = _check_dataset(dataset)
    runs = [Run(run, _fit_batch(manifest, config), dataset, manifest.sha256, models) for config in configs]
    alone = len(runs) == 1
    if len({one.folder for one in runs}) < len(runs):
        raise OptionError("each architecture must be given once. Received: one with two configs")
    outcomes: dict[Run, Outcome] = {}
    for one in runs:
        try:
            if one.is_finished():
                one.tidy()
                outcomes[one] = Outcome(one.config.architecture, one.folder, False, one.metrics())
        except OptionError:  # of the command as a whole; nothing was started
            raise
        except Exception as error:
            outcomes[one] = _failed(one, error, alone)
    ready: dict[Run, WeightsFile | None] = {}
    for one in runs:
        try:
            if one not in outcomes:
                ready[one] = obtain(one.config, handed, models)
        except Exception as error:
            outcomes[one] = _failed(one, error, alone)
    if ready:
        _log_determinism(configs[0])
        with ray_session(at_least_cpus=configs[0].workers * configs[0].cpus_per_worker), _said_how_to_go_on(run):
            for one, failure in _side_by_side(ready, began):
                try:
                    if failure:
                        raise failure
                    outcomes[one] = Outcome(one.config.architecture, one.folder, True, one.metrics())
                except Exception as error:
                    outcomes[one] = _failed(one, error, alone)
    return [outcomes[one] for one in runs]


def _log_determinism(config: TrainConfig) -> None:
    if not config.deterministic:
        log.info("weights are not bit-identical from run to run; --deterministic makes them so, with slower kernels")
    elif config.gpus_per_worker:
        log.info("--deterministic on GPUs: without XLA, and with slower kernels; --fast uses XLA and faster kernels")


@contextmanager
def _said_how_to_go_on(run: str) -> Iterator[None]:
    """Here, since Ray ends this process, with 1, when it is shut down while threads wait for it."""
    try:
        yield
    except KeyboardInterrupt:
        log.warning("stopped; the same command with --run %s goes on from the last checkpoint, if there is one", run)
        raise


def _failed(run: Run, error: Exception, alone: bool) -> Outcome:
    if alone:
        raise error
    log.error("%s: failed: %s", run.config.architecture, one_line(error))
    log.debug("where:", exc_info=error)
    return Outcome(run.config.architecture, run.folder, trained=False, metrics={}, error=error)


def _side_by_side(ready: Mapping[Run, WeightsFile | None], began: float) -> Iterator[tuple[Run, Exception | None]]:
    """Start the next run whenever the hosts hold one more, until all have ended. Yields each as it ends, with what it
    failed of. began: `time.monotonic()` of the command.
    """
    from job.train.display import RunState, watched

    importlib.import_module("ray.train.v2.api.data_parallel_trainer")  # seconds; before there are threads
    ended: queue.SimpleQueue[tuple[Run, Exception | None]] = queue.SimpleQueue()
    waiting, running = deque(ready), 0
    with watched([run.config.architecture for run in ready]) as board:

        def fit(run: Run) -> None:
            error: Exception | None = None
            try:
                run.fit(ready[run], board)
            except BaseException as raised:  # whatever it is, the loop below waits to hear of it
                error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
            ended.put((run, error))

        while waiting or running:
            # The first starts in any case: a cluster may add hosts for it.
            while waiting and running < max(1, _runs_held(waiting[0].config)):
                run = waiting.popleft()
                running += 1
                board.post.remote(RunState(run.config.architecture, "workers start", starts=True))
                log.info(
                    "%s: %d workers start, %.1f s after the command",
                    run.config.architecture,
                    run.config.workers,
                    time.monotonic() - began,
                )
                # Ray Train blocks the thread that calls it. A daemon: Ctrl-C ends the command and Ray, not only it.
                threading.Thread(target=fit, args=(run,), daemon=True).start()
            with suppress(queue.Empty):
                run, error = ended.get(timeout=SECONDS_BETWEEN_LOOKS)
                running -= 1
                board.post.remote(RunState(run.config.architecture, "failed" if error else "finished"))
                yield run, error


def _runs_held(config: TrainConfig) -> int:
    """How many runs of this size the living hosts hold at once; a worker stays on one host."""
    import ray

    workers = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        held = has.get("CPU", 0) // config.cpus_per_worker
        if config.gpus_per_worker:
            held = min(held, has.get("GPU", 0) // config.gpus_per_worker)
        workers += int(held)
    return workers // config.workers


def _check_run(run: str) -> None:
    try:
        plain_name(run, "--run")
    except InputError as error:
        raise OptionError(str(error)) from None
    if run.endswith((".json", REPORT_SUFFIX)):
        raise OptionError(
            f"--run must not end in .json or {REPORT_SUFFIX}, which name files beside the runs. Received: {run}"
        )


def _check_dataset(dataset: UPath) -> DatasetManifest:
    """The manifest, after all files of a local dataset were hashed: a retry of the workers would not mend them."""
    manifest = read_manifest(dataset, DatasetManifest)
    faults = verify(dataset, [DatasetManifest])[1] if is_local(dataset) else []
    if faults:
        raise DamageError(f"{dataset}: {'; '.join(faults)}. Run the same prepare again: it makes again what is damaged")
    return manifest


def _fit_batch(manifest: DatasetManifest, config: TrainConfig) -> TrainConfig:
    """Lower the global batch size to the number of crops where there are fewer, and say so, as well as what a batch
    size other than the recipe's does not change.
    """
    of_split = {split: sum(shard.examples for shard in manifest.shards_of(split)) for split in SPLITS}
    if not all(of_split.values()):
        raise InputError(f"--dataset must have crops in every split. Received: {of_split}")
    crops = of_split["train"]
    size = min(config.global_batch_size, crops)
    if size < config.global_batch_size:
        log.warning(
            "%s: --global-batch-size %d is lowered to %d, all crops there are to train on",
            config.architecture,
            config.global_batch_size,
            size,
        )
    replicas = config.workers * max(1, config.gpus_per_worker)
    if replicas > size:
        raise OptionError(
            f"each worker (and GPU) must get a crop of each batch. Received: {replicas} for a batch of {size}"
        )
    recipe = RECIPES[config.architecture].global_batch_size
    if size != recipe:
        log.info(
            "%s: global batch size %d, the recipe's is %d; the learning rate stays %g, it is not scaled",
            config.architecture,
            size,
            recipe,
            config.learning_rate,
        )
    return config.model_copy(update={"global_batch_size": size})

"""The driver of trainings: checks the options and the dataset, then starts one Ray Train run per architecture.

Runs are concurrent if the cluster has room for them, else they start one after the other. A failed run does not stop
the others, unless another process has taken it over: its training can't be stopped alone.
"""

import importlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from upath import UPath

from cluster.capacity import START_LIMIT, Request, Wait, has_autoscaler, hosts
from cluster.errors import DamageError, KuzushijiError, OptionError, counted, one_line
from cluster.manifest import faults_of, read_manifest
from cluster.places import is_local, place, plain_option
from cluster.runtime import Session, ray_session, usable_cpus, uses_cluster
from cluster.storage import list_files
from job.config import TrainConfig
from job.model.pretrained import Weights, obtain
from job.model.start import check_start
from job.report.side_files import REPORT_SUFFIX
from job.train.batches import fit_to_dataset
from job.train.run import Run
from preprocessing.dataset import DatasetManifest

log = logging.getLogger("kuzushiji")

SECONDS_BETWEEN_CHECKS = 1.0
SECONDS_FOR_BOARD = 10.0
# The most runs that wait for hosts of an autoscaler at the same time. Each has four processes on the head node.
MOST_AT_ONCE = 16


@dataclass(frozen=True)
class Outcome:
    """Result of the run of one architecture."""

    architecture: str
    folder: UPath
    """The model folder; sealed if there is no error."""
    trained: bool
    """False if the run was already finished, or failed."""
    metrics: dict[str, Any]
    """Content of `metrics.json`; empty if there is an error."""
    error: Exception | None = None


def _new_run_name() -> str:
    """Return a unique name: the time in UTC, to the microsecond."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")


def default_cpus_per_worker(workers: int) -> int:
    """Return an equal share of this process's CPUs. On a cluster, return 1: the CPUs of its hosts are unknown here."""
    return 1 if uses_cluster() else max(1, usable_cpus() // workers)


def train(
    dataset: UPath,
    models: UPath,
    configs: Sequence[TrainConfig],
    run: str | None,
    weights: Weights | None = None,
    start_limit: float = START_LIMIT,
) -> list[Outcome]:
    """Train, evaluate and seal `<models>/<architecture>/<run>/` for each config. Resume unfinished runs.

    Args:
        dataset: the dataset folder.
        models: the folder of all models.
        configs: one per architecture. All need the same workers, CPUs and GPUs.
        run: name of the runs; None: a new one, which is logged.
        weights: the file or model that `TrainConfig.weights` names by its hash.
        start_limit: seconds that workers may wait for hosts of a cluster while no run has workers.

    Returns:
        The outcomes in the order of the configs, including failures. The failure of a single config is raised instead.

    Raises:
        OptionError: a batch has fewer crops than there are replicas, a run was started with other options, or Ray has
            no room. Nothing is started.
        InputError, DamageError: the dataset can't be used, or does not match its manifest.
        Exception: the failure of the only config, such as OptionError if another process trains the run.
    """
    began = time.monotonic()
    name = _new_run_name() if run is None else run
    _check_run_name(name)
    manifest = _check_dataset(dataset)
    start = ""
    if weights and weights.is_model:
        start = check_start(place(weights.place), configs[0].architecture, dataset, manifest.margin)
    runs = [Run(name, fit_to_dataset(manifest, config), dataset, manifest.sha256, models) for config in configs]
    only_one = len(runs) == 1
    outcomes: dict[Run, Outcome] = {}
    for training in runs:
        try:
            if training.is_finished():
                training.tidy()
                outcomes[training] = _succeeded(training, trained=False)
        except OptionError:  # concerns the whole command: nothing is started
            raise
        except Exception as error:
            outcomes[training] = _failed(training, error, only_one)
    ready: dict[Run, Weights | None] = {}
    with ExitStack() as locks:
        for training in runs:
            try:
                if training not in outcomes:
                    locks.enter_context(training.locked())
                    ready[training] = obtain(training.config, weights, models)
                    if start:
                        log.info("%s: %s", training.config.architecture, start)
            except Exception as error:
                outcomes[training] = _failed(training, error, only_one)
        if ready:
            if run is None:
                log.info("run %s: to resume it if it ends early, run the same command with --run %s", name, name)
            outcomes |= _train_all(ready, began, start_limit, only_one)
    return [outcomes[training] for training in runs]


def _train_all(
    ready: Mapping[Run, Weights | None], began: float, start_limit: float, only_one: bool
) -> dict[Run, Outcome]:
    """Train the runs with Ray. For the arguments, see `_run_concurrently` and `_failed`."""
    outcomes: dict[Run, Outcome] = {}
    configs = [run.config for run in ready]
    _log_determinism(configs[0])
    request = _request_of(configs[0])
    with ray_session(request) as session, _log_how_to_resume(next(iter(ready)).name, session):
        _log_unused_gpus(configs[0])
        for training, failure in _run_concurrently(ready, began, start_limit, session):
            try:
                if failure:
                    raise failure
                outcomes[training] = _succeeded(training, trained=True)
            except Exception as error:
                outcomes[training] = _failed(training, error, only_one)
    return outcomes


def _log_determinism(config: TrainConfig) -> None:
    if not config.deterministic:
        log.info("weights are not bit-identical from run to run; --deterministic makes them so, with slower kernels")
    elif config.gpus_per_worker:
        log.info("--deterministic on GPUs: without XLA, and with slower kernels; --fast uses XLA and faster kernels")


def _log_unused_gpus(config: TrainConfig) -> None:
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus and not config.gpus_per_worker:
        log.warning("Ray has %d GPUs, and --gpus-per-worker is 0: training runs on CPUs", gpus)


@contextmanager
def _log_how_to_resume(run: str, session: Session) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        session.shuts_down = False  # the threads of the runs wait for Ray
        log.warning("to resume from the last checkpoint, if there is one, run the same command with --run %s", run)
        raise


def _succeeded(run: Run, trained: bool) -> Outcome:
    return Outcome(run.config.architecture, run.folder, trained, run.metrics())


def _failed(run: Run, error: Exception, only_one: bool) -> Outcome:
    if only_one:
        raise error
    log.error("%s: failed: %s", run.config.architecture, one_line(error))
    log.debug("traceback:", exc_info=error)
    return Outcome(run.config.architecture, run.folder, trained=False, metrics={}, error=error)


def _run_concurrently(
    ready: Mapping[Run, Weights | None], began: float, start_limit: float, session: Session
) -> Iterator[tuple[Run, Exception | None]]:
    """Start each run as soon as the cluster has room for it. Yield each run when it ends, with its failure or None.

    Args:
        ready: the runs and their pretrained weights.
        began: `time.monotonic()` at the start of the command.
        start_limit: seconds, as in `train`.
        session: the Ray session. It is not shut down if runs are given up.
    """
    from job.train.board import RunState
    from job.train.display import watched

    importlib.import_module("ray.train.v2.api.data_parallel_trainer")  # takes seconds; imported before threads start
    ended: queue.SimpleQueue[tuple[Run, Exception | None]] = queue.SimpleQueue()
    waiting, running = deque(ready), dict[Run, Wait]()
    at_once = MOST_AT_ONCE if len(ready) > 1 and uses_cluster() and has_autoscaler() else 1
    with watched([run.config.architecture for run in ready]) as board:

        def fit(run: Run) -> None:
            error: Exception | None = None
            try:
                run.fit(ready[run], board)
            except BaseException as raised:  # any exception: the loop below waits for an entry in the queue
                error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
            ended.put((run, error))

        while waiting or running:
            while waiting and len(running) < max(at_once, _runs_that_fit(waiting[0].config)):
                run = waiting.popleft()
                running[run] = Wait(_request_of(run.config), start_limit, run.config.architecture)
                board.post.remote(RunState(run.config.architecture, "starting workers", starts=True))
                workers, seconds = counted(run.config.workers, "worker"), time.monotonic() - began
                log.info("%s: starting %s, %.1f s after the command started", run.config.architecture, workers, seconds)
                # Ray Train blocks the calling thread. A daemon thread does not keep the process alive after Ctrl-C.
                threading.Thread(target=fit, args=(run,), daemon=True).start()
            with suppress(queue.Empty):
                run, error = ended.get(timeout=SECONDS_BETWEEN_CHECKS)
                del running[run]
                board.set_workers.remote(run.config.architecture, False)
                board.post.remote(RunState(run.config.architecture, "failed" if error else "finished"))
                yield run, error
            try:
                _check(board, running)
            except KuzushijiError as error:
                session.shuts_down = False  # the threads of the runs wait for Ray
                yield from ((run, error) for run in [*running, *waiting])
                return


def _check(board: Any, running: Mapping[Run, Wait]) -> None:
    """Log which runs wait for workers.

    Raises:
        KuzushijiError: all runs have waited too long, or another process has taken over one of them.
    """
    import ray

    _check_taken_over(running)
    try:
        with_workers = ray.get(board.with_workers.remote(), timeout=SECONDS_FOR_BOARD)
    except ray.exceptions.RayError:  # Ray is slow, or the board is lost: a training continues without it
        return
    for run, wait in running.items():
        if run.config.architecture in with_workers:
            wait.restart()
        else:
            wait.check(limited=not with_workers)


def _check_taken_over(running: Iterable[Run]) -> None:
    for run in running:
        if run.lost.is_set():
            raise KuzushijiError(
                f"a run must renew its lock every minute. Received: no renewal by --run {run.name} of "
                f"{run.config.architecture}, which another process has taken over. Wait for its end, then run "
                "this command again for its other architectures, if it has several"
            )


def _request_of(config: TrainConfig) -> Request:
    return Request(config.workers, config.cpus_per_worker, config.gpus_per_worker)


def _runs_that_fit(config: TrainConfig) -> int:
    """Return how many runs like this one fit on the live hosts at the same time."""
    return _request_of(config).held_by(hosts()) // config.workers


def _check_run_name(run: str) -> None:
    plain_option(run, "--run")
    if run.endswith((".json", ".lock", REPORT_SUFFIX)):
        raise OptionError(
            f"--run must not end in .json, .lock or {REPORT_SUFFIX}, as files next to the runs do. Received: {run}"
        )


def _check_dataset(dataset: UPath) -> DatasetManifest:
    """Return the manifest. Hash all files of a local dataset first: restarting workers would not repair them."""
    manifest = read_manifest(dataset, DatasetManifest)
    if faults := faults_of(dataset, manifest, list_files(dataset)) if is_local(dataset) else []:
        raise DamageError(f"{dataset}: {'; '.join(faults)}. Run the same `prepare` again, which repairs it")
    return manifest

"""The same loop in Ray Train: one worker against the plain loop, two workers of one thread against one of two."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from benchmarks.pairs import Ratio, compare
from benchmarks.steps import Ask
from cluster.manifest import read_manifest
from cluster.places import place
from job.config import TrainConfig
from preprocessing.dataset import DatasetManifest


class Gate:
    """An actor at which the workers of a run wait until they are asked for steps."""

    def __init__(self, workers: int) -> None:
        self._asked: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(workers)]
        self._rates: asyncio.Queue[float] = asyncio.Queue()

    async def ask(self, steps: int) -> float:
        for queue in self._asked:
            queue.put_nowait(steps)
        return await self._rates.get() if steps else 0.0

    async def asked(self, rank: int) -> int:
        return await self._asked[rank].get()

    async def answer(self, rate: float) -> None:
        self._rates.put_nowait(rate)


def _serve(given: dict[str, Any]) -> None:
    """Do what `job.train.worker.train_worker` does, but only the steps that are asked for."""
    import time

    import ray.train

    from job.model.start import initial_model
    from job.train.board import StartUp
    from job.train.staging_ahead import staged_partitions
    from job.train.strategy import configure_tensorflow, make_strategy
    from job.train.training import Training

    job, gate = given["job"], given["gate"]
    config = job.config
    configure_tensorflow(config)
    strategy = make_strategy(config.workers)
    with staged_partitions(job) as (partitions, data):
        training = Training(job, strategy, partitions, data, StartUp(), *initial_model(config, None, data.class_names))
        crops = data.splits["train"]
        order = partitions.batches(epoch=1)
        while steps := ray.get(gate.asked.remote(training.rank)):
            training.state.step, training.state.seconds = 0, 0.0
            begin = time.perf_counter()
            training._train(crops, order, steps)
            if training.rank == 0:
                gate.answer.remote(steps * config.global_batch_size / (time.perf_counter() - begin))


@contextmanager
def ray_train(dataset: Path, folder: Path, config: TrainConfig) -> Iterator[Callable[[int], float]]:
    """Start Ray Train workers that wait for requests. Yield a function: number of steps to crops per second."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from job.train.board import Board
    from job.train.job import TrainJob
    from job.train.rendezvous import Rendezvous

    gate: Any = ray.remote(num_cpus=0)(Gate).remote(config.workers)
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    places = dict.fromkeys(("folder", "checkpoints", "curves"), str(folder))
    places["dataset_manifest_sha256"] = read_manifest(place(dataset), DatasetManifest).sha256
    job = TrainJob(config=config, weights=None, dataset=str(dataset), run="bench", board=board, **places)
    trainer = DataParallelTrainer(
        _serve,
        backend_config=Rendezvous(),
        train_loop_config={"job": job, "gate": gate},
        scaling_config=ScalingConfig(num_workers=config.workers, resources_per_worker={"CPU": config.cpus_per_worker}),
        run_config=RunConfig(name=f"workers-{config.workers}", storage_path=str(folder)),
    )
    thread = threading.Thread(target=trainer.fit, daemon=True)
    thread.start()
    try:
        yield lambda steps: ray.get(gate.ask.remote(steps))
    finally:
        gate.ask.remote(0)
        thread.join(timeout=120)


def measure(dataset: Path, folder: Path, config: TrainConfig, bare: Ask, pairs: int, steps: int) -> list[Ratio]:
    """Measure `ray_vs_loop` and `two_vs_one`. config: that of one worker with all cores."""
    ratios = []
    of_two = config.model_copy(update={"workers": 2, "cpus_per_worker": max(1, config.cpus_per_worker // 2)})
    for key, at_least, of in (("ray_vs_loop", 0.98, config), ("two_vs_one", 0.85, of_two)):
        with ray_train(dataset, folder, of) as run:
            ratios.append(
                compare(key, at_least, "crops/s", lambda run=run: run(steps), lambda: bare("loop", steps), pairs)
            )
    return ratios

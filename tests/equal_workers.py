"""Computations of workers on one batch, which must not depend on the number of workers.

It is one batch, because with different ones the rounding of sums grows from step to step: on drawn pages, with a new
batch in each step, the same batches with their rows reversed differ by 0.01 in one process, too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EQUAL_BATCH = 25  # divisible by none of 2, 3 and 4 workers
A_FEW = {"with dropout": 3, "augmented": 2}
MORE = {"with dropout": 2, "augmented": 2, "without": 20}  # enough to learn the batch


def one_batch(job: Any, out: Path, steps: dict[str, int]) -> Callable[[Any], None]:
    """Return a function that each worker calls with its strategy, and that writes `rank-<rank>.npz`.

    The file has the losses of the first steps, and the statistics of batch norm. It is a closure, because Ray would
    import a function of this file.

    job: a `TrainJob`; its config has the number of workers. steps: their number for each of `with dropout`, `augmented`
    (with dropout, too) and `without`.
    """
    from dataclasses import replace

    import pytest

    from cluster.places import place

    folder = str(out)

    def measure(strategy: Any) -> None:
        import keras
        from ray.train import get_context

        from cluster.manifest import read_manifest
        from job.data.partitions import Partitions
        from job.data.staging import staged_shards
        from job.model.start import initial_model
        from job.train.board import StartUp
        from job.train.training import Training
        from preprocessing.dataset import DatasetManifest

        config, losses = job.config, {}
        dataset, rank, workers = place(job.dataset), get_context().get_world_rank(), get_context().get_world_size()
        manifest = read_manifest(dataset, DatasetManifest)
        partitions = Partitions.of(
            manifest, config.partitions, config.global_batch_size, config.seed, rank=rank, workers=workers
        )
        held = {split: partitions.held_shards(split) for split in ("train", "validation", "test")}
        with staged_shards(dataset, manifest, held) as data, pytest.MonkeyPatch.context() as patch:
            # A head with only 15 % of the gradients to transfer.
            patch.setattr("job.model.architectures.BASELINE_HEAD", (1000, 200))
            crops = data.splits["train"]
            order = partitions.batches(epoch=1)
            for kind, count in steps.items():
                keras.utils.set_random_seed(config.seed)
                changes = {"dropout": kind != "without", "augment": "standard" if kind == "augmented" else "none"}
                as_told = replace(job, config=config.model_copy(update=changes))
                start = initial_model(as_told.config, None, data.class_names)
                training = Training(as_told, strategy, partitions, data, StartUp(), *start)
                training.step_limit.stop()
                first, images, labels = training.rows_of(crops, order, 0)
                losses[kind] = []
                for _ in range(count):
                    sums = training.steps.train(images, labels, first).numpy()
                    losses[kind].append(training.steps.sum_over_workers(sums[None])[0, 0] / config.global_batch_size)
            training.steps.estimate_statistics([images])
            norms = [layer for layer in training.model.layers if isinstance(layer, keras.layers.BatchNormalization)]
            moving = np.concatenate([np.asarray(norm.moving_variance) for norm in norms])
            Path(folder).mkdir(parents=True, exist_ok=True)
            np.savez(f"{folder}/rank-{training.rank}.npz", statistics=moving, **losses)

    return measure


def then(measure: Callable[[Any], None], out: Path) -> Callable[[dict[str, Any]], None]:
    """Return a change of workers (see `small_head.work_after`): they call `measure` after their training.

    It is called with their training's strategy, because a process can have only one. Before the training, worker 1
    reports a failure in a run of another name. Each worker writes the failure that it receives to `received-<rank>`.
    """
    folder = str(out)

    def change(_: dict[str, Any]) -> None:
        import ray.train

        from job.train import worker
        from job.train.job import Failure
        from job.train.rendezvous import shared_failure

        train_worker, make_strategy = worker.train_worker, worker.make_strategy
        strategies: list[Any] = []

        def remembered(workers: int) -> Any:
            strategies.append(make_strategy(workers))
            return strategies[0]

        def train_and_measure(job: Any, start_up: Any, staged: Any) -> Any:
            rank = ray.train.get_context().get_world_rank()
            received = shared_failure(job.board, "another", Failure("a shard was changed", "") if rank == 1 else None)
            failure = train_worker(job, start_up, staged)
            measure(strategies[0])
            Path(f"{folder}/received-{rank}").write_text(received.message if received else "")
            return failure

        worker.train_worker, worker.make_strategy = train_and_measure, remembered

    return change


def measured(folder: Path, workers: int) -> list[dict[str, np.ndarray]]:
    """Return the results of each rank."""
    return [dict(np.load(folder / f"rank-{rank}.npz")) for rank in range(workers)]

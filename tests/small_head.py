"""Changed Ray workers for trainings: by default, steps take no time, and sums are added to totals within epochs.

As a script, it is the command line with such workers: `python tests/small_head.py train ...`. With HANG_AFTER_STEP in
the environment, they hang after that step. At its end, it prints whether TensorFlow was loaded.
"""

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any

WORK = "job.train.run._work"
"""The function that each worker runs, to be patched with `work_after`."""


def work_after(change: Callable[[dict[str, Any]], object] | None = None) -> Callable[[dict[str, Any]], Any]:
    """Return a worker's function with small heads. `change` is called before it, with {"job": TrainJob}.

    It is a closure, because Ray would import a function of this file.
    """

    def work(given: dict[str, Any]) -> Any:
        from job.model import architectures
        from job.train import run, training

        architectures.BASELINE_HEAD = architectures.HEAD = (16, 8)
        training.SUM_CROPS = 14  # two steps of the dataset `few`
        if change:
            change(given)
        return run._work(given)

    return work


def hang_after(step: int) -> Callable[[dict[str, Any]], None]:
    """Return a change of the workers: they hang after a number of steps."""

    def change(given: dict[str, Any]) -> None:
        import time

        from job.train import training as module

        rows_of = module.Training.rows_of

        def hanging(training: Any, *arguments: Any) -> Any:
            if int(training.optimizer.iterations.numpy()) == step:
                time.sleep(1e6)
            return rows_of(training, *arguments)

        module.Training.rows_of = hanging

    return change


if __name__ == "__main__":
    import job.train.run
    from job.cli import main

    atexit.register(lambda: print("TensorFlow was loaded here:", "tensorflow" in sys.modules, file=sys.stderr))  # noqa: T201
    hangs_after = os.environ.get("HANG_AFTER_STEP")
    job.train.run._work = work_after(hang_after(int(hangs_after)) if hangs_after else None)
    main()

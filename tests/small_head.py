"""Changed Ray workers for trainings: by default, steps take no time, and sums are added to totals within epochs.

As a script, it is the command line with such workers: `python tests/small_head.py train ...`. At its end, it prints
whether TensorFlow was loaded.
"""

import atexit
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


if __name__ == "__main__":
    import job.train.run
    from job.cli import main

    atexit.register(lambda: print("TensorFlow was loaded here:", "tensorflow" in sys.modules, file=sys.stderr))  # noqa: T201
    job.train.run._work = work_after()
    main()

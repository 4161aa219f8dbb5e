"""What Ray's workers do in a training, changed: by default, steps that take no time, and sums that are added to totals
within each epoch.

As a script, the command line with such workers: `python tests/small_head.py train ...`. It tells at its end whether
TensorFlow was loaded.
"""

import atexit
import sys
from collections.abc import Callable
from typing import Any

WORK = "job.train.run._work"
"""What each worker does, to be patched with `work_after`."""


def work_after(change: Callable[[dict[str, Any]], object] | None = None) -> Callable[[dict[str, Any]], Any]:
    """What a worker does, with small heads; `change` is called before, with {"job": TrainJob}. A closure: Ray would
    import a function of this file.
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

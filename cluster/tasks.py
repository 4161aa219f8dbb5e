"""Tasks mapped with Ray Data."""

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.bucket_errors import explained
from cluster.capacity import START_LIMIT, Request, Wait
from cluster.errors import KuzushijiError, one_line
from cluster.progress import on_terminal, progress
from cluster.runtime import cause_of, ray_session, uses_cluster

if TYPE_CHECKING:
    from pydantic import BaseModel
    from ray.data import Dataset

ReportT = TypeVar("ReportT", bound="BaseModel")

# Ray Data's own limit is half an hour. A task of `predict` with `fcn` takes longer on a CPU, and other jobs may use all
# hosts of a cluster.
SECONDS_WITHOUT_PROGRESS = 86_400


def map_tasks(
    tasks: int,
    work: Callable[[int], ReportT],
    report: type[ReportT],
    *,
    what: str,
    unit: str,
    sizes: Sequence[int],
    begin: Callable[[], None] = lambda: None,
    gpus: int = 0,
    start_limit: float = START_LIMIT,
) -> list[ReportT]:
    """Run `work` for each task with Ray Data, and show the progress.

    On a terminal, Ray Data draws its own progress bar, which counts tasks and shows the use of CPUs.

    Args:
        tasks: number of tasks, at least one.
        work: called with the number of a task, from 0, in another process, which unpickles `work`.
        report: the pydantic model that `work` returns.
        what: text of the progress display, such as "pages cut".
        unit: what `sizes` counts, such as "pages".
        sizes: number of units in each task.
        begin: called once, before the first task starts, when there is room for that task.
        gpus: number of actors with one GPU each; 0: tasks with one CPU each.
        start_limit: seconds within which a cluster must have room for the first task.

    Returns:
        The reports, in the order of the tasks.

    Raises:
        OptionError: Ray has no room, see `ray_session`.
        KuzushijiError: there was no room in time.
        Exception: whatever `work` raised. An OSError becomes a KuzushijiError.
    """
    reports: dict[int, ReportT] = {}
    rays_own_bar = on_terminal() and sys.stdout.isatty()  # Ray Data draws its bar only if both are terminals
    bar = nullcontext(lambda _: None) if rays_own_bar else progress(what, sum(sizes), unit)
    request = Request(processes=gpus or 1, gpus=1 if gpus else 0)
    with ray_session(request), bar as advance:
        try:
            _wait_for_room(request, start_limit)
            begin()
            for row in _mapped(tasks, work, rays_own_bar, gpus).iter_rows():
                reports[row["index"]] = report.model_validate_json(row["report"])
                advance(sizes[row["index"]])
        except BaseException as error:
            # If an interrupt arrives while Ray Data creates its iterator, its thread runs as long as the traceback
            # references the iterator (fixed in later versions: github.com/ray-project/ray/pull/62949). The thread must
            # not outlive Ray: it would start another Ray, fail, and leave the terminal without a cursor.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, Exception):
                raise cause_of(error) from error  # `error` has the traceback of the task, for --debug
            raise
    assert len(reports) == tasks, "one report per task"
    return [reports[index] for index in range(tasks)]


def _wait_for_room(request: Request, limit: float) -> None:
    """Wait until a cluster has room for one of the processes. Ray Data would wait for it without a log line.

    Raises:
        KuzushijiError: there was no room in time.
    """
    if not uses_cluster():
        return
    import ray

    # An autoscaler adds hosts for tasks that wait. Present hosts may be in use by other jobs.
    first = ray.remote(num_cpus=request.cpus, num_gpus=request.gpus)(lambda: None).remote()
    wait = Wait(replace(request, processes=1), limit)
    try:
        while not ray.wait([first], timeout=1)[0]:
            wait.check()
    except BaseException:
        # Only here, not after the task has ended: a cancellation at the moment when its task ends would end this
        # process (the race of github.com/ray-project/ray/pull/54738, in `CompletePendingTask`).
        ray.cancel(first)
        raise


def _mapped(tasks: int, work: Callable[[int], ReportT], show_bar: bool, gpus: int) -> "Dataset":
    """Return a dataset with one row per task: its `index` and its `report` as JSON."""
    import ray.data

    # Ray Data warns when its bars are off. Its import sets the log level, so set it after that.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.enable_rich_progress_bars = show_bar
    context.use_ray_tqdm = context.enable_operator_progress_bars = False  # one bar is enough
    context.execution_no_progress_timeout_s = SECONDS_WITHOUT_PROGRESS
    context.raise_original_map_exception = True  # otherwise the cause is lost between processes
    dataset = ray.data.from_items([{"index": index} for index in range(tasks)], override_num_blocks=tasks)
    if gpus:
        arguments = {"work": work}
        pool = ray.data.ActorPoolStrategy(size=gpus)
        return dataset.map(_Call, fn_constructor_kwargs=arguments, num_cpus=1, num_gpus=1, compute=pool)
    # No actors on CPUs: Ray prints a spurious error for each actor (github.com/ray-project/ray/issues/53727).
    call = _Call(work)

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return call(row)

    run.__name__ = run.__qualname__ = type(work).__name__  # Ray shows it as the name of the task
    return dataset.map(run, num_cpus=1)


class _Call:
    """Wraps `work` for Ray Data, which calls it with a row and gets a row. Also the class of the actors with GPUs."""

    def __init__(self, work: Callable[[int], "BaseModel"]) -> None:
        self.work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"index": row["index"], "report": self.work(int(row["index"])).model_dump_json()}
        except OSError as error:  # Ray Data would replace the file name with a text of its own
            raise explained(error) or KuzushijiError(one_line(error)) from error

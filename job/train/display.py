"""The driver displays the progress of running trainings: the events that workers post to the board."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.progress import SECONDS_BETWEEN_LINES, on_terminal, terminal
from job.train.board import Activity, Board, LogLine, RunState, StepDone

log = logging.getLogger("kuzushiji")

SECONDS_UNTIL_LATE = 10.0  # the actor takes seconds to start


@contextmanager
def watched(architectures: Sequence[str]) -> Iterator[Any]:
    """Start the actor. Display the events that workers post to it until the block ends."""
    # On the driver's host: if the actor's host were lost, all later events would be lost, too.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    done = threading.Event()
    # Draw the bar before another thread logs: if a log line arrives while rich draws a bar for the first time, a second
    # copy of the bar stays on the screen.
    with _Table(architectures) if on_terminal() else _LogLines() as lines:
        thread = threading.Thread(target=_show, args=(board, lines, done), daemon=True)
        thread.start()
        try:
            yield board
        finally:
            done.set()
            thread.join(timeout=30)
            ray.kill(board)


def _show(board: Any, lines: "_LogLines | _Table", done: threading.Event) -> None:
    asked: Any = None
    while True:
        last = done.wait(0.5)
        late = asked is not None
        asked = asked or board.take.remote()
        try:
            events = ray.get(asked, timeout=SECONDS_UNTIL_LATE)
            asked = None
        except ray.exceptions.GetTimeoutError:  # Ray is slow: keep the request, because its answer has the events
            events = []
        except ray.exceptions.RayError:
            return
        for event in events:
            match event:
                case LogLine():
                    log.info("%s: %s", event.architecture, event.text)
                case RunState():
                    lines.state(event)
                case Activity():
                    lines.activity(event)
                case StepDone():
                    lines.step(event)
        if last and not (late and asked is None):  # a late answer lacks the events posted after its request
            return


class _LogLines:
    """For logs: the progress of each architecture, every few seconds."""

    def __enter__(self) -> Self:
        self._last: dict[str, float] = defaultdict(time.monotonic)
        return self

    def __exit__(self, *_: object) -> None: ...

    def state(self, event: RunState) -> None: ...

    def step(self, event: StepDone) -> None:
        self._log(event.architecture, str(event))

    def activity(self, event: Activity) -> None:
        self._log(event.architecture, event.text)

    def _log(self, architecture: str, text: str) -> None:
        if time.monotonic() - self._last[architecture] >= SECONDS_BETWEEN_LINES:
            self._last[architecture] = time.monotonic()
            log.info("%s: %s", architecture, text)


class _Table:
    """For terminals: one row per architecture, with a bar over all steps of its training.

    The table is drawn after each event. Otherwise, only the last of several simultaneous events would be visible.
    """

    def __init__(self, architectures: Sequence[str]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        whole = Column(no_wrap=True)
        text, state = (TextColumn(f"{{task.{of}}}", table_column=whole) for of in ("description", "fields[state]"))
        # The bar gets the width that the other columns leave. They take about 80 characters, and the name.
        columns = (text, BarColumn(bar_width=None), TimeRemainingColumn(table_column=whole), state)
        self._bars = Progress(*columns, console=terminal(), transient=True, expand=True)
        self._rows = {
            name: self._bars.add_task(name, total=None, start=False, state="waiting") for name in architectures
        }

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def state(self, event: RunState) -> None:
        row = self._rows[event.architecture]
        if event.starts:
            self._bars.start_task(row)
        else:
            self._bars.stop_task(row)
        self._bars.update(row, state=event.state, refresh=True)

    def step(self, event: StepDone) -> None:
        done = (event.epoch - 1) * event.steps + event.step
        total = event.epochs * event.steps
        self._bars.update(self._rows[event.architecture], state=str(event), completed=done, total=total, refresh=True)

    def activity(self, event: Activity) -> None:
        self._bars.update(self._rows[event.architecture], state=event.text, refresh=True)

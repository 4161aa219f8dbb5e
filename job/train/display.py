"""Progress of running trainings: workers post events to a small actor, and the driver displays them.

Posting never waits and never fails, because losing an event must not stop a training.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import one_line
from cluster.progress import SECONDS_BETWEEN_LINES, on_terminal, terminal
from cluster.runtime import cause_of, is_collateral

if TYPE_CHECKING:
    from job.train.run import Failure

log = logging.getLogger("kuzushiji")

SECONDS_BETWEEN_POSTS = 1.0
SECONDS_UNTIL_LATE = 10.0  # the actor takes seconds to start


@dataclass(frozen=True)
class LogLine:
    """A line for the log."""

    architecture: str
    text: str


@dataclass(frozen=True)
class RunState:
    """A run starts or ends."""

    architecture: str
    state: str
    starts: bool = False


@dataclass(frozen=True)
class Activity:
    """What a training does between steps."""

    architecture: str
    text: str


@dataclass(frozen=True)
class StepDone:
    """Progress of a training: step `step` of `steps` in epoch `epoch` of `epochs`. All are counted from 1."""

    architecture: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    """Mean over the epoch so far: of all workers up to the last change of `State.totals`, and of worker 0 after it."""
    accuracy: float
    """Likewise."""
    crops_per_s: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}/{self.epochs}, step {self.step}/{self.steps}, loss {self.loss:.4f}, "
            f"accuracy {self.accuracy:.4f}, {self.crops_per_s:,.0f} crops/s"
        )


Event = LogLine | RunState | Activity | StepDone


class Board:
    """The actor. It collects events in order of arrival, failures that end a run, and data that workers exchange."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._failures: dict[str, Failure] = {}
        self._parts: dict[str, dict[int, Any]] = defaultdict(dict)
        self._with_workers: set[str] = set()

    def post(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def set_workers(self, architecture: str, running: bool) -> None:
        """Record whether the workers of a run are running. They are not if they have ended, or are about to start."""
        (self._with_workers.add if running else self._with_workers.discard)(architecture)

    def with_workers(self) -> set[str]:
        """Return the architectures whose runs have workers."""
        return self._with_workers

    def add_failure(self, attempt: str, failure: "Failure") -> None:
        """Keep the first failure of the workers of an attempt."""
        self._failures.setdefault(attempt, failure)

    def failure_of(self, attempt: str) -> "Failure | None":
        """Return the first failure of the workers of an attempt, or None."""
        return self._failures.get(attempt)

    def add_part(self, attempt: str, rank: int, part: list[Any]) -> None:
        """Keep a reference to a worker's part.

        part: a list with the reference as its only element, so that Ray does not fetch the object.
        """
        self._parts[attempt][rank] = part[0]

    def parts_of(self, attempt: str) -> list[Any]:
        """Return the references of all workers of an attempt, in the order of their ranks, and remove them."""
        return [part for _, part in sorted(self._parts.pop(attempt).items())]


class Reporter:
    """Posts the events of one worker. Events that concern all workers are posted by worker 0 only."""

    def __init__(self, board: Any, architecture: str, rank: int) -> None:
        """board: handle of the actor."""
        self._board, self._architecture, self._rank = board, architecture, rank
        self._last = time.monotonic()

    def log_from_any(self, text: str) -> Any:
        """Log a line, whatever the rank of this worker. Return the Ray task."""
        return self._board.post.remote(LogLine(self._architecture, text))

    def log(self, text: str) -> None:
        if self._rank == 0:
            self.log_from_any(text)

    def is_due(self) -> bool:
        """Return whether it is time to show the progress again. Always False for ranks above 0."""
        now = time.monotonic()
        if self._rank > 0 or now - self._last < SECONDS_BETWEEN_POSTS:
            return False
        self._last = now
        return True

    def show_activity(self, text: str) -> None:
        if self._rank == 0:
            self._board.post.remote(Activity(self._architecture, text))

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Show progress as `cluster.progress.progress` does."""
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            if self.is_due():
                self.show_activity(f"{what}, {done:,} of {total:,} {unit}")

        yield advance

    def show_step(self, epoch: int, epochs: int, step: int, steps: int, **numbers: float) -> None:
        """Show the progress of steps. numbers: `loss`, `accuracy` and `crops_per_s` of `StepDone`."""
        if self._rank == 0:
            self._board.post.remote(StepDone(self._architecture, epoch, epochs, step, steps, **numbers))


class StartUp:
    """Measures the time of each part of a worker's start, up to its first step."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._parts: list[str] = []

    def ends(self, part: str) -> None:
        """Record the end of a part. The next part begins."""
        now = time.perf_counter()
        self._parts.append(f"{part} {now - self._last:.1f}")
        self._last = now

    def __str__(self) -> str:
        return f"{self._last - self._began:.1f} s ({', '.join(self._parts)})"


class LogFailures(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Logs why workers failed: Ray Train restarts them without a message to the user."""

    def __init__(self, board: Any, architecture: str) -> None:
        self._board, self._architecture, self._last = board, architecture, ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = min(worker_exceptions.items(), key=lambda item: (is_collateral(item[1]), item[0]))
        cause = one_line(cause_of(error))[:300]
        text = (
            f"worker {rank} failed; up to --max-failures times, all workers restart from the last checkpoint: {cause}"
        )
        if text != self._last:  # Ray repeats the failure of a drained host that is gone until the host's deadline
            self._last = text
            self._board.post.remote(LogLine(self._architecture, text))


class ReportStarts(ControllerCallback):  # type: ignore[misc]  # Ray has no types
    """Reports to the board that workers are about to start or restart."""

    def __init__(self, board: Any, architecture: str) -> None:
        self._board, self._architecture = board, architecture

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        self._board.set_workers.remote(self._architecture, False)


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

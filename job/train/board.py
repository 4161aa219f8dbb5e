"""What the workers of running trainings tell the driver and each other, through a small actor on the driver's host.

Posting never waits and never fails, because losing an event must not stop a training. This module does
not import Ray Train: each training waits for the start of the actor's process.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.train.job import Failure

SECONDS_BETWEEN_POSTS = 1.0


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

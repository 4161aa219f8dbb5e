"""How trainings are seen while they run: the workers post what happens to a small actor, the driver shows it.

Posting never waits and never fails: losing a line must not lose a training.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import ray
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import one_line
from cluster.progress import SECONDS_BETWEEN_LINES, on_terminal, terminal
from cluster.runtime import cause_of

log = logging.getLogger("kuzushiji")

SECONDS_BETWEEN_POSTS = 1.0


class Board:
    """Events in the order in which they came. An event names its `architecture`, and has `step` while an epoch runs,
    `text` for a log line, `doing` for what goes on between the steps, or `state` when a run starts or ends.
    """

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def post(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


class Voice:
    """A worker's. What rank 0 tells of stands for all."""

    def __init__(self, board: Any, architecture: str, rank: int) -> None:
        self._board, self._architecture, self._rank = board, architecture, rank
        self._last = time.monotonic()

    def post(self, text: str) -> Any:
        """A log line, of any rank. Returns the Ray task."""
        return self._board.post.remote({"architecture": self._architecture, "text": text})

    def say(self, text: str) -> None:
        if self._rank == 0:
            self.post(text)

    def due(self) -> bool:
        """Whether it is time again to show how far the work is."""
        now = time.monotonic()
        if self._rank > 0 or now - self._last < SECONDS_BETWEEN_POSTS:
            return False
        self._last = now
        return True

    def show(self, **event: Any) -> None:
        if self._rank == 0:
            self._board.post.remote({"architecture": self._architecture} | event)


class TellFailures(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Says why workers were lost, since Ray Train starts them again without a word to the user."""

    def __init__(self, board: Any, architecture: str) -> None:
        self._board, self._architecture, self._told = board, architecture, ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = min(worker_exceptions.items())
        cause = one_line(cause_of(error))[:300]
        text = f"worker {rank} failed; while tries are left, all begin again from the last checkpoint, if any: {cause}"
        if text != self._told:  # of a host that is drained and gone, Ray tells again and again until its deadline
            self._told = text
            self._board.post.remote({"architecture": self._architecture, "text": text})


@contextmanager
def watched(architectures: Sequence[str]) -> Iterator[Any]:
    """An actor to post to; what is posted is shown until the block ends."""
    # Beside the driver: with a host that is lost, all that is told later would be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(board, architectures, done), daemon=True)
    thread.start()
    try:
        yield board
    finally:
        done.set()
        thread.join(timeout=30)
        ray.kill(board)


def _show(board: Any, architectures: Sequence[str], done: threading.Event) -> None:
    with _Table(architectures) if on_terminal() else _LogLines() as lines:
        while True:
            last = done.wait(0.5)
            try:
                events = ray.get(board.take.remote(), timeout=10)
            except ray.exceptions.GetTimeoutError:  # Ray is slow
                events = []
            except ray.exceptions.RayError:
                return
            for event in events:
                if "text" in event:
                    log.info("%s: %s", event["architecture"], event["text"])
                elif "state" in event:
                    lines.state(event["architecture"], event["state"])
                elif "doing" in event:
                    lines.doing(event["architecture"], event["doing"])
                else:
                    lines.step(event["architecture"], event)
            if last:
                return


def _describe(event: dict[str, Any]) -> str:
    return (
        f"epoch {event['epoch']}/{event['epochs']}, step {event['step']}/{event['steps']}, loss {event['loss']:.4f}, "
        f"accuracy {event['accuracy']:.4f}, {event['crops_per_s']:,.0f} crops/s"
    )


class _LogLines:
    """For logs: where the epoch of each architecture stands, every few seconds."""

    def __enter__(self) -> Self:
        self._last: dict[str, float] = defaultdict(time.monotonic)
        return self

    def __exit__(self, *_: object) -> None: ...

    def state(self, architecture: str, state: str) -> None: ...

    def step(self, architecture: str, event: dict[str, Any]) -> None:
        self.doing(architecture, _describe(event))

    def doing(self, architecture: str, text: str) -> None:
        if time.monotonic() - self._last[architecture] >= SECONDS_BETWEEN_LINES:
            self._last[architecture] = time.monotonic()
            log.info("%s: %s", architecture, text)


class _Table:
    """For terminals: a row an architecture, with a bar over all steps of its training.

    Drawn with each event, too: of those that come at once the screen would show the last alone.
    """

    def __init__(self, architectures: Sequence[str]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        whole = Column(no_wrap=True)
        text, state = (TextColumn(f"{{task.{of}}}", table_column=whole) for of in ("description", "fields[state]"))
        # The bar gets what the others leave of the width: they take some 80 characters, and the name.
        columns = (text, BarColumn(bar_width=None), TimeRemainingColumn(table_column=whole), state)
        self._bars = Progress(*columns, console=terminal(), transient=True, expand=True)
        self._rows = {name: self._bars.add_task(name, total=None, start=False, state="waits") for name in architectures}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def state(self, architecture: str, state: str) -> None:
        row = self._rows[architecture]
        if state == "workers start":
            self._bars.start_task(row)
        else:
            self._bars.stop_task(row)
        self._bars.update(row, state=state, refresh=True)

    def step(self, architecture: str, event: dict[str, Any]) -> None:
        done = (event["epoch"] - 1) * event["steps"] + event["step"]
        total = event["epochs"] * event["steps"]
        row = self._rows[architecture]
        self._bars.update(row, state=_describe(event), completed=done, total=total, refresh=True)

    def doing(self, architecture: str, text: str) -> None:
        self._bars.update(self._rows[architecture], state=text, refresh=True)

"""How a training is seen while it runs: the workers post what happens to a small actor, the driver shows it.

Posting never waits and never fails: losing a line must not lose a training.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import UserCallback

from cluster.progress import SECONDS_BETWEEN_LINES, on_terminal, terminal
from cluster.runtime import cause_of

log = logging.getLogger("kuzushiji")

SECONDS_BETWEEN_POSTS = 1.0


class Board:
    """Events in the order in which they came. An event: {"step": ...} while an epoch runs, {"text": ...} for a log
    line.
    """

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def post(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


class TellFailures(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Says why workers were lost, since Ray Train starts them again without a word to the user."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = min(worker_exceptions.items())
        text = " ".join(str(cause_of(error)).split())[:300] or type(error).__name__
        self._board.post.remote({"text": f"worker {rank} failed, all begin again from the last checkpoint: {text}"})


@contextmanager
def watched() -> Iterator[Any]:
    """An actor to post to; what is posted is shown until the block ends."""
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(board, done), daemon=True)
    thread.start()
    try:
        yield board
    finally:
        done.set()
        thread.join(timeout=30)
        ray.kill(board)


def _show(board: Any, done: threading.Event) -> None:
    lines = _BarLines() if on_terminal() else _LogLines()
    with lines:
        while True:
            last = done.wait(0.5)
            try:
                events = ray.get(board.take.remote(), timeout=10)
            except ray.exceptions.RayError:
                return
            for event in events:
                if "text" in event:
                    log.info("%s", event["text"])
                else:
                    lines.step(event)
            if last:
                return


def _describe(event: dict[str, Any]) -> str:
    return f"loss {event['loss']:.4f}, accuracy {event['accuracy']:.4f}, {event['crops_per_s']:,.0f} crops/s"


class _LogLines:
    """For logs: where an epoch stands, every few seconds."""

    def __enter__(self) -> None:
        self._last = time.monotonic()

    def __exit__(self, *_: object) -> None: ...

    def step(self, event: dict[str, Any]) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            log.info("epoch %d, step %d of %d: %s", event["epoch"], event["step"], event["steps"], _describe(event))


class _BarLines:
    """For terminals: one bar, over all steps of the training."""

    def __enter__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=terminal(), transient=True)
        self._bars.start()
        self._task = self._bars.add_task("workers start", total=None)

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, event: dict[str, Any]) -> None:
        done = (event["epoch"] - 1) * event["steps"] + event["step"]
        text = f"epoch {event['epoch']} of {event['epochs']}: {_describe(event)}"
        self._bars.update(self._task, description=text, completed=done, total=event["epochs"] * event["steps"])

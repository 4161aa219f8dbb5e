"""The watchdogs of a training worker: for steps that hang, and for nodes that are being drained."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

SECONDS_BETWEEN_CHECKS = 5.0


class StepLimit:
    """Exits this process when a step takes too long, so that Ray Train restarts all workers.

    A peer that hangs would block the other workers forever: collectives have no timeout, and Ray checks whether the
    process of a worker responds, not whether its training makes progress.
    """

    def __init__(self, seconds: float, post: Callable[[str], Any]) -> None:
        """Start watching. seconds: limit of a step. post: posts a log line for the user and returns a Ray task."""
        self._seconds, self._post = seconds, post
        self._began: float | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self) -> None:
        """Start the clock for a step. This also ends the previous step."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Stop the clock until the next `begin`."""
        self._began = None

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 4)):
            began = self._began
            if began is not None and time.monotonic() - began > self._seconds:
                text = (
                    f"a step must end within {self._seconds:g} s. Received: a longer one; this worker exits, and all "
                    "workers restart. If no other worker hangs, raise --step-limit. See docs/faq.md"
                )
                with contextlib.suppress(Exception):  # Ray itself may hang
                    ray.get(self._post(text), timeout=5)
                os._exit(1)


class Preemption:
    """Detects nodes of this training that are being drained, such as preempted spot machines.

    A check is a barrier, so all ranks check after the same steps. Rank 0 sets the number of steps until the next check.

    `saver` is the rank that saves checkpoints: the first rank whose node is not being drained, or 0 if all are. It is
    the same on all ranks.
    """

    def __init__(self) -> None:
        self.saver = 0
        self._steps = 0  # since the last check
        self._interval = 1  # steps between two checks
        self._checked_at = time.monotonic()
        self._known: set[str] = set()

    def is_new(self) -> bool:
        """Return whether one more node is being drained. Call it once per step; it checks every few seconds only."""
        self._steps += 1
        if self._steps < self._interval:
            return False
        info = ray.train.get_preemption_info()
        seconds = (time.monotonic() - self._checked_at) / self._interval
        self._interval = broadcast_from_rank_zero(max(1, round(SECONDS_BETWEEN_CHECKS / max(seconds, 1e-6))))
        self._steps, self._checked_at = 0, time.monotonic()
        if not info or self._known.issuperset(info.preempted_node_ids):
            return False
        self._known.update(info.preempted_node_ids)
        staying = set(range(ray.train.get_context().get_world_size())) - set(info.preempted_ranks)
        self.saver = min(staying, default=0)
        return True

"""What a worker looks out for while it trains: a step that does not end, and a node that is about to go."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

SECONDS_BETWEEN_LOOKS = 5.0


class StepLimit:
    """Ends this process when a step takes too long, so that Ray begins again with all workers.

    A peer that is alive but silent would keep the others waiting for ever: a collective has no limit, and Ray asks
    whether a worker's process answers, not whether its training goes on.
    """

    def __init__(self, seconds: float, tell: Callable[[str], Any]) -> None:
        """tell: posts a line for the user, as a Ray task."""
        self._seconds, self._tell = seconds, tell
        self._since: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self) -> None:
        """A step begins, and the one before has ended."""
        self._since = time.monotonic()

    def rest(self) -> None:
        """The last step has ended."""
        self._since = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._seconds / 4))
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                text = (
                    f"a step must end in {self._seconds:g} s, and did not: this worker ends, so that all begin again. "
                    "If no other one is silent, raise --step-limit"
                )
                with contextlib.suppress(Exception):  # Ray may be what is silent
                    ray.get(self._tell(text), timeout=5)
                os._exit(1)


class Preemption:
    """Whether a node of this training is being drained, as a spot machine is that is taken back.

    To ask is a barrier, so all ranks ask after the same steps: rank 0 says after how many the next time is.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._next = 1
        self._asked_at = time.monotonic()
        self._known: set[str] = set()

    def is_new(self) -> bool:
        """Called once a step: whether one more node is to go. Asks every few seconds only."""
        self._steps += 1
        if self._steps < self._next:
            return False
        info = ray.train.get_preemption_info()
        seconds = (time.monotonic() - self._asked_at) / self._next
        self._next = broadcast_from_rank_zero(max(1, round(SECONDS_BETWEEN_LOOKS / max(seconds, 1e-6))))
        self._steps, self._asked_at = 0, time.monotonic()
        nodes = set(info.preempted_node_ids) - self._known if info else set()
        self._known |= nodes
        return bool(nodes)

"""What Ray Train's controller tells the board: why workers failed, and that they are about to start."""

from typing import Any

from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback

from cluster.errors import one_line
from cluster.runtime import cause_of, is_collateral
from job.train.board import LogLine


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

"""What a terminal of 100 columns shows while a command runs, and that it works as before when the command ends."""

import io
import os
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyte
import pytest
from conftest import KUZUSHIJI, KUZUSHIJI_WITH_SMALL_HEAD, TRIES_TO_START_RAY
from rich.console import Console

import cluster.progress
from cluster.progress import waiting
from cluster.runtime import START_TIMED_OUT

COLUMNS, LINES = 100, 30
SECONDS = 600.0  # limit of a command, on a slow machine
CTRL_C = b"\x03"
REDRAWS = re.compile(rb"(?=\r\x1b\[2K)")  # where rich starts to redraw a line
BAR, SPINNER = "━", "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


@dataclass(frozen=True)
class Shown:
    code: int
    screens: list[list[str]]
    """All screens in order: their lines, without trailing blanks."""
    cursor: bool
    """Whether the cursor is visible at the end."""

    def lines(self, pattern: str) -> list[str]:
        """Return the lines of all screens that match the pattern as a whole."""
        return [line for screen in self.screens for line in screen if re.fullmatch(pattern, line)]


def shown(command: Sequence[str | Path], stop: Callable[[list[str]], bool] = lambda _: False) -> Shown:
    """Run a command in its own terminal, and again if Ray did not start in time, up to `TRIES_TO_START_RAY` times.

    stop: gets the lines of the screen. Ctrl-C is pressed once, when it first returns True.
    """
    for _ in range(TRIES_TO_START_RAY):
        seen = shown_once(command, stop)
        if START_TIMED_OUT[: COLUMNS // 2] not in "\n".join(seen.screens[-1]):
            break
    return seen


def shown_once(command: Sequence[str | Path], stop: Callable[[list[str]], bool]) -> Shown:
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    ours, its = os.openpty()
    termios.tcsetwinsize(its, (LINES, COLUMNS))
    given = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        ["setsid", "--ctty", *command],  # controlling terminal: Ctrl-C reaches the command
        stdin=its,
        stdout=its,
        stderr=its,
        env=given | {"TERM": "xterm-256color"},
    )
    os.close(its)
    screens: list[list[str]] = []
    stopped, deadline = False, time.monotonic() + SECONDS
    try:
        while data := _read(ours, deadline):
            for part in REDRAWS.split(data):  # on a busy machine, a read returns several
                stream.feed(part)
                screens.append([line.rstrip() for line in screen.display])
            if not stopped and stop(screens[-1]):
                stopped = True
                os.write(ours, CTRL_C)
        return Shown(process.wait(timeout=SECONDS), screens, not screen.cursor.hidden)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read(terminal: int, deadline: float) -> bytes:
    ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
    assert ready, f"a command must end within {SECONDS:g} s"
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_a_training_shows_its_progress_in_one_line(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    models = ["--models", tmp_path / "models", "--architecture", "baseline", "--run", "seen"]
    sizes = ["--epochs", "2", "--global-batch-size", "4", "--workers", "1"]
    seen = shown([*KUZUSHIJI_WITH_SMALL_HEAD, "train", "--dataset", few, *models, *sizes])
    assert seen.code == 0, "\n".join(seen.screens[-1])
    assert seen.lines(f"[{SPINNER}] Starting Ray ...")
    assert seen.lines(f"baseline {BAR}+  starting workers")
    steps = seen.lines(
        rf"baseline [{BAR}╸╺]+ (-:--|\d:\d\d):\d\d epoch [12]/2, step \d+/\d+, loss \d+\.\d{{4}}, "
        r"accuracy [01]\.\d{4}, [\d,]+ crops/s"
    )
    assert "epoch 1/2" in steps[0]
    assert re.search(r" 0:\d\d:\d\d epoch", steps[-1])
    assert seen.lines(f"baseline {BAR}+ 0:00:00 writing the model and its report")
    assert not any(BAR in line for line in seen.screens[-1]), "\n".join(seen.screens[-1])
    assert any(line.startswith("model: ") for line in seen.screens[-1])
    # TensorFlow takes 5 s and 700 MB: only workers load it.
    assert seen.lines("TensorFlow was loaded here: False")
    assert seen.cursor


def test_progress_is_drawn_before_another_thread_logs(ray_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import job.train.display  # imports Ray, which must see the environment of `ray_here`

    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=COLUMNS)
    for module in (cluster.progress, job.train.display):
        monkeypatch.setattr(module, "on_terminal", lambda: True)
        monkeypatch.setattr(module, "terminal", lambda: console)
    with waiting("Starting Ray ..."):
        assert "Starting Ray" in written.getvalue()
    with job.train.display.watched(["baseline"]):
        assert "baseline" in written.getvalue()


def test_events_posted_before_the_actor_starts_are_shown(
    ray_here: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a busy machine, the actor takes longer to start than the driver waits for its answer."""
    from job.train import display
    from job.train.board import Board, LogLine

    class Slow(Board):
        def __init__(self) -> None:
            import time

            time.sleep(1)
            super().__init__()

    monkeypatch.setattr(display, "SECONDS_UNTIL_LATE", 0.2)
    monkeypatch.setattr(display, "Board", Slow)
    caplog.set_level("INFO", "kuzushiji")
    with display.watched(["baseline"]) as board:
        board.post.remote(LogLine("baseline", "the first"))
        until = time.monotonic() + 60
        while "the first" not in caplog.text and time.monotonic() < until:
            time.sleep(0.1)
    assert "baseline: the first" in caplog.text


def test_prepare_shows_rays_bar_and_ctrl_c_gives_the_terminal_back(pages: Path, tmp_path: Path) -> None:
    source = ["--pages", pages / "train_images", "--labels", pages / "train.csv", "--dataset", tmp_path / "crops"]
    bar = re.compile(rf"  \S Dataset \S+ running: +\d+% .*[{BAR}╸╺]+ \d+/\d+ .*")
    seen = shown([KUZUSHIJI, "prepare", *source], stop=lambda screen: any(map(bar.fullmatch, screen)))
    assert seen.lines(bar.pattern)
    assert seen.code == 1, "\n".join(seen.screens[-1])
    assert "kuzushiji: stopped" in "\n".join(seen.screens[-1])
    assert seen.cursor


def test_a_long_wait_off_a_terminal_is_logged_and_a_short_one_is_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "kuzushiji")
    monkeypatch.setattr(cluster.progress, "on_terminal", lambda: False)
    with waiting("a short one"):
        pass
    monkeypatch.setattr(cluster.progress, "SECONDS_BETWEEN_LINES", 0.01)
    with waiting("a long one"):
        time.sleep(0.5)
    assert caplog.messages == ["a long one"]


def test_what_is_logged_while_tensorflow_is_silenced_is_not_silenced() -> None:
    program = """
import os
from cluster.progress import log, log_to_stderr
from job.model.load_tensorflow import without_chatter
log_to_stderr()
with without_chatter():
    log.info("of the package")
    os.write(2, b"of TensorFlow")
log.info("after it")
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert re.fullmatch(r"\S+ of the package\n\S+ after it\n", done.stderr)

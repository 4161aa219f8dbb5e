"""How time and memory grow with the work. The command line runs as for a user, and is observed from outside."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from chaos import AT_WORK

from benchmarks.pages import Source

KUZUSHIJI = Path(sys.executable).with_name("kuzushiji")
CUTTER, TRAINER, _ = AT_WORK
END_OF_EPOCH = re.compile(r": epoch \d+ of ")
SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class Cost:
    """Cost of one run of the command."""

    seconds: float
    peaks: list[float]
    """Peak of the largest watched worker in each epoch, and after the last one, in bytes."""
    driver_peak: float
    """Peak of the command's own process, in bytes."""
    said: list[str]
    """Lines of standard error."""

    @property
    def peak(self) -> float:
        return max(self.peaks)


def watched(kind: str, status: str, *arguments: str | Path) -> Cost:
    """Run the command. kind: start of the workers' titles. status: line of /proc/PID/status to read for the workers."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [KUZUSHIJI, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    peaks, driver_peak, said = [0.0], 0.0, []
    ended = threading.Event()

    def watch() -> None:
        nonlocal driver_peak
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            with suppress(psutil.Error, OSError):
                driver_peak = max(driver_peak, _status(process.pid, "VmHWM"))
                for worker in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.Error, OSError):
                        if " ".join(worker.cmdline()).startswith(kind):
                            peaks[-1] = max(peaks[-1], _status(worker.pid, status))

    watching = threading.Thread(target=watch)
    watching.start()
    assert process.stderr
    for line in process.stderr:
        said.append(line.rstrip())
        if END_OF_EPOCH.search(line):
            peaks.append(0.0)
    failed = process.wait()
    ended.set()
    watching.join()
    if failed:
        raise SystemExit(f"{arguments[0]} failed: {' '.join(said[-9:])}")
    return Cost(time.perf_counter() - begin, peaks, driver_peak, said)


def _status(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * float(line.split()[1])
    return 0.0


def of_prepare(source: Source, times: int, folder: Path) -> tuple[int, Cost]:
    """Prepare `times` copies of the pages into `folder/dataset-<times>`. Return the number of pages, and the cost."""
    many = source.repeated(times, folder / f"times-{times}")
    places = ["--pages", many.images, "--labels", many.labels, "--dataset", folder / f"dataset-{times}"]
    return len(os.listdir(many.images)), watched(CUTTER, "VmHWM", "prepare", *places)


def of_train(dataset: Path, epochs: int, batch: int, folder: Path) -> Cost:
    """Train. Return the cost; the peaks are the workers' memory without mapped files."""
    models = folder / "models"
    how = ["--architecture", "baseline", "--workers", "2", "--epochs", str(epochs), "--global-batch-size", str(batch)]
    cost = watched(TRAINER, "RssAnon", "train", "--dataset", dataset, "--models", models, *how)
    shutil.rmtree(models)
    return cost

"""Chaos: `prepare`, `train` and `predict`, killed at random many times, end with the bytes of an undisturbed run.

    python tests/chaos.py --rounds 10 --seed 1          # or: make chaos ROUNDS=10 SEED=1

In a round, each command makes one result: a dataset, a model, predictions. When a kill ends a command, the same command
is run again at once, while processes of the first may still run. Every process that this script starts has
KUZUSHIJI_CHAOS=<this run>.<attempt> in its environment; no other process is ever touched. The seed decides what is
killed and when. What the process does at that moment depends on the machine.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from cluster.places import place
from cluster.runtime import START_TIMED_OUT
from cluster.storage import TEMPORARY_PREFIX
from job.verify import verify
from preprocessing.fonts import packaged_font

KUZUSHIJI = Path(sys.executable).with_name("kuzushiji")
TAG = "KUZUSHIJI_CHAOS"
# What to kill, with relative frequencies: the command itself, one worker, all workers, Ray's process of a host
# (raylet), Ray's store of the cluster's state (gcs). An orphan is a worker that is suspended while the driver is
# killed, and resumed later, at the latest when the restarted command has ended.
VICTIMS = {"driver": 30, "worker": 30, "workers": 10, "orphan": 16, "raylet": 10, "gcs": 4}
ENDS_THE_COMMAND = {"driver", "orphan", "raylet", "gcs"}
ALONE = ("driver",)  # while Ray does not run
NO_WORKERS = ("driver", "raylet", "gcs")
ALL = tuple(VICTIMS)
NAMES = ("prepare", "train", "predict")
KILLS = {"prepare": (12, 20), "train": (6, 10), "predict": (6, 10)}  # in a round
# Titles that Ray gives to its processes: those that cut pages, train, and read pages.
AT_WORK = ("ray::Map(CutGroup)", "ray::RayTrainWorker", "ray::Map(ReadGroup)")
# These write none of our files, and notice only after a minute that their raylet was killed.
BYSTANDERS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
MOST_ORPHAN_SECONDS = 30.0
COMMAND_SECONDS = 600.0
MOST_SLOW_STARTS = 50
ENDING_SECONDS = 60.0  # for the processes that a command leaves behind to end by themselves
# Few crops, because the starts of Ray and TensorFlow take most of the time anyway.
PAGES, BOXES_PER_PAGE = 16, 8
PREPARE = ["--coverage", "0.2", "--val-fraction", "0.35", "--test-fraction", "0.35"]
TRAIN = ["--architecture", "baseline", "--workers", "2", "--epochs", "2", "--global-batch-size", "16"]
FOR_CHAOS = {"--max-failures": "1000", "--checkpoint-every": "1"}  # if `train` has these options
OF_TIME = ("seconds", "crops_per_s", "data_wait")


@dataclass(frozen=True)
class Kill:
    """A kill of one victim, `delay` seconds after the command is seen to be in `phase`."""

    phase: str
    delay: float
    victim: str
    pick: float
    """In [0, 1): selects one of several victims."""
    asleep: float
    """Seconds until an orphan is resumed."""


@dataclass(frozen=True)
class Phase:
    """A phase of a command: a test whether it has begun, its approximate length in seconds, and possible victims."""

    name: str
    seen: Callable[["Attempt"], bool]
    lasts: float
    victims: tuple[str, ...] = ALL


@dataclass(frozen=True)
class Command:
    """A command that is run until it exits with 0."""

    name: str
    arguments: list[str]
    phases: list[Phase]
    """In order of time. Kills in the last one, in which everything is written, come last: after it, a command that is
    run again has nothing left to do.
    """
    hashes: Callable[[], dict[str, str]]

    def kills(self, rng: random.Random, count: int) -> "deque[Kill]":
        """Return a random plan of `count` kills."""
        plan = []
        for _ in range(count):
            phase = rng.choice([self.phases[0], *self.phases])  # the first phase twice, because it takes least time
            victim = rng.choices(phase.victims, [VICTIMS[name] for name in phase.victims])[0]
            delay, asleep = rng.uniform(0, phase.lasts), rng.uniform(1, MOST_ORPHAN_SECONDS)
            plan.append(Kill(phase.name, delay, victim, rng.random(), asleep))
        return deque(sorted(plan, key=lambda kill: kill.phase == self.phases[-1].name))

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


@dataclass
class Attempt:
    """One process of a command, and what it wrote."""

    number: int
    process: "subprocess.Popen[bytes]"
    stderr: Path
    begun: float = field(default_factory=time.time)

    def says(self, text: str) -> bool:
        return text in self.stderr.read_text(errors="replace")

    def made(self, folder: Path, pattern: str) -> bool:
        """Return whether this attempt has created or changed a file that matches."""
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):
                if path.stat().st_ctime >= self.begun:
                    return True
        return False


def title(process: psutil.Process) -> str:
    """Return a process's command line, or the title that Ray gave it. Empty while it starts, and once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Chaos:
    """Everything that runs, was killed, and was found."""

    def __init__(self, work: Path, partitions: int = 1) -> None:
        self.work, self.partitions, self.run = work, partitions, uuid.uuid4().hex
        (work / "stderr").mkdir(parents=True)
        self.temporary = Path(tempfile.mkdtemp(prefix="kc-"))  # a short path, because Ray's sockets are in it
        self.cache = work / "cache"
        self.started: list[Attempt] = []
        self.asleep: list[tuple[float, psutil.Process]] = []
        self.killed: Counter[str] = Counter()
        self.differences: list[str] = []
        self.slow_starts = 0  # of Ray, on a machine with other load

    # --- processes

    def processes(self, attempt: int | None = None) -> list[psutil.Process]:
        """Return our running processes, whatever their parents are now. attempt: only those of this attempt."""
        tag = f"{TAG}={self.run}.{'' if attempt is None else f'{attempt}.'}".encode()
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                held = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if any(entry.startswith(tag) for entry in held):
                    found.append(process)
        return found

    def writers(self) -> list[psutil.Process]:
        """Return our processes that may still write files."""
        return [process for process in self.processes() if not title(process).startswith(BYSTANDERS)]

    def start(self, command: Command, **settings_too: str) -> Attempt:
        number = len(self.started) + 1
        temporary = self.temporary / str(number)
        temporary.mkdir()
        settings = {
            TAG: f"{self.run}.{number}.",
            "RAY_TMPDIR": str(temporary),
            "TMPDIR": str(temporary),
            "XDG_CACHE_HOME": str(self.cache),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # by default a minute
        }
        given = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        stderr = self.work / "stderr" / f"{number:04d}-{command.name}.txt"
        with stderr.open("wb") as out:
            process = subprocess.Popen(
                [str(KUZUSHIJI), command.name, *command.arguments],
                env=given | settings | settings_too,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.started.append(Attempt(number, process, stderr))
        return self.started[-1]

    def victims(self, kill: Kill, attempt: Attempt) -> list[psutil.Process]:
        """Return the processes to kill at this moment. Empty if there are none of this kind yet."""
        found = []
        for process in self.processes(attempt.number):
            with suppress(psutil.Error):
                line = process.cmdline()
                program = os.path.basename(line[0]) if line else ""
                of_its_own = {
                    "driver": process.pid == attempt.process.pid,
                    "raylet": program == "raylet",
                    "gcs": program == "gcs_server",
                }
                if of_its_own.get(kill.victim, " ".join(line).startswith(AT_WORK)):
                    found.append(process)
        return found if kill.victim == "workers" or not found else [found[int(kill.pick * len(found))]]

    def strike(self, kill: Kill, command: Command, attempt: Attempt) -> bool:
        """Kill. Return whether there was a process to kill."""
        victims = self.victims(kill, attempt)
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                if kill.victim == "orphan":
                    process.suspend()
                    self.asleep.append((time.monotonic() + kill.asleep, process))
                else:
                    process.kill()
        if not victims:
            return False
        if kill.victim == "orphan":
            attempt.process.kill()
        self.killed[kill.victim] += 1
        pids = " ".join(str(process.pid) for process in victims)
        say(f"{command.name} {attempt.number}: {kill.phase} + {kill.delay:.2f} s: {kill.victim} {pids}")
        return True

    def wake(self, everyone: bool = False) -> None:
        """Resume orphans whose time has come."""
        due = [process for when, process in self.asleep if everyone or when < time.monotonic()]
        self.asleep = [(when, process) for when, process in self.asleep if process not in due]
        for process in due:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    # --- commands

    def survive(self, command: Command, kills: "deque[Kill]") -> bool:
        """Run a command until it exits with 0. Return whether it did."""
        while True:
            attempt = self.start(command)
            ended_by = self.disturb(command, attempt, kills)
            code = attempt.process.returncode
            if code == 0:
                break
            # Its message says to run it again. The limit detects a Ray that never starts.
            if code == 1 and attempt.says(START_TIMED_OUT) and self.slow_starts < MOST_SLOW_STARTS:
                self.slow_starts += 1
                continue
            if code is None or ended_by not in ENDS_THE_COMMAND:
                what = f"still runs after {COMMAND_SECONDS:g} s" if code is None else f"ended with {code}"
                self.differ(f"{command.name} {attempt.number} {what}, last kill: {ended_by}; see {attempt.stderr}")
                return False
        self.wake(everyone=True)
        self.await_end(command)
        return True

    def disturb(self, command: Command, attempt: Attempt, kills: "deque[Kill]") -> str | None:
        """Kill as planned while the command runs, until its process has ended or hangs. Return the last victim."""
        last: str | None = None
        due: float | None = None
        deadline = time.monotonic() + COMMAND_SECONDS
        while attempt.process.poll() is None and time.monotonic() < deadline:
            self.wake()
            if kills and last not in ENDS_THE_COMMAND:
                if due is None and command.phase(kills[0].phase).seen(attempt):
                    due = time.monotonic() + kills[0].delay
                if due is not None and time.monotonic() >= due:
                    if self.strike(kills[0], command, attempt):
                        last, due = kills.popleft().victim, None
                    else:
                        due = time.monotonic() + 0.2  # no process of this kind yet
            time.sleep(0.01)
        return last

    def await_end(self, command: Command) -> None:
        """Wait until the processes that a command left behind end by themselves. Those that do not are differences."""
        deadline = time.monotonic() + ENDING_SECONDS
        while (left := self.writers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            if line := title(process):
                self.differ(f"after {command.name} {len(self.started)}: still runs: {line[:200]}")
        self.kill_all()
        for folder in self.temporary.iterdir():
            shutil.rmtree(folder, ignore_errors=True)

    def kill_all(self) -> None:
        """Kill everything that this run started."""
        while left := self.processes():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)

    def close(self) -> None:
        """Kill everything, and remove Ray's files."""
        self.kill_all()
        for attempt in self.started:
            attempt.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)

    # --- results

    def differ(self, what: str) -> None:
        self.differences.append(what)
        say(f"DIFFERENCE: {what}")

    def compare(self, command: Command, reference: dict[str, str], what: str) -> None:
        found = command.hashes()
        for name in sorted(reference.keys() | found.keys()):
            if reference.get(name) != found.get(name):
                self.differ(f"{what}: {name}: {reference.get(name)} became {found.get(name)}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201 - a script


# --- the commands


def prepare_command(work: Path, dataset: Path) -> Command:
    places = ["--pages", str(work / "pages" / "train_images"), "--labels", str(work / "pages" / "train.csv")]
    progress = dataset / ".prepare"
    phases = [
        Phase("start", lambda attempt: True, 8.0, NO_WORKERS),
        Phase("plan", lambda attempt: (progress / "plan.json").is_file(), 8.0),
        Phase("cutting", lambda attempt: attempt.made(progress, f"{TEMPORARY_PREFIX}*"), 0.5),
        Phase("report", lambda attempt: attempt.made(progress, "group-*.json"), 0.5),
        Phase("sealing", lambda attempt: attempt.made(dataset, "README.md"), 0.03, ALONE),
    ]
    arguments = [*places, "--dataset", str(dataset), *PREPARE]
    return Command("prepare", arguments, phases, lambda: hashes_of_dataset(dataset))


def hashes_of_dataset(dataset: Path) -> dict[str, str]:
    """Return the hash of every file in the folder and below, and the findings of `verify`."""
    found = {path.relative_to(dataset): path for path in dataset.rglob("*")}
    hashes = {str(name): sha256(path.read_bytes()) if path.is_file() else "folder" for name, path in found.items()}
    _, faults, strangers = verify(place(dataset))
    return hashes | {"verify": f"{faults}{strangers}"}


def train_command(dataset: Path, models: Path, cache: Path, partitions: int) -> Command:
    has = subprocess.run([str(KUZUSHIJI), "train", "--help"], capture_output=True, text=True, check=True).stdout
    more = [word for option, value in FOR_CHAOS.items() if option in has for word in (option, value)]
    places = ["--dataset", str(dataset), "--models", str(models), "--run", "chaos"]
    staged, runs, folder = cache / "kuzushiji" / "staged", models / ".runs", models / "baseline" / "chaos"
    phases = [
        Phase("start", lambda attempt: True, 10.0, NO_WORKERS),
        Phase("workers", lambda attempt: attempt.says("s after the command started"), 25.0),
        Phase("staging", lambda attempt: attempt.made(staged, "*-*"), 0.5),
        Phase("steps", lambda attempt: attempt.made(staged, "*/in-use"), 12.0),
        Phase("checkpoint", lambda attempt: attempt.made(runs, "baseline-chaos/checkpoint_*"), 1.0),
        Phase("evaluation", lambda attempt: attempt.says("evaluating the weights"), 2.0),
        Phase("model", lambda attempt: attempt.made(folder, "*"), 0.5),
        Phase("sealed", lambda attempt: attempt.made(folder, "manifest.json"), 1.0, NO_WORKERS),
    ]
    arguments = [*places, *TRAIN, "--partitions", str(partitions), *more]
    return Command("train", arguments, phases, lambda: hashes_of_model(models, staged))


def hashes_of_model(models: Path, staged: Path) -> dict[str, str]:
    """Return hashes and contents of a model without times, the findings of `verify`, and files that should be gone."""
    folder = models / "baseline" / "chaos"
    with zipfile.ZipFile(folder / "model.keras") as archive:
        found = {"model.weights.h5": sha256(archive.read("model.weights.h5"))}
    for name in ("labels.txt", "per_class.csv", "misclassified.csv"):
        found[name] = sha256((folder / name).read_bytes())
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    found["epochs"] = str([row["epoch"] for row in history])
    found["history.jsonl"] = str([timeless(row) for row in history])
    found["metrics.json"] = str(timeless(json.loads((folder / "metrics.json").read_text())))
    found["latest.json"] = json.loads((folder.parent / "latest.json").read_text())["run"]
    _, faults, strangers = verify(place(folder))
    left = [path.name for path in (models / ".runs").iterdir()] + [path.name for path in staged.iterdir()]
    return found | {"verify": f"{faults}{strangers}", "left": str(sorted(left))}


def predict_command(work: Path, models: Path, to: Path) -> Command:
    """Return the command that writes tables into `to/read` and pictures into `to/pictures`."""
    places = ["--pages", str(work / "pages" / "train_images"), "--boxes", str(work / "pages" / "train.csv")]
    places += ["--model", str(models / "baseline"), "--out", str(to / "read"), "--annotate", str(to / "pictures")]
    progress = to / "read" / ".predict"
    phases = [
        Phase("start", lambda attempt: True, 8.0, NO_WORKERS),
        Phase("plan", lambda attempt: (progress / "plan.json").is_file(), 16.0),
        Phase("drawing", lambda attempt: attempt.made(to / "pictures", "*.jpeg"), 0.5),
        Phase("report", lambda attempt: attempt.made(progress, "group-*.json"), 0.5),
        Phase("sealing", lambda attempt: attempt.made(to / "read", "manifest.json"), 0.03, ALONE),
    ]
    return Command("predict", places, phases, lambda: hashes_of_predictions(to))


def hashes_of_predictions(to: Path) -> dict[str, str]:
    """Return the hash of every file of tables and pictures, also hidden ones, and the findings of `verify`."""
    found = {str(path.relative_to(to)): path for path in to.rglob("*")}
    hashes = {name: sha256(path.read_bytes()) if path.is_file() else "folder" for name, path in found.items()}
    _, faults, strangers = verify(place(to / "read"))
    return hashes | {"verify": f"{faults}{strangers}"}


def timeless(row: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in row.items() if key not in OF_TIME}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- rounds


def draw_pages(work: Path) -> None:
    """Draw small pages, and keep the labels of the first few boxes of each."""
    pages = work / "pages"
    command = [str(KUZUSHIJI), "sample", "--out", str(pages), "--num-pages", str(PAGES), "--scale", "0.2"]
    command += ["--fonts", str(Path(packaged_font().path).parent)]  # those of the machine would draw other pages
    subprocess.run(command, check=True, capture_output=True)
    header, *rows = (pages / "train.csv").read_text().splitlines()
    cut = [
        f"{page_id},{' '.join(cell.split()[: 5 * BOXES_PER_PAGE])}" for page_id, cell in (r.split(",") for r in rows)
    ]
    (pages / "train.csv").write_text("\n".join([header, *cut]) + "\n")


def command_in(folder: Path, name: str, chaos: Chaos) -> Command:
    """Return a command that writes all its output into a folder."""
    if name == "prepare":
        return prepare_command(chaos.work, folder)
    if name == "predict":
        return predict_command(chaos.work, chaos.work / "reference" / "train", folder)
    return train_command(chaos.work / "reference" / "prepare", folder, chaos.cache, chaos.partitions)


def run(
    work: Path,
    rounds: int,
    seed: int,
    kills: int | None = None,
    names: Sequence[str] = NAMES,
    partitions: int = 1,
) -> Chaos:
    """Run all rounds. kills: of each command; None: as in `KILLS`."""
    rng = random.Random(seed)
    chaos = Chaos(work, partitions)
    try:
        draw_pages(work)
        references = {}
        for name in NAMES[: 1 + NAMES.index(names[-1])]:  # each needs what the one before made
            command = command_in(work / "reference" / name, name, chaos)
            if not chaos.survive(command, deque()):
                return chaos
            references[name] = command.hashes()
        for number in range(1, rounds + 1):
            for name in names:
                plan = command_in(work, name, chaos).kills(rng, kills or rng.randint(*KILLS[name]))
                disturb(chaos, name, plan, work / f"round-{number}", references[name])
            say(f"round {number} of {rounds}: {chaos.killed.total()} kills, {len(chaos.differences)} differences")
    finally:
        chaos.close()
    return chaos


def disturb(chaos: Chaos, name: str, kills: "deque[Kill]", folder: Path, reference: dict[str, str]) -> None:
    """Run one command from scratch to its end, and again from scratch until all kills are done."""
    again = 0
    while kills:
        again += 1
        planned, found = len(kills), len(chaos.differences)
        command = command_in(folder / f"{name}-{again}", name, chaos)
        if chaos.survive(command, kills):
            chaos.compare(command, reference, f"{folder.name}/{name}-{again}")
        if len(chaos.differences) == found:
            shutil.rmtree(folder / f"{name}-{again}")
        if len(kills) == planned:  # no such process ran: kill the driver instead, which always runs
            say(f"{name}: nobody to kill: {kills[0]}")
            kills[0] = replace(kills[0], phase=command.phases[0].name, delay=0.0, victim="driver")


def main() -> int:
    """Run as the options say. Return 1 if anything differed."""
    parser = argparse.ArgumentParser(description="Kill commands at random; they must end with the same bytes.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--kills", type=int, help="of each command; default: 12 to 20 of prepare, 6 to 10 of others")
    parser.add_argument("--work", type=Path, help="new folder for all that is written; stays. Default: one that goes")
    parser.add_argument("--commands", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--partitions", type=int, default=1, help="of train")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    work = given.work or Path(tempfile.mkdtemp(prefix="kuzushiji-chaos-"))
    say(f"{given.rounds} rounds, seed {given.seed}, in {work}")
    chaos = run(work.resolve(), given.rounds, given.seed, given.kills, given.commands, given.partitions)
    kinds = ", ".join(f"{chaos.killed[victim]} {victim}" for victim in VICTIMS)
    say(f"{given.rounds} rounds, {chaos.killed.total()} kills ({kinds}), {len(chaos.differences)} differences")
    say(f"{chaos.slow_starts} commands ended because Ray took too long to start, and were run again as they say")
    if not given.work and not chaos.differences:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if chaos.differences else 0


if __name__ == "__main__":
    sys.exit(main())

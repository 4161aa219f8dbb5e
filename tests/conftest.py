"""Shared fixtures and helpers: a Ray for the whole session, small datasets, one training, the real pages if present.

`make test` runs the tests in several processes (pytest-xdist). Each has its own Ray and cache. Datasets and the
training are made once, and each process has its own copy.
"""

import fcntl
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from equal_workers import A_FEW, EQUAL_BATCH, one_batch, then
from fake_cloud.bucket import StrictBucket
from google.cloud.storage.retry import DEFAULT_RETRY
from schedule import pytest_collection_modifyitems, pytest_terminal_summary, pytest_xdist_make_scheduler  # noqa: F401
from small_head import WORK, work_after
from upath import UPath

# Set before anything imports Ray or TensorFlow, so some imports come after (E402): a cache of its own for this process,
# and no output of TensorFlow.
_CACHE = tempfile.TemporaryDirectory(prefix="kuzushiji-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# Only the test of a drained node needs this process of Ray Train. It takes 1.5 s to start, in each training.
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
# No test reads the metrics of Ray's processes. About fifty processes collect them.
os.environ["RAY_enable_metrics_collection"] = "0"  # noqa: SIM112 - as Ray spells it
# By default, Ray Train polls the workers' reports every 2 s. An epoch of a test takes less.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ.pop("RAY_ADDRESS", None)
# A shell ignores Ctrl-C in background processes, and the commands that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A slow machine must not fail a test.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")

from chaos import Chaos  # noqa: E402

from cluster import bucket, google_client  # noqa: E402
from cluster.capacity import Request  # noqa: E402
from cluster.errors import KuzushijiError  # noqa: E402
from cluster.manifest import read_manifest  # noqa: E402
from cluster.places import place  # noqa: E402
from cluster.progress import log  # noqa: E402
from cluster.runtime import START_TIMED_OUT, ray_session  # noqa: E402
from job.cli import main  # noqa: E402
from preprocessing.config import PrepareConfig  # noqa: E402
from preprocessing.dataset import DatasetManifest  # noqa: E402
from preprocessing.fonts import packaged_font  # noqa: E402
from preprocessing.prepare import prepare  # noqa: E402
from preprocessing.sample.sample import sample  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "kuzushiji"
KUZUSHIJI = Path(sys.executable).with_name("kuzushiji")
CPUS = 2  # of the tests' Ray: few, because each process of Ray takes seconds to start
# A training on the dataset `few`: 15 steps in 3 epochs of 5, with dropout.
GIVEN = {
    "architecture": "baseline", "epochs": 3, "global_batch_size": 7, "learning_rate": 1e-4, "workers": 2,
    "augment": "standard", "schedule": "cosine", "weight_decay": 0.01,
}  # fmt: skip

# --- created once, or by one process at a time


def between_processes(factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the processes of one test run share."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def one_at_a_time(factory: pytest.TempPathFactory, name: str) -> Iterator[None]:
    """Let one process of the test run at a time into the block with this name. The others wait."""
    with open(between_processes(factory) / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


TRIES_TO_START_RAY = 5


def until_ray_starts(command: Callable[[], "subprocess.CompletedProcess[str]"]) -> "subprocess.CompletedProcess[str]":
    """Run a command that starts its own Ray, and return the completed process.

    The command is run again, as its error message says, if Ray took more than 30 s to start: a busy machine must not
    fail a test.
    """
    for _ in range(TRIES_TO_START_RAY):
        done = command()
        if START_TIMED_OUT not in done.stderr + done.stdout:
            break
    return done


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return this process's copy of a folder that `make` fills in one of the processes."""
    shared = between_processes(factory)
    with one_at_a_time(factory, name):
        if not (shared / name).exists():
            (shared / f"{name}.new").mkdir()
            make(shared / f"{name}.new")
            (shared / f"{name}.new").rename(shared / name)
    return Path(shutil.copytree(shared / name, factory.mktemp(name) / name))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real pages and labels."""
    if not SHARED.is_dir():
        pytest.skip("needs the real pages at ../shared/kuzushiji, next to the checkout")
    return SHARED


@pytest.fixture(scope="session")
def cases(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one real page and its labels in many forms."""
    maker = shared.parent / "cases" / "make_cases.py"
    if not maker.exists():
        pytest.skip("needs ../shared/cases, next to the checkout")

    def make(out: Path) -> None:
        subprocess.run([sys.executable, maker, out], check=True, capture_output=True)

    return made_once(tmp_path_factory, "cases", make)


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[StrictBucket]:
    """Yield a strict bucket on loopback."""
    with StrictBucket(page_size=10) as running:
        running.create("demo")
        yield running


@pytest.fixture(scope="module")
def strict(bucket_server: StrictBucket) -> Iterator[StrictBucket]:
    """Yield a strict bucket on loopback that this process and its children use as Google Cloud Storage."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket_server.environment.items():
            patch.setenv(name, value)
        # By default, Google's client retries after 1 s on average, gcsfs after 1, 2 and 4 s.
        patch.setattr(DEFAULT_RETRY, "_initial", 0.01)
        forget()
        yield bucket_server
        google_client.client().close()
    forget()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()  # closes the connections of refused downloads, which google-cloud-storage leaves open


def forget() -> None:
    """Clear the caches of credentials and clients of Google Cloud Storage."""
    for cached in (google_client.gcsfs_options, google_client.credentials, google_client.client, bucket.reach):
        cached.cache_clear()


@pytest.fixture
def folder(strict: StrictBucket) -> Iterator[UPath]:
    """Yield a new folder on the bucket. Its name matches none of the faults' patterns."""
    yield place(f"gs://demo/{uuid.uuid4().hex}")
    strict.faults.clear()


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    """Yield a `Chaos`. Its processes are killed at the end."""
    started = Chaos(tmp_path)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(scope="session")
def ray_here(bucket_server: StrictBucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start one local Ray for all tests of the session that need it. Its workers use the strict bucket."""
    with ExitStack() as stack:
        with one_at_a_time(tmp_path_factory, "ray"), pytest.MonkeyPatch.context() as at_start:
            for name, value in bucket_server.environment.items():
                at_start.setenv(name, value)
            for tries in range(TRIES_TO_START_RAY):
                try:
                    stack.enter_context(ray_session(Request(cpus=CPUS)))
                    break
                except KuzushijiError as error:
                    if str(error) != START_TIMED_OUT or tries + 1 == TRIES_TO_START_RAY:
                        raise
                    import ray

                    ray.shutdown()
        yield
    end_what_is_left()


@pytest.fixture
def ray_address(ray_here: None) -> str:
    """Return the address of the tests' Ray, with which other processes can use it like a cluster."""
    import ray

    address: str = ray.get_runtime_context().gcs_address
    return address


def end_what_is_left() -> None:
    """Kill processes of this session's Ray that outlive it: a controller of Ray Train may hang in its exit."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("XDG_CACHE_HOME") == _CACHE.name:
                process.kill()


def draw(out: Path, num_pages: int, seed: int) -> None:
    """Draw small pages, with the packaged font alone: the fonts of a machine would draw other pages."""
    sample(out, num_pages=num_pages, seed=seed, scale=0.2, fonts=Path(packaged_font().path).parent)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return twelve small drawn pages of three books or more, in Kaggle's format."""
    return made_once(tmp_path_factory, "pages", lambda out: draw(out, num_pages=12, seed=7))


@pytest.fixture(scope="session")
def dataset(ray_here: None, pages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the drawn pages, prepared with few classes."""
    source = place(pages / "train_images"), place(pages / "train.csv")
    config = PrepareConfig(coverage=0.5)
    return made_once(tmp_path_factory, "dataset", lambda out: prepare(*source, place(out), config))


@pytest.fixture(scope="session")
def few(ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of two global batches of 16, with few classes."""

    def make(folder: Path) -> None:
        draw(folder / "pages", num_pages=1, seed=42)
        source = place(folder / "pages" / "train_images"), place(folder / "pages" / "train.csv")
        config = PrepareConfig(coverage=0.2, val_fraction=0.35, test_fraction=0.35)
        counts = prepare(*source, place(folder / "crops"), config)[0].counts
        assert counts["train"]["examples"] // 16 == 2

    return made_once(tmp_path_factory, "few", make) / "crops"


@pytest.fixture(scope="session")
def real_dataset(ray_here: None, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the three real pages, prepared with the defaults."""
    source = place(shared / "pages"), place(shared / "train.csv")
    return made_once(tmp_path_factory, "real", lambda out: prepare(*source, place(out), PrepareConfig()))


def job_of(config: Any, **fields: Any) -> Any:
    """Return a `TrainJob` for a `Training` that is created without `train`."""
    from job.train.job import TrainJob

    nowhere = dict.fromkeys(("dataset", "dataset_manifest_sha256", "folder", "checkpoints", "curves"), "/nowhere")
    if "dataset" in fields:
        nowhere["dataset_manifest_sha256"] = read_manifest(place(fields["dataset"]), DatasetManifest).sha256
    return TrainJob(**{"config": config, "weights": None, "run": "test", "board": None} | nowhere | fields)


def work_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Make this process the only worker of a training (Ray Train's local mode).

    Threads and determinism stay as they are, because TensorFlow has already run in this process.
    """
    import ray.train

    local = ray.train.ScalingConfig(num_workers=0)
    patch.setattr("ray.train.ScalingConfig", lambda **_: local)
    patch.setattr("job.train.worker.configure_tensorflow", lambda _: None)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process the only worker of the test's trainings."""
    work_in_this_process(monkeypatch)


def mount_small_disk(folder: Path, size: str) -> None:
    """Mount an in-memory disk on a folder, or skip the test."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if not shutil.which("mount") or subprocess.run(command, check=False).returncode:
        pytest.skip("need the program `mount` (Debian: apt install mount) and the right to use it (root)")


WorkersDo = Callable[[Callable[[dict[str, Any]], object] | None], None]


@pytest.fixture
def workers_do(monkeypatch: pytest.MonkeyPatch) -> WorkersDo:
    """Return a function that changes what workers do in this test's trainings (see `small_head.work_after`)."""
    return lambda change=None: monkeypatch.setattr(WORK, work_after(change))


# The command line with small heads; its arguments follow.
KUZUSHIJI_WITH_SMALL_HEAD = [sys.executable, str(Path(__file__).with_name("small_head.py"))]


@dataclass(frozen=True)
class CommandResult:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """Lines of stderr, without the log lines, which begin with the time of day."""
        return [line for line in self.stderr.splitlines() if line[2:3] != ":"]


Kuzushiji = Callable[..., CommandResult]


@pytest.fixture
def kuzushiji(monkeypatch: pytest.MonkeyPatch) -> Kuzushiji:
    """Return a function that runs the command line in this process, with this process's Ray."""
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(log, name, getattr(log, name))  # restored afterwards

    def run(*arguments: object) -> CommandResult:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return CommandResult(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def two_workers(dataset: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the result of an undisturbed training by two workers.

    `models` is what they trained, `equal` what they measured afterwards (see `equal_workers.py`).
    """
    from job.config import TrainConfig
    from job.train.driver import train

    def make(folder: Path) -> None:
        one = job_of(
            TrainConfig.model_validate(GIVEN | {"global_batch_size": EQUAL_BATCH, "schedule": "constant"}),
            dataset=str(dataset),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WORK, work_after(then(one_batch(one, folder / "equal", A_FEW), folder / "equal")))
            (outcome,) = train(place(few), place(folder / "models"), [TrainConfig.model_validate(GIVEN)], "first")
        assert outcome.trained

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture(scope="session")
def trained(two_workers: Path) -> Path:
    """Return a model folder, trained by two undisturbed workers."""
    return two_workers / "models" / "baseline" / "first"


def reseal(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a model folder, and update its manifest, as another program might."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (entry,) = [one for one in manifest["files"] if one["name"] == name]
    (folder / name).write_bytes(content)
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def save_test_crops(dataset: Path, images: Path) -> np.ndarray:
    """Write the crops of the test split as one array. Return their labels."""
    from job.data.staging import staged

    with staged(place(dataset), ["test"]) as data:
        crops = data.splits["test"]
        np.save(images, crops.images)
        return np.array(crops.labels)


def in_fresh_process(script: str, *arguments: str, cwd: Path) -> str:
    """Run a script in a new interpreter, in the folder `cwd`. Return its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

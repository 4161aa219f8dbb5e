"""What the tests share: a Ray of their own for the whole session, small datasets, the real pages where they are."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before anything imports Ray or TensorFlow, so that some imports come after (E402):
# staged data in a folder of the session, and no word to the terminal.
_CACHE = tempfile.TemporaryDirectory(prefix="kuzushiji-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ.pop("RAY_ADDRESS", None)

from cluster.runtime import ray_session  # noqa: E402
from cluster.storage import place  # noqa: E402
from preprocessing.config import PrepareConfig  # noqa: E402
from preprocessing.prepare import prepare  # noqa: E402
from preprocessing.sample.pages import sample  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "kuzushiji"
KUZUSHIJI = Path(sys.executable).with_name("kuzushiji")
MOST_WORKERS = 4
# A training on the dataset `few`: 15 steps in 3 epochs of 5, with dropout.
GIVEN = {"architecture": "baseline", "epochs": 3, "global_batch_size": 7, "learning_rate": 1e-4, "workers": 2}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real pages and labels."""
    if not SHARED.is_dir():
        pytest.skip(f"the real pages are not at {SHARED.parent.name}/{SHARED.name} beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One local Ray for all tests that need one; it ends with the session."""
    with ray_session(at_least_cpus=MOST_WORKERS):
        yield


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small drawn pages of three books or more, in Kaggle's format."""
    out = tmp_path_factory.mktemp("sample") / "pages"
    sample(out, num_pages=12, seed=7, scale=0.2)
    return out


@pytest.fixture(scope="session")
def dataset(ray_here: None, pages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn pages, prepared with few classes."""
    out = tmp_path_factory.mktemp("dataset") / "crops"
    prepare(place(pages / "train_images"), place(pages / "train.csv"), place(out), PrepareConfig(coverage=0.5))
    return out


@pytest.fixture(scope="session")
def few(ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two global batches of 16, in few classes."""
    folder = tmp_path_factory.mktemp("few")
    sample(folder / "pages", num_pages=1, seed=42, scale=0.2)
    source = place(folder / "pages" / "train_images"), place(folder / "pages" / "train.csv")
    config = PrepareConfig(coverage=0.2, val_fraction=0.35, test_fraction=0.35)
    counts = prepare(*source, place(folder / "crops"), config)[0].counts
    assert counts["train"]["examples"] // 16 == 2
    return folder / "crops"


@pytest.fixture(scope="session")
def real_dataset(ray_here: None, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three real pages, prepared with the defaults."""
    out = tmp_path_factory.mktemp("real") / "crops"
    prepare(place(shared / "pages"), place(shared / "train.csv"), place(out), PrepareConfig())
    return out


def job_of(config: Any, **fields: Any) -> Any:
    """A `TrainJob` for a `Training` that is made without `train`."""
    from job.train.run import TrainJob

    nowhere = dict.fromkeys(("dataset", "folder", "checkpoints", "curves"), "/nowhere")
    return TrainJob(**{"config": config, "weights": None, "run": "test", "board": None} | nowhere | fields)


def with_small_head() -> Any:
    """What the workers are to do, with steps that take no time. A closure: Ray would import a function of this file."""

    def work(job: dict[str, Any]) -> Any:
        from job.model import architectures
        from job.train import run

        architectures.BASELINE_HEAD = (16, 8)
        return run._work(job)

    return work


# The command line with such workers: to be followed by its arguments.
KUZUSHIJI_WITH_SMALL_HEAD = [sys.executable, "-c", """
import atexit, sys
import job.train.run

atexit.register(lambda: print("TensorFlow was loaded here:", "tensorflow" in sys.modules, file=sys.stderr))

def work(job):
    from job.model import architectures
    from job.train import run

    architectures.BASELINE_HEAD = (16, 8)
    return run._work(job)

job.train.run._work = work
from job.cli import main
main()
"""]  # fmt: skip


@pytest.fixture(scope="session")
def trained(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, trained by two workers whom nobody disturbed."""
    from job.config import TrainConfig
    from job.train.driver import train

    models = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.train.run._work", with_small_head())
        (outcome,) = train(place(few), place(models), [TrainConfig.model_validate(GIVEN)], "first")
    assert outcome.trained
    return Path(outcome.folder.path)


def save_test_crops(dataset: Path, images: Path) -> np.ndarray:
    """Write the crops of the test split as one array; returns their labels."""
    from job.data.staging import staged

    with staged(place(dataset), ["test"]) as data:
        crops = data.splits["test"]
        np.save(images, crops.images)
        return np.array(crops.labels)


def in_fresh_process(script: str, *arguments: str, cwd: Path) -> str:
    """Standard output of a script in a new interpreter whose folder is elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

"""One GPU trains and reads as CPUs do, with the same bits each time with `--deterministic`. Skipped without one."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import KUZUSHIJI_WITH_SMALL_HEAD

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    if (
        not shutil.which("nvidia-smi")
        or subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode
    ):
        pytest.skip("need an NVIDIA GPU")


def kuzushiji(*arguments: Any) -> None:
    done = subprocess.run(
        [*KUZUSHIJI_WITH_SMALL_HEAD, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train the same on CPUs, on a GPU, and twice on a GPU with `--deterministic`; return each run's model folder."""
    models = tmp_path_factory.mktemp("gpu")
    runs: dict[str, tuple[Any, ...]] = {"cpu": (), "fast": ("--gpus-per-worker", 1)}
    runs |= dict.fromkeys(("first", "second"), ("--gpus-per-worker", 1, "--deterministic"))
    few = ("--architecture", "baseline", "--epochs", 2, "--global-batch-size", 64, "--learning-rate", 1e-5)
    for run, options in runs.items():
        kuzushiji("train", "--dataset", dataset, "--models", models, *few, "--run", run, *options)
    return {run: models / "baseline" / run for run in runs}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", ["fast", "first"])
def test_a_gpu_gives_the_losses_of_cpus(run: str, trained: dict[str, Path]) -> None:
    assert losses(trained[run]) == pytest.approx(losses(trained["cpu"]), rel=5e-3)  # TF32 has 10 bits of mantissa


def test_deterministic_training_on_a_gpu_repeats_bit_for_bit(trained: dict[str, Path]) -> None:
    import keras

    assert losses(trained["first"]) == losses(trained["second"])
    models = [keras.saving.load_model(trained[run] / "model.keras") for run in ("first", "second")]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        assert np.array_equal(one, other)


def test_a_gpu_reads_what_cpus_read(trained: dict[str, Path], pages: Path, tmp_path: Path) -> None:
    found = []
    for gpus in (0, 1):
        out = tmp_path / str(gpus)
        source = ("--pages", pages / "train_images", "--boxes", pages / "train.csv")
        kuzushiji("predict", "--model", trained["cpu"], *source, "--out", out, "--gpus", gpus)
        found.append(pd.read_parquet(sorted(out.glob("predictions-*.parquet"))))
    probabilities = [table["probability_1"].to_numpy() for table in found]
    assert np.abs(probabilities[0] - probabilities[1]).max() < 1e-4

"""`model.keras` loads in other versions of Keras and with its other backends, and predicts the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from job.config import NAMES

ROOT = Path(__file__).parents[1]
OLD = sorted((ROOT / "tests" / "old_keras").glob("*.lock"), key=lambda lock: [int(n) for n in lock.stem.split(".")])
VERSIONS = [lock.stem for lock in OLD]
LOAD = """
import json, sys
import keras, numpy as np

folder, *names = sys.argv[1:]
crops = np.load(f"{folder}/crops.npy")
differences = {}
for name in names:
    model = keras.saving.load_model(f"{folder}/{name}.keras", safe_mode=True)
    expected = np.load(f"{folder}/{name}.npy")
    predicted = keras.ops.convert_to_numpy(model(crops, training=False))
    differences[name] = float(np.abs(predicted - expected).max())
print(json.dumps([keras.__version__, keras.backend.backend(), differences]))
"""


class Saved:
    """A folder with models as a training saves them, but with narrow heads, and their predictions for two crops."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.crops = np.random.default_rng(0).uniform(0, 255, (2, 80, 80, 1)).astype(np.float32)
        np.save(folder / "crops.npy", self.crops)

    def add(self, name: str) -> None:
        """name: an architecture, or one and a precision: `resnet.mixed_bfloat16`."""
        import keras

        from job.model import architectures
        from job.model.portable import save_portable

        if (self.folder / f"{name}.npy").exists():
            return
        keras.utils.set_random_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            for widths in ("BASELINE_HEAD", "HEAD", "FCN_FILTERS"):
                patch.setattr(architectures, widths, (20, 10))
            architecture, _, precision = name.partition(".")
            keras.config.set_dtype_policy(precision or "float32")
            try:
                model = architectures.ARCHITECTURES[architecture](7)
            finally:
                keras.config.set_dtype_policy("float32")
        for variable in model.variables:
            if "gamma" in variable.path:  # some start at 0, which would hide the layers before them
                variable.assign(np.random.default_rng(1).uniform(0.5, 1.5, variable.shape))
        save_portable(model, self.folder / f"{name}.keras")
        np.save(self.folder / f"{name}.npy", np.asarray(model(self.crops, training=False)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def differences(saved: Saved, names: tuple[str, ...], backend: str, version: str | None) -> dict[str, float]:
    """Return the largest difference of probabilities from ours, by model. version: of Keras; None: ours."""
    for name in names:
        saved.add(name)
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("PYTHONPATH", None)
    if version:
        old = Path(sys.prefix) / "old_keras" / version
        if not old.exists():
            pytest.skip(f"Keras {version} is not installed in {old} (make .venv/.installed-dev)")
        environment["PYTHONPATH"] = str(old)
    command = [sys.executable, "-c", LOAD, str(saved.folder), *names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    loaded_by, with_backend, found = json.loads(process.stdout)
    assert with_backend == backend
    if version:
        assert loaded_by == version
    assert isinstance(found, dict)
    return found


def test_the_oldest_keras_is_the_one_that_the_readme_and_the_code_name() -> None:
    from job.model.portable import OLDEST_KERAS

    assert VERSIONS[0].startswith(f"{OLDEST_KERAS}.")
    assert f"Keras {OLDEST_KERAS}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_a_model_predicts_the_same_in_the_oldest_versions_of_keras_with_jax_in_bfloat16_within_its_rounding(
    version: str, saved: Saved
) -> None:
    found = differences(saved, ("resnet", "baseline", "fcn", "resnet.mixed_bfloat16"), "jax", version)
    assert 0 < found.pop("resnet.mixed_bfloat16") < 0.02  # bfloat16 has 8 significant bits
    assert max(found.values()) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("version", [*VERSIONS, None])
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_every_architecture_predicts_the_same_everywhere(backend: str, version: str | None, saved: Saved) -> None:
    if backend == "torch":
        pytest.importorskip("torch", reason="torch is not installed")
    found = differences(saved, NAMES, backend, version)
    print(backend, version or "ours", found)  # noqa: T201
    assert max(found.values()) < 1e-5


def test_only_settings_at_their_defaults_are_left_out(tmp_path: Path) -> None:
    import zipfile

    import keras

    from job.model.portable import save_portable

    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(renorm=True), keras.layers.Dense(2)])
    save_portable(model, tmp_path / "model.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config = archive.read("config.json").decode()
    assert '"renorm": true' in config
    assert not {name for name in ("quantization_config", "input_axes", "ragged", "renorm_momentum") if name in config}
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.to_json() == model.to_json()
    assert all(np.array_equal(a, b) for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True))

"""Initial weights of a base: a file or a download, checked and shared; and several architectures in one `train`."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import Kuzushiji, WorkersDo

from cluster.errors import DamageError, InputError, OptionError
from cluster.places import place
from job.config import TRANSFER, configs_of
from job.model.pretrained import IMAGENET, Published, local_copy, obtain, weights_option
from job.train.driver import train
from job.verify import verify


@pytest.fixture(scope="module")
def base() -> Any:
    """An Xception base."""
    import keras

    keras.utils.set_random_seed(1)
    return keras.applications.Xception(include_top=False, weights=None, input_shape=(80, 80, 3))


@pytest.fixture(scope="module")
def made(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the weights of the base in both formats that Keras reads; published files have the older one."""
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

    folder = tmp_path_factory.mktemp("made")
    base.save_weights(folder / "new.weights.h5")
    with h5py.File(folder / "old.h5", "w") as file:
        save_weights_to_hdf5_group(file, base)
    return {"new": folder / "new.weights.h5", "old": folder / "old.h5"}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.model.architectures.HEAD", (16, 8))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("form", ["new", "old"])
def test_a_weights_file_is_stored_by_its_hash_and_read_in_both_formats(
    form: str, base: Any, made: dict[str, Path], tmp_path: Path
) -> None:
    from job.model.architectures import ARCHITECTURES

    handed = weights_option(str(made[form]))
    assert handed is not None
    config = configs_of(["xception"], handed.identity, None)[0]
    shared = obtain(config, handed, place(tmp_path))
    assert shared is not None
    assert shared.sha256 == hashlib.sha256(made[form].read_bytes()).hexdigest()
    assert [path.name for path in (tmp_path / ".weights").iterdir()] == [shared.sha256 + handed.suffix]
    with local_copy(shared) as local:
        model = ARCHITECTURES["xception"](5, weights=local)
    for mine, given in zip(model.weights, base.weights, strict=False):
        assert np.array_equal(mine, given), given.path
    Path(shared.place).write_bytes(b"changed")
    with pytest.raises(DamageError, match="must not change"), local_copy(shared):
        pass
    assert obtain(config, handed, place(tmp_path)) == shared  # and the copy is written again


@pytest.mark.usefixtures("narrow")
def test_a_file_that_does_not_fit_is_refused_in_one_line_before_ray_starts(
    made: dict[str, Path], tmp_path: Path
) -> None:
    no_hdf5 = tmp_path / "text.weights.h5"
    no_hdf5.write_text("not weights")
    linked = tmp_path / "linked.h5"
    with h5py.File(linked, "w") as file:
        file["layer"] = h5py.ExternalLink(made["old"], "/")
    for path, architecture in ((made["new"], "resnet152v2"), (made["old"], "resnet152v2"), (no_hdf5, "xception"),
                               (linked, "xception")):  # fmt: skip
        handed = weights_option(str(path))
        assert handed is not None
        config = configs_of([architecture], handed.identity, None)[0]
        with pytest.raises(InputError, match=f"--weights must be .* of {architecture} without its top") as raised:
            obtain(config, handed, place(tmp_path))
        assert "\n" not in str(raised.value)
        assert str(path) in str(raised.value)
    assert not (tmp_path / ".weights").exists()  # a refused file is not kept
    with pytest.raises(OptionError, match="must be the file of the config"):
        obtain(configs_of(["xception"], f"sha256:{'0' * 64}", None)[0], None, place(tmp_path))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a web server on loopback, which serves `published.h5`, and the paths that were requested."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            asked.append(self.path)

    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "published.h5").write_bytes(b"weights of ImageNet, as it were")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "www"))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()


@pytest.fixture
def keras_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that gives Keras a new cache, as KERAS_HOME does when a process starts."""

    def use(name: str) -> None:
        (tmp_path / name).mkdir()  # otherwise Keras would use one in /tmp
        monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path / name))

    return use


def test_imagenet_weights_are_fetched_once_checked_and_shared(
    server: tuple[str, list[str]],
    keras_home: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(IMAGENET) == set(TRANSFER)
    address, asked = server
    data = (tmp_path / "www" / "published.h5").read_bytes()
    md5, sha256 = hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest()  # noqa: S324  # published: MD5

    def fetch(url: str, md5: str, models: Path) -> str:
        """Return the place and the hash of the weights, or the error message."""
        monkeypatch.setitem(IMAGENET, "xception", Published(url, md5))
        try:
            found = obtain(configs_of(["xception"], "imagenet", None)[0], None, place(models))
        except InputError as error:
            return str(error)
        assert found
        return f"{found.place} {found.sha256}"

    here, nowhere = f"{address}/published.h5", "http://127.0.0.1:9/published.h5"
    models, damaged = tmp_path / "models", tmp_path / "damaged"
    shared = models / ".weights" / "published.h5"
    keras_home("first")
    unreachable = fetch(nowhere, md5, models)
    assert f"--weights imagenet must reach {nowhere}" in unreachable
    assert f"copy it to {shared}, or, for one architecture, name it with --weights" in unreachable
    assert f"copy it to {shared}" in fetch(here, "0" * 32, models)
    assert not shared.exists()
    asked.clear()
    keras_home("second")
    assert fetch(here, md5, models) == f"{shared} {sha256}"
    assert asked == ["/published.h5"]
    # With another cache and no download: the file next to the models is enough, and is checked.
    keras_home("third")
    (damaged / ".weights").mkdir(parents=True)
    (damaged / ".weights" / "published.h5").write_bytes(b"damaged")
    assert fetch(nowhere, md5, models) == f"{shared} {sha256}"
    assert "must reach" in fetch(nowhere, md5, damaged)


def test_a_failed_download_is_one_line_per_architecture(
    few: Path,
    kuzushiji: Kuzushiji,
    keras_home: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["train", "--dataset", few, "--models", tmp_path / "models", "--global-batch-size", "16"]
    command += ["--architecture", "xception", "--architecture", "resnet152v2"]
    keras_home("keras")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no request leaves this machine
    done = kuzushiji(*command, "--debug")
    assert done.code == 1
    assert re.findall(r"^(\w+) +failed: --weights imagenet must reach https://", done.stdout, re.M) == [
        "xception", "resnet152v2",
    ]  # fmt: skip
    assert done.stderr.count("Traceback") >= 2
    lines = kuzushiji(*command).stderr.splitlines()
    assert len(lines) == 6  # for each: the batch size, the download, the failure
    assert all(re.match(r"[0-9:]{8} (xception|resnet152v2): ", line) for line in lines)


@pytest.mark.usefixtures("in_this_process")
def test_a_failed_architecture_does_not_stop_the_others(
    few: Path,
    kuzushiji: Kuzushiji,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (16, 8))
    caplog.set_level("INFO", "kuzushiji")
    (tmp_path / "models" / ".runs" / "fcn-both.json").mkdir(parents=True)  # a folder where its options must be written
    # Curves and a report that can't be written fail no training either.
    (tmp_path / "models" / "tensorboard").touch()
    (tmp_path / "models" / "baseline" / "both.report.html").mkdir(parents=True)
    command = ["train", "--dataset", str(few), "--models", "models", "--run", "both"]
    command += ["--architecture", "fcn", "--architecture", "baseline"]
    command += ["--epochs", "1", "--global-batch-size", "16", "--cpus-per-worker", "1"]
    done = kuzushiji(*command)
    assert done.code == 1, done.stderr
    lines = done.stderr.splitlines()
    started, failed, trained = (
        [i for i, line in enumerate(lines) if text in line]
        for text in ("starting 1 worker", "fcn: failed: ", "baseline: epoch 1 of 1")
    )
    # At the same time: both started before either ended.
    assert len(started) == 2
    assert max(started) < min(failed + trained)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["test", "baseline", "fcn"]
    assert re.search("^fcn +failed: .*/.runs: Is a directory", done.stdout, re.M)
    assert verify(place(tmp_path / "models" / "baseline" / "both"))[1:] == ([], [])
    not_written = re.findall(r"([^/]+) could not be written: ", done.stderr)
    assert set(not_written) == {"events.out.tfevents.00001", "both.report.html"}
    again = kuzushiji(*command, "--json")
    assert again.code == 1
    result = json.loads(again.stdout)
    assert [(model["architecture"], model["trained"]) for model in result["models"]] == [("baseline", False)]
    assert [fault.split(":")[0] for fault in result["faults"]] == ["fcn"]
    # A model that was finished, and damaged later, is reported in the same way.
    (tmp_path / "models" / "baseline" / "both" / "metrics.json").write_text("{")
    damaged = kuzushiji(*command, "--json")
    assert damaged.code == 1
    result = json.loads(damaged.stdout)
    assert result["models"] == []
    assert [fault.split(":")[0] for fault in result["faults"]] == ["baseline", "fcn"]
    assert "metrics.json must be a JSON object written by a training" in result["faults"][0]


@pytest.mark.long
def test_a_lost_worker_repeats_at_most_one_saved_epoch_and_frozen_layers_keep_their_weights(
    few: Path,
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers_do: WorkersDo,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Uploads take longer than epochs; the worker dies just after it has reported epoch 4."""
    import keras

    marker = str(tmp_path / "died")

    def change(given: dict[str, Any]) -> None:
        import os
        import time
        from pathlib import Path

        from ray.train.v2._internal.execution.storage import StorageContext

        from job.train import training

        upload, report = StorageContext.persist_current_checkpoint, training.Training._report

        def slowly(*arguments: Any, **options: Any) -> Any:
            time.sleep(4)
            return upload(*arguments, **options)

        def then_die(training: Any, row: dict[str, Any]) -> None:
            report(training, row)
            here = [path for path in training.dataset.folder.iterdir() if (path / "state.json").exists()]
            with open(marker + ".pending", "a") as pending:
                pending.write(f"{len(here)}\n")
            if row["epoch"] == 4 and not Path(marker).exists():
                Path(marker).touch()
                os._exit(1)

        StorageContext.persist_current_checkpoint, training.Training._report = slowly, then_die

    workers_do(change)
    monkeypatch.setattr("job.model.architectures.HEAD", (16, 8))
    caplog.set_level("INFO", "kuzushiji")
    handed = weights_option(str(made["new"]))
    assert handed is not None
    config = configs_of(["xception"], handed.identity, "last", epochs=5, global_batch_size=16, learning_rate=1e-3)
    outcome = train(place(few), place(tmp_path), config, "lost", handed)[0]
    assert Path(marker).exists()
    assert "xception: resuming after epoch 3" in caplog.text
    assert set(Path(marker + ".pending").read_text().split()) <= {"0", "1", "2"}
    history = (outcome.folder / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == [1, 2, 3, 4, 5]
    base = keras.applications.Xception(include_top=False, weights=None, input_shape=(80, 80, 3))
    base.load_weights(made["new"])
    model = keras.saving.load_model((outcome.folder / "model.keras").path, compile=False)
    frozen = [layer for layer in model.layers if layer.weights and not layer.trainable]
    given = [layer for layer in base.layers if layer.weights]
    assert len(frozen) == len(given) - 4
    for mine, handed_layer in zip(frozen, given, strict=False):
        assert all(np.array_equal(a, b) for a, b in zip(mine.get_weights(), handed_layer.get_weights(), strict=True))
    staged = Path(os.environ["XDG_CACHE_HOME"]) / "kuzushiji" / "staged"
    assert [path for path in staged.iterdir() if path.is_dir()] == []  # nothing of the lost worker either

"""train: after kills, hangs and lost nodes, the weights are bit for bit those of an undisturbed run."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GIVEN, KUZUSHIJI, KUZUSHIJI_WITH_SMALL_HEAD, WorkersDo

from cluster.errors import DamageError, OptionError
from cluster.manifest import read_manifest
from cluster.places import place
from job.config import TrainConfig
from job.train.driver import train
from job.train.run import Run
from preprocessing.dataset import DatasetManifest

pytestmark = pytest.mark.usefixtures("ray_here")

MEASURED = {"seconds", "crops_per_s", "data_wait"}


def result(folder: Path) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """Return what must be the same: the weights, the history and the metrics, without measured times."""
    with zipfile.ZipFile(folder / "model.keras") as model:
        weights = model.read("model.weights.h5")
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    numbers = json.loads((folder / "metrics.json").read_text())
    numbers.pop("seconds")
    return weights, [{key: row[key] for key in row.keys() - MEASURED} for row in history], numbers


def lost_at(stopped_after: dict[int, str], marker: Path) -> Callable[[dict[str, Any]], None]:
    """Return a change of the workers (see `small_head.work_after`) that kills worker 1 or makes it hang.

    stopped_after: after how many steps, once for each: `killed` or `silent`. marker: when worker 0 has resumed, it
    writes to `<marker>-left` whether an unknown checkpoint is left, and how many of Ray Train's are left.
    """
    name = str(marker)

    def change(given: dict[str, Any]) -> None:
        import os
        import signal
        import time
        from pathlib import Path

        from job.train import training as module

        rows_of, resume = module.Training.rows_of, module.Training.resume

        def disturbed(training: Any, *arguments: Any) -> Any:
            done = int(training.optimizer.iterations.numpy())
            happened = Path(f"{name}-{done}")
            if training.rank == 1 and done in stopped_after and not happened.exists():
                happened.touch()
                if stopped_after[done] == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(1e6)
            return rows_of(training, *arguments)

        def seen(training: Any, checkpoints: Any) -> None:
            unknown = checkpoints / "checkpoint_of_a_lost_worker"
            if training.rank == 0:
                (unknown / "part").mkdir(parents=True, exist_ok=True)
            resume(training, checkpoints)
            if training.rank == 0:
                left = [path.name for path in checkpoints.iterdir() if path.name.startswith("checkpoint_2")]
                Path(f"{name}-left").write_text(f"{unknown.exists()} {len(left)}")

        module.Training.rows_of, module.Training.resume = disturbed, seen

    return change


def last_checkpoint(checkpoints: Path) -> tuple[int, int] | None:
    """Return the epoch and the step of the last checkpoint in Ray Train's list, or None while there is none."""
    listed = checkpoints / "checkpoint_manager_snapshot.json"
    try:
        *_, last = json.loads(listed.read_text())["checkpoint_results"]
    except (OSError, ValueError):  # not written yet, being written, or empty
        return None
    return last["metrics"]["epoch"], last["metrics"]["step"]


def kill_the_driver_after_step_3(
    dataset: Path, models: Path, ray_address: str, batch: int = 7, partitions: int = 1
) -> None:
    """Kill a command after the checkpoint of step 3 of the first epoch."""
    places = ["--dataset", dataset, "--models", models, "--run", "disturbed"]
    command = [*KUZUSHIJI_WITH_SMALL_HEAD, "train", *map(str, places), "--partitions", str(partitions)]
    command += ["--architecture", "baseline", "--epochs", "3", "--global-batch-size", str(batch)]
    command += ["--learning-rate", "1e-4"]
    command += ["--augment", "standard", "--schedule", "cosine", "--weight-decay", "0.01"]
    command += ["--workers", "2", "--cpus-per-worker", "1", "--checkpoint-every", "1"]
    checkpoints = models / ".runs" / "baseline-disturbed"
    there = os.environ | {"RAY_ADDRESS": ray_address, "HANG_AFTER_STEP": "3"}
    with subprocess.Popen(command, cwd=models, env=there, stderr=subprocess.PIPE, text=True) as driver:
        while driver.poll() is None and last_checkpoint(checkpoints) != (0, 3):
            time.sleep(0.05)
        driver.kill()
        assert driver.wait() < 0, driver.stderr and driver.stderr.read()


def test_a_killed_driver_and_a_killed_worker_change_no_bit_and_leave_no_checkpoint_behind(
    trained: Path, few: Path, ray_address: str, tmp_path: Path, workers_do: WorkersDo, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are killed within an epoch; worker 1 after step 7, when the run has resumed."""
    kill_the_driver_after_step_3(few, tmp_path, ray_address)
    workers_do(lost_at({7: "killed"}, tmp_path / "happened"))
    caplog.set_level("INFO", "kuzushiji")
    # More than one failure is allowed: another process may take the port that a worker has found free.
    given = TrainConfig.model_validate(GIVEN | {"checkpoint_every": 2, "max_failures": 3})
    with pytest.raises(OptionError, match="seed .was 42, now 1."):
        train(place(few), place(tmp_path), [given.model_copy(update={"seed": 1})], "disturbed")
    folder = train(place(few), place(tmp_path), [given], "disturbed")[0].folder
    first, second = re.findall("resuming after epoch ([0-2])(?: and ([1-4]) steps of the next)?", caplog.text)
    assert first == ("0", "3")
    assert second[0] == "1"  # and 1 step of the next, if that checkpoint was uploaded
    assert (tmp_path / "happened-7").exists()
    assert (tmp_path / "happened-left").read_text() == "False 2"
    assert result(Path(folder.path)) == result(trained)
    curves = sorted((tmp_path / "tensorboard" / "baseline" / "disturbed").iterdir())
    assert [path.suffix for path in curves] == [".00001", ".00002", ".00003"]


@pytest.mark.long
def test_a_hanging_worker_does_not_change_the_result(
    trained: Path, few: Path, tmp_path: Path, workers_do: WorkersDo, caplog: pytest.LogCaptureFixture
) -> None:
    workers_do(lost_at({13: "silent"}, tmp_path / "happened"))
    caplog.set_level("INFO", "kuzushiji")
    given = TrainConfig.model_validate(GIVEN | {"checkpoint_every": 2, "step_limit": 15})
    folder = train(place(few), place(tmp_path), [given], "disturbed")[0].folder
    assert "a step must end within 15 s" in caplog.text
    assert "resuming after epoch 2 and 2 steps of the next" in caplog.text
    assert (tmp_path / "happened-left").read_text() == "False 2"
    assert result(Path(folder.path)) == result(trained)


@pytest.mark.long
def test_a_run_whose_driver_was_killed_resumes_within_the_epoch_with_another_number_of_workers(
    trained: Path, few: Path, ray_address: str, tmp_path: Path, workers_do: WorkersDo, caplog: pytest.LogCaptureFixture
) -> None:
    kill_the_driver_after_step_3(few, tmp_path, ray_address)
    workers_do()
    caplog.set_level("INFO", "kuzushiji")
    given = TrainConfig.model_validate(GIVEN | {"workers": 1})
    folder = train(place(few), place(tmp_path), [given], "disturbed")[0].folder
    assert "resuming after epoch 0 and 3 steps of the next" in caplog.text
    losses = [row["loss"] for row in result(Path(folder.path))[1]]
    # A wide tolerance, for batches of 7 crops with dropout.
    assert losses == pytest.approx([row["loss"] for row in result(trained)[1]], abs=2e-2)


@pytest.mark.long
def test_a_run_of_partitions_resumes_with_another_number_of_workers(
    dataset: Path, ray_address: str, tmp_path: Path, workers_do: WorkersDo, caplog: pytest.LogCaptureFixture
) -> None:
    kill_the_driver_after_step_3(dataset, tmp_path, ray_address, batch=128, partitions=4)
    workers_do()
    given = TrainConfig.model_validate(GIVEN | {"global_batch_size": 128, "partitions": 4})
    whole = train(place(dataset), place(tmp_path), [given], "undisturbed")[0].folder
    caplog.set_level("INFO", "kuzushiji")
    alone = given.model_copy(update={"workers": 1})
    folder = train(place(dataset), place(tmp_path), [alone], "disturbed")[0].folder
    assert "resuming after epoch 0 and 3 steps of the next" in caplog.text
    losses, expected = ([row["loss"] for row in result(Path(of.path))[1]] for of in (folder, whole))
    assert losses == pytest.approx(expected, abs=2e-2)


def test_a_run_of_an_earlier_release_is_resumed_with_what_later_options_are_by_default(tmp_path: Path) -> None:
    config = TrainConfig(architecture="baseline", epochs=3, global_batch_size=7, learning_rate=1e-4)
    run = Run("old", config, place(tmp_path), "0" * 64, place(tmp_path))
    later = {"schedule", "augment", "weight_decay", "label_smoothing", "partitions", "sampling"}
    earlier = {name: value for name, value in run._options().items() if name not in later} | {"class_weights": "none"}
    (tmp_path / ".runs").mkdir()
    (tmp_path / ".runs" / "baseline-old.json").write_text(json.dumps(earlier))
    assert not run.is_finished()
    with pytest.raises(OptionError, match=r"augment \(was none, now standard\)"):
        replace(run, config=config.model_copy(update={"augment": "standard"})).is_finished()
    (tmp_path / ".runs" / "baseline-old.json").write_text(json.dumps(earlier | {"class_weights": "balanced"}))
    with pytest.raises(
        OptionError, match="removed since it began. Received: class_weights balanced. Use another --run than old"
    ):
        run.is_finished()


def test_an_incomplete_checkpoint_list_restarts_the_run_but_an_unknown_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr("job.train.run.time.sleep", lambda _: None)
    run = Run("torn", TrainConfig.model_validate(GIVEN), place(tmp_path), "0" * 64, place(tmp_path))
    checkpoints = tmp_path / ".runs" / "baseline-torn"
    (checkpoints / "checkpoint_1").mkdir(parents=True)
    snapshot = checkpoints / "checkpoint_manager_snapshot.json"
    whole = {"ray_version": ray.__version__, "checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}
    snapshot.write_text(json.dumps(whole))
    run._drop_torn_list()
    assert snapshot.exists()
    for other in (whole | {"ray_version": "9.0.0"}, {"ray_version": ray.__version__, "results": []}, [1]):
        snapshot.write_text(json.dumps(other))
        with pytest.raises(DamageError, match=f"must be a list of checkpoints of Ray {ray.__version__}"):
            run._drop_torn_list()
        assert (checkpoints / "checkpoint_1").exists()
    missing = whole | {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2"}]}
    for torn in ('{"checkpoint_results": [', json.dumps(missing)):
        checkpoints.mkdir(exist_ok=True)
        snapshot.write_text(torn)
        run._drop_torn_list()
        assert not checkpoints.exists()


def test_a_checkpoint_that_a_power_failure_cut_off_ends_the_run_in_one_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train

    from job.train.checkpoint import State, restore_checkpoint, write_checkpoint

    folder = tmp_path / "baseline-first" / "checkpoint_1"
    folder.mkdir(parents=True)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: ray.train.Checkpoint.from_directory(folder))
    for name in ("state.json", "arrays.npz"):
        write_checkpoint(folder, State(), [], [])
        assert restore_checkpoint([], place(folder.parent))
        for content in (b"", bytes(100), (folder / name).read_bytes()[:-9]):
            (folder / name).write_bytes(content)
            with pytest.raises(DamageError, match=f"must be readable. Received: {folder}.* Remove {folder.parent}:"):
                restore_checkpoint([], place(folder.parent))


def test_the_new_name_of_a_run_is_logged_before_it_begins(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("it began")

    monkeypatch.setattr("job.train.driver._train_all", fails)
    caplog.set_level("INFO", "kuzushiji")
    for name in ("first", None):
        with pytest.raises(RuntimeError, match="it began"):
            train(place(few), place(tmp_path), [TrainConfig.model_validate(GIVEN)], name)
    (line,) = [message for message in caplog.messages if message.startswith("run ")]
    assert re.fullmatch(r"run (\d{8}-\d{6}-\d{6}): to resume it if it ends early, .* with --run \1", line)


def test_a_worker_that_is_lost_after_the_model_was_finished_does_not_fail_the_run(
    trained: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    config = TrainConfig.model_validate(GIVEN)
    run = Run("first", config, place(few), read_manifest(place(few), DatasetManifest).sha256, place(models))

    def loses_a_worker(_: Any) -> None:
        shutil.copytree(trained, models / "baseline" / "first")
        raise RuntimeError("a host vanished")

    monkeypatch.setattr("ray.train.v2.api.data_parallel_trainer.DataParallelTrainer.fit", loses_a_worker)
    run.fit(None, None)
    assert run.is_finished()
    assert not list((models / ".runs").iterdir())
    shutil.rmtree(models / "baseline" / "first")
    monkeypatch.setattr(shutil, "copytree", lambda *_: None)
    with pytest.raises(RuntimeError, match="a host vanished"):
        run.fit(None, None)


def test_the_first_worker_whose_node_stays_saves_the_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.train
    from ray.train.v2.api.preemption import PreemptionInfo

    from job.train import watchdog

    monkeypatch.setattr(watchdog, "SECONDS_BETWEEN_CHECKS", 0)
    monkeypatch.setattr(watchdog, "broadcast_from_rank_zero", lambda value: value)
    context = type("Context", (), {"get_world_size": lambda self: 3})
    monkeypatch.setattr(ray.train, "get_context", context)
    preemption, found = watchdog.Preemption(), []
    for drained in ({}, {"a": [0]}, {"a": [0]}, {"a": [0], "b": [1]}, {"a": [0], "b": [1], "c": [2]}):
        info = PreemptionInfo(None, drained) if drained else None
        monkeypatch.setattr(ray.train, "get_preemption_info", lambda info=info: info)
        found.append((preemption.is_new(), preemption.saver))
    assert found == [(False, 0), (True, 1), (False, 1), (True, 2), (True, 0)]


def test_a_repeated_worker_failure_is_logged_once() -> None:
    import ray

    from job.train.board import Board
    from job.train.callbacks import LogFailures

    board: Any = ray.remote(num_cpus=0)(Board).remote()
    tell = LogFailures(board, "baseline")
    for failed in (
        {1: OSError("gone")},
        {1: OSError("gone")},
        {0: OSError("gone too"), 1: OSError("gone")},
        {0: RuntimeError("Collective ops is aborted"), 1: OSError("alone")},
    ):
        tell.after_exception(None, failed)
    parts = [event.text.rpartition(": ") for event in ray.get(board.take.remote())]
    assert [(before.split(" failed")[0], cause) for before, _, cause in parts] == [
        ("worker 1", "gone"), ("worker 0", "gone too"), ("worker 1", "alone"),
    ]  # fmt: skip
    ray.kill(board)


WATCHED = """
import time
from job.train.watchdog import StepLimit
stopped, ended = StepLimit(1, print), StepLimit(1, print)
stopped.begin()
stopped.stop()
ended.begin()
ended.end()
time.sleep(2.5)
print("alive")
ended.begin()
time.sleep(60)
"""


def test_a_step_over_the_limit_exits_the_process_unless_the_step_has_ended_or_the_limit_is_stopped() -> None:
    alone = os.environ | {"RAY_ENABLE_AUTO_CONNECT": "0"}  # otherwise `ray.get` starts a Ray
    silent = subprocess.run([sys.executable, "-uc", WATCHED], env=alone, capture_output=True, text=True, check=False)
    assert silent.returncode == 1
    assert silent.stdout.startswith("alive\na step must end within 1 s. Received: a longer one")


DRAINED = """
import os, subprocess, sys, threading, time
from ray.cluster_utils import Cluster

dataset, models, rank = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for _ in range(3):
    cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
try:
    import ray
    import job.train.run
    from small_head import work_after
    from cluster.progress import log_to_stderr
    from cluster.places import place
    from job.config import TrainConfig
    from job.train.driver import train

    def change(given):
        import time
        from pathlib import Path
        from ray.train.v2._internal.execution.storage import StorageContext
        from job.train import watchdog as interruption
        from job.train import training as module

        interruption.SECONDS_BETWEEN_CHECKS = 0
        rows_of, upload = module.Training.rows_of, StorageContext.persist_current_checkpoint
        draining, gone = (Path(given["job"].folder).with_name(name) for name in ("draining", "gone"))

        def in_time(training, *arguments):
            if int(training.optimizer.iterations.numpy()) == 7:  # until Ray knows
                while not draining.exists():
                    time.sleep(0.1)
                time.sleep(4)
            return rows_of(training, *arguments)

        def slowly(*arguments, **options):  # until the node is gone
            while draining.exists() and not gone.exists():
                time.sleep(0.1)
            time.sleep(2)
            return upload(*arguments, **options)

        module.Training.rows_of, StorageContext.persist_current_checkpoint = in_time, slowly

    def drain():
        while not any((models / ".runs").glob("*/checkpoint_manager_snapshot.json")):  # the first epoch's
            time.sleep(0.2)
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        (group,) = (one for one in ray.util.placement_group_table().values() if one["state"] == "CREATED")
        drained = group["bundles_to_node_id"][int(rank)]
        node = ["--address", cluster.address, "--node-id", drained]
        subprocess.run(["ray", "drain-node", *node, "--deadline-remaining-seconds", "15", *reason], check=True)
        (models / "baseline").mkdir()
        (models / "baseline" / "draining").touch()
        time.sleep(15)
        (node,) = (one for one in cluster.worker_nodes if one.node_id == drained)
        cluster.remove_node(node, allow_graceful=False)
        (models / "baseline" / "gone").touch()

    job.train.run._work = work_after(change)
    log_to_stderr(False)
    models = place(models)
    threading.Thread(target=drain, daemon=True).start()
    given = TrainConfig.model_validate(GIVEN)
    train(place(dataset), models, [given], "drained")
finally:
    cluster.shutdown()
"""


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_drained_node_saves_a_checkpoint_and_the_result_is_unchanged(
    rank: int, trained: Path, few: Path, tmp_path: Path
) -> None:
    environment = os.environ | {
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2",  # Ray's default, not that of `conftest.py`
    }
    environment["PATH"] = f"{KUZUSHIJI.parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    script = DRAINED.replace("GIVEN", repr(GIVEN | {"max_failures": 0}))
    done = subprocess.run(
        [sys.executable, "-c", script, str(few), str(tmp_path), str(rank)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch 1 and 3 steps of the next" in done.stderr
    assert result(tmp_path / "baseline" / "drained") == result(trained)

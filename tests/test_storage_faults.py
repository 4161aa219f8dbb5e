"""Full or read-only disks, vanished folders, manifests of other files: one line, and no incomplete file is used."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import keras
import pytest
from conftest import KUZUSHIJI, Kuzushiji, WorkersDo, mount_small_disk

from cluster.errors import DamageError, InputError, KuzushijiError, OptionError
from cluster.manifest import MANIFEST_FILE, read_manifest, seal
from cluster.models import resolve_model
from cluster.places import place
from cluster.pull import pull
from cluster.storage import list_files, write_bytes
from job.config import TrainConfig
from job.data.partitions import Partitions
from job.data.staging import staged, staged_shards
from job.evaluate import evaluate
from job.model.folder import load_model, write_model
from job.train.driver import train
from job.verify import verify
from preprocessing.config import PrepareConfig
from preprocessing.dataset import DatasetManifest
from preprocessing.group_files import write_groups
from preprocessing.plan import make_plan
from preprocessing.prepare import prepare
from preprocessing.shards import CutGroup

pytestmark = pytest.mark.usefixtures("ray_here")


@dataclass(frozen=True)
class Disk:
    """A small disk, mounted for one test."""

    folder: Path

    def become(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount_small_disk(folder, "64m")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a failed test may keep a file open


@pytest.fixture(scope="session")
def models(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two runs of a tiny model that has the classes of `few`."""
    folder = tmp_path_factory.mktemp("models")
    for run in ("first", "second"):
        write_tiny(folder / "tiny" / run, few)
    return folder


def write_tiny(folder: Path, dataset: Path) -> None:
    labels = (dataset / "label.labels.txt").read_text()
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((80, 80, 1)),
            layers.AveragePooling2D(8),
            layers.Flatten(),
            layers.Dense(len(labels.split()), "softmax"),
        ]
    )
    write_model(place(folder), model, {"labels.txt": labels, "config.json": "{}"}, "0" * 64)


@pytest.fixture
def commands(pages: Path, few: Path, models: Path) -> dict[str, list[object]]:
    """Return the commands that write, each without its last argument, the folder to write to."""
    source = ["--pages", pages / "train_images", "--labels", pages / "train.csv"]
    return {
        "prepare": ["prepare", *source, "--coverage", "0.5", "--dataset"],
        "pull": ["pull", "--models", models, "tiny", "--to"],
        "evaluate": ["evaluate", "--model", models / "tiny", "--dataset", few, "--out"],
        "sample": ["sample", "--num-pages", "4", "--scale", "0.1", "--out"],
        "train": ["train", "--dataset", few, "--architecture", "baseline", "--epochs", "1", "--models"],
    }


def final_files(folder: Path) -> dict[str, bytes]:
    """Return the content of the files under final names: neither hidden, nor in a hidden folder."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(name): (folder / name).read_bytes() for name in found if not any(p.startswith(".") for p in name.parts)}


RULE = "a folder must exist, be writable and have free space while files are written to it"
SMALL = {"prepare": "2m", "pull": "16k", "evaluate": "8k", "sample": "48k"}


def wait_for_tasks() -> None:
    """Wait until no task runs in the tests' Ray, which does not end with the command that failed."""
    import ray

    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        time.sleep(0.05)


@pytest.mark.parametrize("command", SMALL)
def test_a_full_disk_is_one_line_and_with_room_the_same_command_gives_the_same_bytes(
    command: str, commands: dict[str, list[object]], kuzushiji: Kuzushiji, dataset: Path, disk: Disk, tmp_path: Path
) -> None:
    out = disk.folder / "out"
    disk.become(f"size={SMALL[command]}")
    done = kuzushiji(*commands[command], out)
    (line,) = done.lines
    assert done.code == 1
    assert line.startswith(f"kuzushiji: {RULE}. Received: {out}")
    assert "No space left on device" in line
    wait_for_tasks()
    assert not list(disk.folder.rglob(".tmp-*"))
    if command != "prepare":
        assert kuzushiji(*commands[command], tmp_path / "elsewhere").code == 0
    whole = final_files(dataset if command == "prepare" else tmp_path / "elsewhere")
    left = final_files(out)
    assert left == {name: whole[name] for name in left}
    assert len(left) < len(whole)
    assert MANIFEST_FILE not in {Path(name).name for name in left}
    disk.become("size=64m")
    assert kuzushiji(*commands[command], out).code == 0
    assert final_files(out) == whole
    assert not list(disk.folder.rglob(".*"))


@pytest.mark.long
def test_a_training_on_a_full_disk_is_one_line_and_with_room_the_same_command_ends_it(
    commands: dict[str, list[object]], kuzushiji: Kuzushiji, disk: Disk, workers_do: WorkersDo
) -> None:
    workers_do()
    out = disk.folder / "out"
    disk.become("size=128k")
    done = kuzushiji(*commands["train"], out, "--run", "full", "--max-failures", "1")
    assert (done.code, len(done.lines)) == (1, 1)
    assert done.lines[0].startswith(f"kuzushiji: {RULE}. Received: {out}")
    assert "No space left on device" in done.lines[0]
    assert not (out / "baseline").exists()
    disk.become("size=64m")
    assert kuzushiji(*commands["train"], out, "--run", "full").code == 0
    assert verify(place(out / "baseline" / "full"))[1:] == ([], [])


def test_an_evaluation_without_room_for_temporary_files_is_one_line_that_names_their_folder(
    models: Path, few: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.become("size=8k")
    monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
    with pytest.raises(KuzushijiError, match=f"{RULE}. Received: {disk.folder}.*No space left on device"):
        evaluate(place(models / "tiny"), place(few), "test")


@pytest.mark.parametrize("command", [*SMALL, "train"])
def test_a_read_only_disk_is_one_line(
    command: str, commands: dict[str, list[object]], kuzushiji: Kuzushiji, disk: Disk
) -> None:
    disk.become("ro")
    done = kuzushiji(*commands[command], disk.folder / "out")
    assert (done.code, len(done.lines)) == (1, 1)
    assert done.lines[0].startswith(f"kuzushiji: {RULE}. Received: {disk.folder}")
    assert "Read-only file system" in done.lines[0]
    assert list(disk.folder.iterdir()) == []


def test_evaluate_checks_its_out_folder_before_the_work(models: Path, few: Path, disk: Disk) -> None:
    disk.become("ro")
    nowhere = place(disk.folder / "no model")
    with pytest.raises(KuzushijiError, match=f"{RULE}. Received: {disk.folder}"):
        evaluate(nowhere, place(few), "test", place(disk.folder / "out"))
    with pytest.raises(OptionError, match="--out must not be a finished"):
        evaluate(nowhere, place(few), "test", place(models / "tiny" / "first"))


@pytest.mark.parametrize("command", ["prepare", "pull", "evaluate", "train"])
def test_a_file_where_a_folder_was_is_one_line_and_stays(
    command: str, commands: dict[str, list[object]], kuzushiji: Kuzushiji, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    done = kuzushiji(*commands[command], out)
    assert (done.code, len(done.lines)) == (1, 1)
    assert f"{RULE}. Received: {out}" in done.lines[0]
    assert out.read_text() == "mine"


def test_a_separate_process_on_a_full_disk_prints_one_line(
    commands: dict[str, list[object]], kuzushiji: Kuzushiji, disk: Disk, dataset: Path, ray_address: str
) -> None:
    """In its own process, where Ray's workers and logs could print more lines."""
    disk.become("size=2m")
    command = [str(word) for word in [KUZUSHIJI, *commands["prepare"], disk.folder / "out"]]
    there = os.environ | {"RAY_ADDRESS": ray_address}
    done = subprocess.run(command, env=there, capture_output=True, text=True, check=False)
    wait_for_tasks()
    (line,) = [line for line in done.stderr.splitlines() if line[2:3] != ":"]
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith(f"kuzushiji: {RULE}. Received: {disk.folder}/out")
    assert "No space left on device" in line
    disk.become("size=64m")
    assert kuzushiji(*commands["prepare"], disk.folder / "out").code == 0
    assert final_files(disk.folder / "out") == final_files(dataset)


@pytest.mark.parametrize("options", ["size=12k", "ro"])
def test_a_model_folder_on_a_full_or_read_only_disk_is_not_sealed(options: str, disk: Disk, few: Path) -> None:
    folder = disk.folder / "tiny" / "one"
    disk.become(options)
    with pytest.raises(KuzushijiError, match=f"{RULE}. Received: {folder}: (No space left|Read-only)"):
        write_tiny(folder, few)
    assert final_files(disk.folder) == {}
    assert not list(disk.folder.rglob(".tmp-*"))
    disk.become("size=64m,rw")
    write_tiny(folder, few)
    assert verify(place(folder))[1:] == ([], [])
    assert resolve_model(place(folder.parent)) == place(folder)


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("mine")


def test_a_dataset_folder_that_becomes_a_file_in_the_middle_is_one_line(pages: Path, tmp_path: Path) -> None:
    plan = make_plan(place(pages / "train_images"), place(pages / "train.csv"), PrepareConfig(coverage=0.5))
    write_bytes(place(tmp_path / "out" / ".prepare" / "plan.json"), b"{}")
    cut = CutGroup(str(pages / "train_images"), str(tmp_path / "out"))
    write_groups(plan.groups, place(tmp_path / "out" / ".prepare"), cut.attempt)
    cut(0)
    become_a_file(tmp_path / "out")
    with pytest.raises(KuzushijiError, match=f"Received: {tmp_path}/out"):
        cut(1)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: `change_bytes`, which seals a folder and sets its latest run, waits for it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def waits_for(inode: int) -> bool:
    """Return whether a process or thread waits for the lock of a file."""
    locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return any(lock[1] == "->" and lock[6].endswith(f":{inode}") for lock in locks)


def be_made_anew(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("change", [shutil.rmtree, become_a_file, be_made_anew], ids=["removed", "a file", "anew"])
def test_a_folder_that_goes_just_before_it_is_sealed_is_not_sealed(
    change: Callable[[Path], object], few: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(few, copy)
    manifest = read_manifest(place(copy), DatasetManifest)
    (copy / MANIFEST_FILE).unlink()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            seal(place(copy), manifest)
        except KuzushijiError as error:
            failures.append(error)

    with held(copy):
        sealing = threading.Thread(target=work)
        sealing.start()
        while sealing.is_alive() and not waits_for(copy.stat().st_ino):
            time.sleep(0.01)
        change(copy)
    sealing.join()
    assert str(failures[0]).startswith(f"{RULE}. Received: {copy}: ")
    assert not (copy / MANIFEST_FILE).exists()


def test_a_dataset_folder_that_goes_while_prepare_runs_ends_in_one_line_or_after_it(
    pages: Path, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = place(pages / "train_images"), place(pages / "train.csv")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(prepare, *source, place(out), PrepareConfig(coverage=0.5))
        while not list(out.glob(".prepare/group-*.json")) and not running.done():
            time.sleep(0.01)
        while out.exists():
            shutil.rmtree(out, ignore_errors=True)
            if running.done():
                break
        failure = running.exception()
    assert failure is None or isinstance(failure, KuzushijiError)
    assert "\n" not in str(failure)
    assert not (out / MANIFEST_FILE).exists()
    shutil.rmtree(out, ignore_errors=True)
    prepare(*source, place(out), PrepareConfig(coverage=0.5))
    assert final_files(out) == final_files(dataset)


def test_a_removed_folder_is_not_sealed(few: Path, tmp_path: Path) -> None:
    with pytest.raises(KuzushijiError, match=f"{RULE}. Received: {tmp_path / 'gone'}: No such file"):
        seal(place(tmp_path / "gone"), read_manifest(place(few), DatasetManifest))
    assert not (tmp_path / "gone").exists()


def test_a_dataset_folder_that_goes_after_its_pages_were_cut_is_not_sealed_without_them(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("preprocessing.prepare.dataset_card", lambda *_: shutil.rmtree(out) or "")
    with pytest.raises(KuzushijiError, match=f"{RULE}. Received: {out}"):
        prepare(place(pages / "train_images"), place(pages / "train.csv"), place(out), PrepareConfig(coverage=0.5))
    assert not out.exists()


@pytest.mark.parametrize("change", [shutil.rmtree, become_a_file], ids=["removed", "a file"])
def test_a_dataset_that_is_gone_when_it_is_staged_is_one_line(
    change: Callable[[Path], None], few: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(few, copy)
    read_manifest(place(copy), DatasetManifest)  # as the driver does
    change(copy)
    with pytest.raises(InputError, match=f"must hold manifest.json. Received: {copy}"), staged(place(copy), ["test"]):
        pass


def test_a_too_small_disk_is_refused_before_staging_but_fits_one_partition(
    dataset: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(place(dataset), DatasetManifest)
    whole, half = (Partitions.of(manifest, count, 64, seed=42, rank=0, workers=2) for count in (1, 2))
    disk.become(f"size={round(0.75 * 6.428e-3 * manifest.counts['train']['examples'])}m")
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk.folder))
    refused = pytest.raises(OptionError, match=f"must hold the crops that are .* free at {disk.folder}.*--partitions")
    with refused, staged_shards(place(dataset), manifest, {"train": whole.held_shards("train")}):
        pass
    assert [path.name for path in (disk.folder / "kuzushiji" / "staged").iterdir()] == ["lock"]
    with staged_shards(place(dataset), manifest, {"train": half.held_shards("train")}) as data:
        assert len(data.splits["train"]) == half.sizes("train")[0]


def test_a_cache_that_cannot_be_written_to_is_an_error_that_train_does_not_retry(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    says = pytest.raises(OptionError, match=f"{RULE}. Received: {tmp_path}/file/kuzushiji/staged: Not a directory")
    with says, staged(place(few), ["test"]):
        pass


def test_a_wait_for_another_process_that_stages_is_logged(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kuzushiji")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("job.data.staging.SECONDS_UNTIL_SAID", 0.1)
    root = tmp_path / "kuzushiji" / "staged"
    root.mkdir(parents=True)
    with open(root / "lock", "w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def stage() -> int:
            with staged(place(few), ["test"]) as data:
                return len(data.splits["test"])

        staging = pool.submit(stage)
        while "waiting for another process of this machine" not in caplog.text and not staging.done():
            time.sleep(0.01)
        assert not staging.done()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert staging.result()


KILLED_WHILE_IT_REMOVES = """
import os, signal, sys
from cluster.places import place
from job.data.staging import staged

remove = os.unlink

def remove_and_be_killed(name, **given):
    remove(name, **given)
    if name == "label.labels.txt":
        os.kill(os.getpid(), signal.SIGKILL)

with staged(place(sys.argv[1]), ["test"]):
    os.unlink = remove_and_be_killed
"""


def test_a_kill_during_removal_leaves_no_dataset_that_is_reused(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens to a worker that has failed: Ray ends its process a moment later."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_REMOVES, few], check=False)
    assert killed.returncode == -signal.SIGKILL
    with staged(place(few), ["test"]) as data:
        assert len(data.splits["test"])
    assert [path.name for path in (tmp_path / "kuzushiji" / "staged").iterdir()] == ["lock"]


def test_a_cache_that_is_removed_while_its_crops_are_used_is_no_error(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with staged(place(few), ["test"]) as data:
        shutil.rmtree(tmp_path / "cache")
        assert data.splits["test"].images.any()


def test_a_listing_is_complete_while_other_files_come_and_go(tmp_path: Path) -> None:
    """A file that another process removes between its listing and its `stat` must not hide the other files."""
    write_bytes(place(tmp_path / "stands"), b"1")
    ends = threading.Event()

    def come_and_go() -> None:
        while not ends.is_set():
            for name in range(20):
                (tmp_path / f"goes-{name}").touch()
            for name in range(20):
                (tmp_path / f"goes-{name}").unlink()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(come_and_go)
        try:
            assert all(list_files(place(tmp_path)).get("stands") == 1 for _ in range(1000))
        finally:
            ends.set()


# --- manifests of other files


@pytest.fixture(scope="session")
def of_other_seed(pages: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset like `few`, with another random seed: its shards have the same names."""
    source = few.parent / "pages"
    out = tmp_path_factory.mktemp("seed") / "crops"
    config = PrepareConfig(coverage=0.2, val_fraction=0.35, test_fraction=0.35, seed=1)
    prepare(place(source / "train_images"), place(source / "train.csv"), place(out), config)
    return out


def refused(copy: Path, tmp_path: Path) -> list[str]:
    """Return the errors of `train` for a folder, before Ray Train starts, and of `staged` for a copy at an address."""
    config = TrainConfig(architecture="baseline", epochs=1, global_batch_size=16, learning_rate=1e-4)
    with pytest.raises(DamageError) as by_train:
        train(place(copy), place(tmp_path / "models"), [config], "none")
    assert not (tmp_path / "models").exists()
    at_address = place(f"memory://{tmp_path.name}/copy")
    for path in copy.iterdir():
        write_bytes(at_address / path.name, path.read_bytes())
    with pytest.raises(DamageError) as by_staged, staged(at_address, ("train", "validation", "test")):
        pass
    assert "\n" not in str(by_train.value) + str(by_staged.value)
    return [str(by_train.value), str(by_staged.value)]


@pytest.mark.parametrize("stale", ["manifest", "shards"])
def test_a_manifest_of_another_preparation_names_every_shard(
    stale: str, few: Path, of_other_seed: Path, tmp_path: Path
) -> None:
    new, old = (few, of_other_seed) if stale == "manifest" else (of_other_seed, few)
    copy = tmp_path / "copy"
    shutil.copytree(new, copy)
    shutil.copy(old / MANIFEST_FILE, copy)
    by_train, by_staged = refused(copy, tmp_path)
    names = [path.name for path in copy.glob("*.tfrecord*")]
    assert len(names) == 3
    assert all(name in by_train for name in names)
    assert any(name in by_staged for name in names)


def test_a_shard_with_the_bytes_of_another_is_named(few: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(few, copy)
    one, other = copy.glob("*-test.tfrecord*"), copy.glob("*-validation.tfrecord*")
    shard = next(one)
    shutil.copy(next(other), shard)
    assert all(shard.name in said for said in refused(copy, tmp_path))


@pytest.mark.parametrize("listed", ["shards", "files"])
def test_a_shard_that_is_listed_twice_is_refused(listed: str, few: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(few, copy)
    content = json.loads((copy / MANIFEST_FILE).read_bytes())
    again = dict(content["shards"][0])
    if listed == "files":
        del again["examples"]
    content[listed].append(again)
    (copy / MANIFEST_FILE).write_text(json.dumps(content))
    assert all("must be listed once" in said for said in refused(copy, tmp_path))


@pytest.mark.parametrize("by", ["load", "pull"])
def test_the_manifest_of_another_run_is_refused_before_anything_is_loaded(
    by: str, models: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "models"
    shutil.copytree(models, copy)
    shutil.copy(copy / "tiny" / "first" / MANIFEST_FILE, copy / "tiny" / "second")
    second, to = place(copy / "tiny" / "second"), place(tmp_path / "to")
    load = partial(load_model, second) if by == "load" else partial(pull, place(copy), to, ["tiny/second"])
    with pytest.raises(DamageError, match=r"model.keras (was changed|has \d+ bytes)"):
        load()
    assert not list(tmp_path.glob("to/*/*/m*"))


POINTED = [["pull", "--to", "to", "--models"], ["verify"], ["evaluate", "--dataset", "x", "--model"]]


@pytest.mark.parametrize("command", POINTED, ids=lambda command: command[0])
def test_a_pointer_to_a_run_that_is_gone_names_it(
    command: list[str], kuzushiji: Kuzushiji, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, tmp_path / "models")
    shutil.rmtree(tmp_path / "models" / "tiny" / "second")
    done = kuzushiji(*command, "models" if command[0] == "pull" else "models/tiny")
    assert (done.code, len(done.lines)) == (1, 1)
    if command[0] == "pull":
        assert f"Received: {tmp_path}/models/tiny/second, which is missing, empty or a file" in done.lines[0]
    else:
        assert f"{tmp_path}/models/tiny/latest.json must name a finished run. Received: second," in done.lines[0]
    assert not (tmp_path / "to").exists()


def test_a_task_does_not_recreate_a_removed_dataset_folder(pages: Path, tmp_path: Path) -> None:
    """The new folder would have only a part of the dataset, and every later `prepare` would refuse it."""
    with pytest.raises(
        DamageError, match=f"--dataset must not be removed .* Received: {tmp_path}/out, without its plan"
    ):
        CutGroup(str(pages / "train_images"), str(tmp_path / "out"))(0)
    assert not (tmp_path / "out").exists()
    write_bytes(place(tmp_path / "out" / ".prepare" / "plan.json"), b"{}")
    with pytest.raises(
        DamageError, match="--dataset must not be removed .*, without the groups of pages of this attempt. Run"
    ):
        CutGroup(str(pages / "train_images"), str(tmp_path / "out"))(0)

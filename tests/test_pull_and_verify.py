"""pull and verify: files arrive as they were sealed or not at all, from an address as from a path."""

import json
import shutil
import subprocess
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import mount_small_disk
from upath import UPath

from cluster.errors import DamageError, InputError, KuzushijiError, OptionError
from cluster.manifest import MANIFEST_FILE, is_sealed, read_manifest, seal, write_listed
from cluster.models import ModelManifest, point_to_latest, read_latest, resolve_model
from cluster.places import place
from cluster.pull import pull
from cluster.storage import remove_folder, write_bytes
from job.verify import verify

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
FILES = {"model.keras": bytes(range(256)) * 9000, "labels.txt": b"U+306F\nrare\n", "config.json": b"{}"}


def write_run(models: UPath, name: str, run: str, finished_at: datetime = NOON) -> UPath:
    folder = models / name / run
    entries = [write_listed(folder / file, data) for file, data in FILES.items()]
    manifest = ModelManifest(files=entries, dataset_manifest_sha256="0" * 64, finished_at=finished_at)
    seal(folder, manifest)
    point_to_latest(folder, manifest)
    return folder


@pytest.fixture(params=["path", "address"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    """Return a place with models of two architectures, one of them with two runs."""
    root = place(tmp_path / "models") if request.param == "path" else place(f"memory://{tmp_path.name}/models")
    write_run(root, "baseline", "old", NOON - timedelta(hours=1))
    write_run(root, "baseline", "new")
    write_run(root, "other", "one")
    return root


def edit_manifest(folder: UPath, **changes: object) -> None:
    content = json.loads((folder / MANIFEST_FILE).read_bytes()) | changes
    write_bytes(folder / MANIFEST_FILE, json.dumps(content).encode())


def test_pull_fetches_and_verifies_the_latest_runs(models: UPath, tmp_path: Path) -> None:
    to = place(tmp_path / "to")
    pulled = pull(models, to)
    assert [(one.name, one.run) for one in pulled] == [("baseline", "new"), ("other", "one")]
    for one in pulled:
        assert verify(place(one.folder))[1:] == ([], [])
        assert {path.name for path in Path(one.folder).iterdir()} == {*FILES, MANIFEST_FILE}
    assert resolve_model(to / "baseline") == to / "baseline" / "new"


def test_pulling_an_older_run_does_not_change_the_latest(models: UPath, tmp_path: Path) -> None:
    to = place(tmp_path / "to")
    pull(models, to, ["baseline"])
    assert [one.run for one in pull(models, to, ["baseline/old"])] == ["old"]
    latest = read_latest(to / "baseline")
    assert latest is not None
    assert latest.run == "new"


def test_valid_files_are_not_downloaded_again(models: UPath, tmp_path: Path) -> None:
    to = place(tmp_path / "to")
    total = sum(len(data) for data in FILES.values())
    assert pull(models, to, ["other"])[0].new_bytes == total
    assert pull(models, to, ["other"])[0].new_bytes == 0
    (to / "other" / "one" / "config.json").write_bytes(b"[]")
    assert pull(models, to, ["other"])[0].new_bytes == 2


def test_an_interrupted_pull_resumes_where_it_stopped(models: UPath, tmp_path: Path) -> None:
    to = tmp_path / "to"
    folder = to / "other" / "one"
    folder.mkdir(parents=True)
    (folder / ".model.keras.part").write_bytes(FILES["model.keras"][:2_000_000])
    total = sum(len(data) for data in FILES.values())
    assert pull(models, place(to), ["other"])[0].new_bytes == total - 2_000_000
    assert (folder / "model.keras").read_bytes() == FILES["model.keras"]
    assert not list(folder.glob(".*"))


def test_a_wrong_partial_file_is_downloaded_again(models: UPath, tmp_path: Path) -> None:
    folder = tmp_path / "to" / "other" / "one"
    folder.mkdir(parents=True)
    (folder / ".model.keras.part").write_bytes(b"something else")
    pull(models, place(tmp_path / "to"), ["other"])
    assert (folder / "model.keras").read_bytes() == FILES["model.keras"]


def test_a_changed_file_is_named_and_not_written(models: UPath, tmp_path: Path) -> None:
    data = bytearray(FILES["model.keras"])
    data[1000] ^= 1
    write_bytes(models / "other" / "one" / "model.keras", bytes(data))
    with pytest.raises(DamageError, match=r"model.keras was changed"):
        pull(models, place(tmp_path / "to"), ["other"])
    folder = tmp_path / "to" / "other" / "one"
    assert not (folder / "model.keras").exists()
    assert not (folder / MANIFEST_FILE).exists()


def test_another_finished_model_of_the_same_name_is_not_replaced(models: UPath, tmp_path: Path) -> None:
    to = place(tmp_path / "to")
    own = write_run(to, "other", "one", NOON + timedelta(minutes=1))
    before = {path.name: path.read_bytes() for path in Path(own.path).iterdir()}
    with pytest.raises(OptionError, match="--to must not have another model of the same name. Received: .*other/one"):
        pull(models, to)
    assert not (tmp_path / "to" / "baseline").exists()  # nothing was begun
    assert {path.name: path.read_bytes() for path in Path(own.path).iterdir()} == before
    (tmp_path / "to" / "other" / "one" / "model.keras").write_bytes(b"damaged")
    pull(models, to, ["other"])
    assert verify(own)[1:] == ([], [])


def test_models_are_not_pulled_onto_themselves(tmp_path: Path) -> None:
    """`pull` would replace a damaged file by itself, and remove the only manifest."""
    models = place(tmp_path / "models")
    write_run(models, "baseline", "new")
    (tmp_path / "link").symlink_to(models.path)
    for to in (models, place(tmp_path / "link")):
        with pytest.raises(OptionError, match="--to must be another folder than --models"):
            pull(models, to)
    assert is_sealed(models / "baseline" / "new")


def test_a_missing_file_is_named(models: UPath, tmp_path: Path) -> None:
    (models / "other" / "one" / "labels.txt").unlink()
    with pytest.raises(DamageError, match=r"labels.txt is missing"):
        pull(models, place(tmp_path / "to"), ["other"])


def test_names_that_leave_the_folder_are_refused(models: UPath, tmp_path: Path) -> None:
    for name in ("../x", "..", "baseline/../../x", "/etc", "baseline/..", ""):
        with pytest.raises(OptionError):
            pull(models, place(tmp_path / "to"), [name])
    folder = models / "other" / "one"
    entry = json.loads((folder / MANIFEST_FILE).read_bytes())["files"][0]
    edit_manifest(folder, files=[entry | {"name": "../../evil"}])
    with pytest.raises(DamageError, match="a file name in a manifest"):
        pull(models, place(tmp_path / "to"), ["other"])
    write_bytes(models / "other" / "latest.json", b'{"run": "../one", "finished_at": "2026-01-01T00:00:00Z"}')
    with pytest.raises(DamageError, match=r"latest.json must name a run"):
        pull(models, place(tmp_path / "to"), ["other"])
    write_bytes(models / "other" / "latest.json", b'{"run": "one", "finished_at": "2026-01-01T00:00:00Z"}')
    write_bytes(models / "my model" / "latest.json", b'{"run": "one", "finished_at": "2026-01-01T00:00:00Z"}')
    with pytest.raises(DamageError, match="the name of a model must be letters.* Rename the folder"):
        pull(models, place(tmp_path / "to"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"format": 2, "kind": "model", "files": []}',
        b"[" * 100_000,
        b'{"kind": "model", "files": 3}',
    ],
)
def test_an_invalid_manifest_is_damage_in_one_line(content: bytes, models: UPath, tmp_path: Path) -> None:
    write_bytes(models / "other" / "one" / MANIFEST_FILE, content)
    with pytest.raises(DamageError) as caught:
        pull(models, place(tmp_path / "to"), ["other"])
    assert "\n" not in str(caught.value)


def test_a_missing_model_or_run_is_an_error_in_one_line(models: UPath, tmp_path: Path) -> None:
    for wanted in ("nothing", "baseline/nothing"):
        with pytest.raises(KuzushijiError) as caught:
            pull(models, place(tmp_path / "to"), [wanted])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="with none"):
        pull(place(tmp_path / "empty"), place(tmp_path / "to"))


def test_a_folder_of_architectures_is_refused_with_one_of_them(models: UPath) -> None:
    with pytest.raises(InputError, match=f"Received: {models}, with neither. Name {models}/baseline"):
        resolve_model(models)


def test_the_pointer_moves_only_to_a_later_run(models: UPath) -> None:
    folder = write_run(models, "other", "earlier", NOON - timedelta(days=1))
    latest = read_latest(folder.parent)
    assert latest is not None
    assert latest.run == "one"
    write_run(models, "other", "later", NOON + timedelta(days=1))
    assert resolve_model(models / "other") == models / "other" / "later"


def test_the_pointer_leaves_a_run_that_is_gone_or_that_a_wrong_clock_finished_in_the_future(models: UPath) -> None:
    remove_folder(models / "other" / "one")
    with pytest.raises(DamageError, match="must name a finished run. Received: one, which is gone"):
        resolve_model(models / "other")
    earlier = write_run(models, "other", "earlier", NOON - timedelta(days=1))
    assert resolve_model(models / "other") == earlier
    newest = write_run(models, "other", "newest", NOON)
    remove_folder(write_run(models, "other", "gone", NOON + timedelta(days=1)))
    point_to_latest(earlier, read_manifest(earlier, ModelManifest))  # as the command of a run that is finished
    assert resolve_model(models / "other") == newest
    write_run(models, "other", "tomorrow", datetime.now(UTC) + timedelta(days=1))
    today = write_run(models, "other", "today", datetime.now(UTC))
    assert resolve_model(models / "other") == today


def test_verify_names_what_is_wrong_and_what_is_not_listed(models: UPath) -> None:
    folder = models / "baseline" / "new"
    (folder / "labels.txt").unlink()
    write_bytes(folder / "config.json", b"[]")
    write_bytes(folder / "model.keras", b"short")
    write_bytes(folder / "notes.txt", b"mine")
    _, faults, strangers = verify(folder)
    assert faults == [
        "model.keras has 5 bytes instead of 2304000",
        "labels.txt is missing",
        "config.json was changed: its SHA-256 is not the manifest's",
    ]
    assert strangers == ["notes.txt"]


def test_a_disk_that_is_full_while_staging_is_an_error_that_leaves_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.data.staging import staged

    mount_small_disk(tmp_path, "1m")
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        # Another process fills the disk after its free space was checked.
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 40))
        full = pytest.raises(KuzushijiError, match=f"Received: {tmp_path}.*No space left")
        with full, staged(place(dataset), ["train"]):
            pass
        assert [path.name for path in (tmp_path / "kuzushiji" / "staged").iterdir()] == ["lock"]
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)  # the failure keeps mapped files open


def test_a_dataset_at_an_address_is_staged_as_from_a_path_and_gone_after_its_last_user(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.data.staging import staged

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    at_address = place(f"memory://{tmp_path.name}/dataset")
    for path in dataset.iterdir():
        write_bytes(at_address / path.name, path.read_bytes())
    here = tmp_path / "kuzushiji" / "staged"
    with staged(place(dataset), ["test"]) as one, staged(at_address, ["test"]) as two:
        assert len(list(here.iterdir())) == 3  # one folder each, and the lock
        a, b = one.splits["test"], two.splits["test"]
        assert isinstance(a.images, np.memmap)
        assert np.array_equal(a.images, b.images)
        assert np.array_equal(a.labels, b.labels)
        assert np.array_equal(a.boxes, b.boxes)
        assert list(a.page_ids()) == list(b.page_ids())
        with staged(place(dataset), ["test"]):
            assert len(list(here.iterdir())) == 3
    assert [path.name for path in here.iterdir()] == ["lock"]


def test_crops_that_were_staged_before_the_machine_started_again_are_not_used(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure, what had not reached the disk reads as zeros."""
    from job.data import staging

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = tmp_path / "kuzushiji" / "staged"
    with staging.staged(place(dataset), ["test"]) as data:
        right = np.array(data.splits["test"].images)
        shutil.copytree(data.folder, tmp_path / "left")
    left = shutil.copytree(tmp_path / "left", here / data.folder.name)
    np.lib.format.open_memmap(left / "test" / "images.npy", "r+")[:] = 0
    (tmp_path / "boot_id").write_text("another")
    monkeypatch.setattr(staging, "BOOT_ID", tmp_path / "boot_id")
    with staging.staged(place(dataset), ["test"]) as data:
        assert not left.exists()
        assert np.array_equal(data.splits["test"].images, right)


@pytest.mark.parametrize("fails", [False, True])
def test_a_user_of_a_staged_dataset_ends_while_another_process_stages_one_which_removes_what_it_left(
    fails: bool, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.data import staging

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(staging, "SECONDS_TO_REMOVE", 0.3)
    here, stage = tmp_path / "kuzushiji" / "staged", staging._stage
    first = ExitStack()

    def stage_while_the_first_ends(*arguments: Any) -> None:
        first.close()
        assert len(list(here.iterdir())) == 2  # its folder is still there, and the lock
        if fails:
            raise DamageError("the dataset is damaged")
        stage(*arguments)

    with ExitStack() as stack:
        first.enter_context(staging.staged(place(dataset), ["test"]))
        monkeypatch.setattr(staging, "_stage", stage_while_the_first_ends)
        if fails:
            stack.enter_context(pytest.raises(DamageError, match="the dataset is damaged"))
        stack.enter_context(staging.staged(place(dataset), ["train"]))
        assert len(list(here.iterdir())) == 2  # its own folder, and the lock
    assert [path.name for path in here.iterdir()] == ["lock"]


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "rename"])
def test_a_damaged_shard_is_named_before_anything_is_read_from_it(damage: str, dataset: Path, tmp_path: Path) -> None:
    from job.data.staging import staged

    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = sorted(copy.glob("*test.tfrecord*"))[1]
    data = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])
    elif damage == "cut":
        shard.write_bytes(data[:-1])
    elif damage == "delete":
        shard.unlink()
    else:
        shard.rename(shard.with_name(shard.name.replace("00001-of", "00009-of")))
    with pytest.raises(DamageError, match=shard.name), staged(place(copy), ["test"]):
        pass

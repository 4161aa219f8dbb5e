"""A bucket works like a folder: the same bytes, one winner of a race, and success or one line after each fault."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import fsspec
import keras
import numpy as np
import pytest
import requests
from conftest import Kuzushiji, forget, in_fresh_process
from fake_cloud.bucket import StrictBucket
from fsspec.implementations.memory import MemoryFileSystem
from google.api_core.exceptions import BadRequest, Forbidden, RetryError, ServiceUnavailable
from google.auth.exceptions import DefaultCredentialsError, RefreshError
from google.cloud.storage.exceptions import InvalidResponse
from PIL import Image
from upath import UPath

from cluster import bucket, google_client
from cluster.bucket import DELETED_AT_ONCE, RANGE_BYTES
from cluster.bucket_errors import explained
from cluster.errors import DamageError, InputError, KuzushijiError, OptionError, one_line
from cluster.lock import locked
from cluster.manifest import MANIFEST_FILE, is_sealed, read_manifest, seal, write_listed
from cluster.models import Latest, ModelManifest, point_to_latest, read_latest, resolve_model
from cluster.places import arrow_filesystem, is_inside, place, reachable_place
from cluster.pull import pull
from cluster.storage import (
    change_bytes,
    fetch,
    is_file,
    list_files,
    list_folders,
    list_tree,
    open_read,
    read_at_most,
    read_bytes,
    read_chunks,
    read_small,
    remove_file,
    remove_folder,
    sha256_of,
    size_of,
    write_bytes,
)
from job.config import TrainConfig
from job.data.staging import staged
from job.model.folder import load_model, write_model
from job.train.job import Failure
from job.train.run import Run
from job.verify import verify
from preprocessing.config import PrepareConfig
from preprocessing.group_files import write_groups, written_groups
from preprocessing.groups import group_pages
from preprocessing.labels.crops import read_crops
from preprocessing.labels.table import Labels
from preprocessing.pages import list_pages, page_reader
from preprocessing.prepare import prepare

# The first warning comes from aiohttp, which gcsfs uses. The second: google-cloud-storage leaves it to the garbage
# collector to close the connection of a refused download.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sending a large body directly:ResourceWarning", "ignore:unclosed <socket:ResourceWarning"
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
BIG = os.urandom(2 * RANGE_BYTES + 12_345)
FILES = {"model.keras": BIG, "labels.txt": b"U+306F\nrare\n"}


def write_run(models: UPath, run: str) -> UPath:
    folder = models / "baseline" / run
    entries = [write_listed(folder / name, data) for name, data in FILES.items()]
    manifest = ModelManifest(files=entries, dataset_manifest_sha256="0" * 64, finished_at=NOON)
    seal(folder, manifest)
    point_to_latest(folder, manifest)
    return folder


def test_written_files_can_be_read_in_whole_or_in_parts_and_listed(folder: UPath, tmp_path: Path) -> None:
    write_bytes(folder / "big", BIG)
    for name in range(25):  # more than a page of a listing
        write_bytes(folder / f"small-{name:02}", str(name).encode())
    assert read_bytes(folder / "big") == BIG
    assert b"".join(read_chunks(folder / "big", 5, len(BIG) - 7)) == BIG[5:-7]
    assert b"".join(read_chunks(folder / "big", 0, 1000)) == BIG[:1000]
    assert read_bytes(folder / "small-07") == b"7"
    fetch(folder / "big", tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == BIG
    there = list_files(folder)
    assert there.pop("big") == len(BIG)
    assert sorted(there) == [f"small-{name:02}" for name in range(25)]
    with pytest.raises(FileNotFoundError):
        read_bytes(folder / "nothing")
    remove_folder(folder)
    assert list_files(folder) == {}


@pytest.fixture(params=["path", "bucket", "memory"])
def anywhere(request: pytest.FixtureRequest, folder: UPath, tmp_path: Path) -> UPath:
    """Return a folder that does not exist yet, in each kind of storage."""
    of_kind = {"path": tmp_path / "new", "bucket": folder, "memory": f"memory://{tmp_path.name}/new"}
    return place(of_kind[request.param])


def test_a_path_is_inside_of_its_folder_and_bucket_and_not_of_a_folder_whose_name_it_begins_with(
    strict: StrictBucket, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    of_folders = [
        ("gs://demo/x", "gs://demo"), ("gcs://demo/x/y", "gs://demo/x"), ("/x", "/"), ("/x", "/x"),
        (f"{tmp_path}/link/x", f"{tmp_path}/real"), ("memory://x/y", "memory://x"),
    ]  # fmt: skip
    for path, folder in of_folders:
        assert is_inside(place(path), place(folder))
    for path, folder in (("gs://demo/xy", "gs://demo/x"), ("/xy", "/x"), ("/", "/x"), ("/demo/x", "gs://demo")):
        assert not is_inside(place(path), place(folder))


def test_a_small_file_is_read_up_to_its_limit_and_none_if_it_is_no_file(anywhere: UPath) -> None:
    assert read_small(anywhere / "x", 3) is None
    write_bytes(anywhere / "x", b"1234")
    assert (read_small(anywhere / "x", 4), read_small(anywhere / "x", 2)) == (b"1234", b"123")
    assert (read_small(anywhere, 4), read_small(anywhere / "x" / "y", 4)) == (None, None)


def test_an_object_that_was_uploaded_as_gzip_is_read_unpacked(folder: UPath) -> None:
    name = (folder / "books.csv").path.partition("/")[2]
    blob = google_client.client().bucket("demo").blob(name)
    blob.content_encoding = "gzip"
    blob.upload_from_string(gzip.compress(b"prefix,book\n"))
    assert read_small(folder / "books.csv", 100) == b"prefix,book\n"
    for read in (sha256_of, open_read):  # its parts and its size are not those of the file
        with pytest.raises(InputError, match="must be stored as it is. Received: Content-Encoding gzip. Upload"):
            read(folder / "books.csv")


def test_what_changes_in_a_bucket_is_not_cached_by_google(strict: StrictBucket, folder: UPath) -> None:
    """Of a bucket that all may read, an old `latest.json` or manifest would be served for an hour."""
    seal(folder, ModelManifest(files=[], dataset_manifest_sha256="0" * 64, finished_at=datetime.now(UTC)))
    blob = google_client.client().bucket("demo").get_blob((folder / MANIFEST_FILE).path.partition("/")[2])
    assert blob.cache_control == "no-store"


def test_a_file_is_written_sized_changed_and_removed_alike_in_each_kind_of_storage(anywhere: UPath) -> None:
    file = anywhere / "x"
    assert not is_file(file)
    assert (list_files(anywhere), list_folders(anywhere)) == ({}, [])
    with pytest.raises(FileNotFoundError):
        size_of(file)
    write_bytes(file, b"123")
    write_bytes(anywhere / "below" / "y", b"4")
    assert (is_file(file), size_of(file), read_bytes(file), read_at_most(file, 2)) == (True, 3, b"123", b"12")
    assert b"".join(read_chunks(file, 1, 9)) == b"23"
    assert (list_files(anywhere), list_folders(anywhere)) == ({"x": 3}, ["below"])
    change_bytes(file, lambda old: (old or b"") + b"4")
    change_bytes(file, lambda old: None)
    change_bytes(anywhere / "z", lambda old: b"new" if old is None else b"old")
    assert (read_bytes(file), read_bytes(anywhere / "z")) == (b"1234", b"new")
    remove_file(file)
    remove_file(file)
    assert list_files(anywhere) == {"z": 3}
    remove_folder(anywhere)
    remove_folder(anywhere)
    assert (list_files(anywhere), list_folders(anywhere)) == ({}, [])


def test_removing_many_files_takes_one_request_for_each_hundred(strict: StrictBucket, folder: UPath) -> None:
    names = [f"{number:03}" for number in range(DELETED_AT_ONCE + 20)]
    for name in names:
        write_bytes(folder / "many" / name, b"x")
    write_bytes(folder / "many-more", b"x")
    before = len(strict.requests)
    remove_folder(folder / "many")
    asked = [logged.path.partition("?")[0] for logged in strict.requests[before:] if "pageToken" not in logged.path]
    assert asked == ["/storage/v1/b/demo/o", *["/batch/storage/v1"] * 2, "/storage/v1/b/demo/o"]
    assert list_files(folder) == {"many-more": 1}


def test_what_another_process_removes_meanwhile_is_no_failure(strict: StrictBucket, folder: UPath) -> None:
    for number in range(4):
        write_bytes(folder / "many" / str(number), b"x")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remove_folder, [folder / "many"] * 4))
    assert list_files(folder / "many") == {}


@pytest.mark.parametrize("kind", ["429", "503", "401", "403"])
@pytest.mark.parametrize("which", ["0", "3", "[0-3]"], ids=["first", "last", "all"])
def test_a_deletion_that_a_batch_was_refused_is_done_or_told(
    strict: StrictBucket, folder: UPath, kind: str, which: str
) -> None:
    for number in range(4):
        write_bytes(folder / "many" / str(number), b"x")
    strict.faults.inject(kind, times=1, method="DELETE", matching=f"many/{which}")
    remove_folder(folder / "many")
    assert strict.faults.left() == 0
    assert list_files(folder / "many") == {}


def test_a_failed_attempt_removes_only_its_own_group_files(folder: UPath, tmp_path: Path) -> None:
    labels = Labels(["a"], np.array([0, 1]), np.zeros(1, np.int32), np.ones((1, 4), np.int32), "0" * 64)
    groups = group_pages(labels, {}, 1)
    for place_of_both in (folder, place(tmp_path)):
        write_groups(groups, place_of_both, ".tmp-other")
        with pytest.raises(KeyboardInterrupt), written_groups(groups, place_of_both, ".tmp-mine") as write:
            raise_after(write, place_of_both)
        assert list_files(place_of_both).keys() == {".tmp-other-groups-00000.parquet"}


def raise_after(write: Callable[[], None], folder: UPath) -> None:
    write()
    assert len(list_files(folder)) == 2
    raise KeyboardInterrupt


@pytest.mark.parametrize("groups", [40, pytest.param(200, marks=pytest.mark.long)])
def test_a_dataset_of_more_groups_takes_no_more_listings(
    strict: StrictBucket, folder: UPath, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted for a killed run, for the run that resumes it, and for a run that finds the dataset complete."""

    def listings() -> int:
        paths = [logged.path for logged in strict.requests]
        return len([path for path in paths if path.startswith("/storage/v1/b/demo/o?") and "pageToken" not in path])

    def here(tasks: int, work: Callable[[int], Any], *_: object, begin: Callable[[], None], **__: object) -> list[Any]:
        begin()
        return [work(number) for number in range(tasks)]

    def here_and_killed(*given: Any, **others: Any) -> None:
        here(*given, **others)
        raise KeyboardInterrupt

    counts = []
    for number in (10, groups):
        source, dataset = tmp_path / str(number), folder / str(number)
        (source / "pages").mkdir(parents=True)
        for page in range(number):
            Image.new("L", (40, 40), 200).save(source / "pages" / f"b_{page:04}.png")
        rows = "".join(f"b_{page:04},U+306F 1 2 20 30\n" for page in range(number))
        (source / "train.csv").write_text(f"image_id,labels\n{rows}")
        places = place(source / "pages"), place(source / "train.csv"), dataset
        make = partial(prepare, *places, PrepareConfig(shards=number, coverage=1))
        seen = [listings()]
        monkeypatch.setattr("preprocessing.prepare.map_tasks", here_and_killed)
        with pytest.raises(KeyboardInterrupt):
            make()
        monkeypatch.setattr("preprocessing.prepare.map_tasks", here)
        for _ in range(2):
            seen.append(listings())
            make()
        counts.append(np.diff([*seen, listings()]).tolist())
        assert not list_files(dataset / ".prepare")
        assert len([name for name in list_files(dataset) if "tfrecord" in name]) >= number
    assert counts[0] == counts[1]


class RemembersListings(MemoryFileSystem):
    """Caches listings in `dircache`, as s3fs and other file systems of fsspec do."""

    protocol = "remembers"

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True, **options)
        return self.dircache[path] if detail else [entry["name"] for entry in self.dircache[path]]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.pop(path, None)


@pytest.mark.filterwarnings("ignore:UPath 'remembers' filesystem not explicitly implemented")
def test_what_another_process_wrote_is_listed(tmp_path: Path) -> None:
    fsspec.register_implementation("remembers", RemembersListings, clobber=True)
    folder = place(f"remembers://{tmp_path.name}/x")
    write_bytes(folder / "a", b"1")
    assert list_files(folder) == {"a": 1}
    folder.fs.pipe_file((folder / "b").path, b"22")  # as by another process: the cached listing is not updated
    assert list(folder.fs.ls(folder.path, detail=False)) == [(folder / "a").path]
    assert list_files(folder) == {"a": 1, "b": 2}


def test_the_slash_at_the_end_of_an_address_does_not_matter(folder: UPath) -> None:
    assert str(place(f"{folder}/")) == str(place(f"{folder}"))


def test_a_bucket_is_used_without_gcsfs(folder: UPath, tmp_path: Path) -> None:
    """Only Ray Train needs gcsfs, which takes 1.5 s to import."""
    script = """
import sys
from cluster.places import arrow_filesystem, reachable_place
from cluster.storage import (
    change_bytes, is_file, list_files, list_folders, read_bytes, remove_file, remove_folder, size_of, write_bytes
)

folder = reachable_place(sys.argv[1])
write_bytes(folder / "x", b"1")
change_bytes(folder / "x", lambda old: old + b"2")
assert is_file(folder / "x") and size_of(folder / "x") == 2 and read_bytes(folder / "x") == b"12"
assert list_files(folder) == {"x": 2} and list_folders(folder) == []
remove_file(folder / "x")
remove_folder(folder)
print("gcsfs" in sys.modules)
"""
    assert in_fresh_process(script, str(folder), cwd=tmp_path) == "False\n"


def test_a_file_whose_name_reads_like_a_pattern_is_removed_alone(folder: UPath) -> None:
    write_bytes(folder / "[x]", b"1")
    write_bytes(folder / "x", b"2")
    remove_file(folder / "[x]")
    assert list_files(folder) == {"x": 1}


def test_a_folder_whose_name_reads_like_a_pattern_is_removed_alone(folder: UPath) -> None:
    write_bytes(folder / "[x]" / "file", b"1")
    write_bytes(folder / "x" / "file", b"2")
    remove_folder(folder / "[x]")
    remove_folder(folder / "[x]")
    assert (list_files(folder / "[x]"), list_files(folder / "x")) == ({}, {"file": 1})


def test_a_bucket_itself_is_a_folder(strict: StrictBucket) -> None:
    strict.create("of-crops")
    strict.write("of-crops", "\u306f/1.png", b"1")
    whole = place("gs://of-crops")
    assert (is_file(whole), read_small(whole, 9)) == (False, None)
    assert read_crops(whole)[0].code_points.tolist() == [0x306F]


def test_an_object_that_no_path_can_name_does_not_hide_the_others(strict: StrictBucket, folder: UPath) -> None:
    name = folder.path.partition("/")[2]
    for end in ("x", "/x", "a//x", "a/x"):
        strict.write("demo", f"{name}/{end}", b"1")
    assert list_tree(folder) == [("x", 1), ("a/x", 1)]


def test_an_empty_object_is_read(folder: UPath) -> None:
    write_bytes(folder / "empty", b"")
    assert read_bytes(folder / "empty") == b""


def test_a_dataset_on_a_bucket_has_the_bytes_of_one_in_a_folder(
    strict: StrictBucket, folder: UPath, pages: Path, dataset: Path, kuzushiji: Kuzushiji
) -> None:
    for path in [pages / "train.csv", *(pages / "train_images").iterdir()]:
        strict.write("demo", f"{folder.path.partition('/')[2]}/pages/{path.name}", path.read_bytes())
    source = ["--pages", f"{folder}/pages", "--labels", f"{folder}/pages/train.csv", "--coverage", "0.5"]
    command = ["prepare", *source, "--dataset", f"{folder}/crops"]
    strict.faults.inject("503", times=3)
    strict.faults.inject("cut", times=3, method="GET", matching="jpg")
    done = kuzushiji(*command)
    assert done.code == 0, done.stderr
    here, there = (
        json.loads((dataset / MANIFEST_FILE).read_bytes()),
        json.loads(read_bytes(folder / "crops/manifest.json")),
    )
    for key in ("shards", "files", "losses", "counts"):
        assert there[key] == here[key]
    assert strict.faults.left() == 0
    assert verify(folder / "crops")[1:] == ([], [])
    assert "nothing written" in kuzushiji(*command).stdout


def test_what_is_read_and_exported_on_a_bucket_has_the_bytes_of_what_is_in_a_folder(
    strict: StrictBucket, folder: UPath, pages: Path, trained: Path, kuzushiji: Kuzushiji, tmp_path: Path
) -> None:
    boxes = tmp_path / "boxes.csv"  # one page only: each process loads TensorFlow
    boxes.write_text("".join((pages / "train.csv").read_text().splitlines(keepends=True)[:2]))
    sources = {"boxes.csv": boxes}
    sources |= {f"pages/{path.name}": path for path in (pages / "train_images").iterdir()}
    sources |= {f"model/{path.name}": path for path in trained.iterdir()}
    for name, path in sources.items():
        strict.write("demo", f"{folder.path.partition('/')[2]}/{name}", path.read_bytes())
    here = ["--model", trained, "--pages", pages / "train_images", "--boxes", boxes]
    there = ["--model", f"{folder}/model", "--pages", f"{folder}/pages", "--boxes", f"{folder}/boxes.csv"]
    for inputs, out, pictures in (
        (here, tmp_path / "read", tmp_path / "pictures"),
        (there, f"{folder}/read", f"{folder}/pictures"),
    ):
        done = kuzushiji("predict", *inputs, "--out", out, "--annotate", pictures)
        assert done.code == 0, done.stderr
    for name in ("read", "pictures"):
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert {file: read_bytes(folder / name / file) for file in list_files(folder / name)} == files
    asked = ["export", "--format", "tflite"]
    for model, out in ((trained, tmp_path / "lite"), (f"{folder}/model", f"{folder}/lite")):
        assert kuzushiji(*asked, "--model", model, "--out", out).code == 0
    assert read_bytes(folder / "lite/model.tflite") == (tmp_path / "lite" / "model.tflite").read_bytes()


def test_a_lease_on_a_bucket_has_one_holder_and_goes_with_it(folder: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.lock.SECONDS_BETWEEN_RENEWALS", 0.05)
    monkeypatch.setattr("cluster.lock.SECONDS_BETWEEN_LOOKS", 0.02)
    lease = folder / "it.lock"
    with locked(lease, "it", Event()):
        with (
            pytest.raises(OptionError, match="only one process at a time may work on it"),
            locked(lease, "it", Event()),
        ):
            pass
        assert is_file(lease)
    assert not is_file(lease)


def test_pages_in_an_archive_on_a_bucket_are_read(archive: UPath, pages: Path) -> None:
    listing = list_pages(archive)
    assert len(listing.scans) == 12
    with page_reader(archive) as read:
        for name, size in listing.scans.items():
            assert read(name) == (pages / "train_images" / name).read_bytes()
            assert size == len(read(name))


def test_scans_in_folders_are_listed_on_a_bucket_as_on_a_disk(folder: UPath) -> None:
    for name in ("pages/a/源氏 1.jpg", "pages/b.PNG", "pages/b/Thumbs.db", "pages/b/characters/x.jpg", "other/c.jpg"):
        write_bytes(folder / name, b"x" * len(name))
    listing = list_pages(folder / "pages")
    assert listing.scans == {"a/源氏 1.jpg": 16, "b.PNG": 11}
    assert listing.ignored == {".db": 1, "characters/": 1}
    with page_reader(folder / "pages") as read:
        assert [read(name) for name in listing.scans] == [b"x" * 16, b"x" * 11]


@pytest.fixture(params=["path", "bucket"])
def models(request: pytest.FixtureRequest, folder: UPath, tmp_path: Path) -> UPath:
    return folder / "models" if request.param == "bucket" else place(tmp_path / "models")


def test_a_training_begins_in_the_root_of_an_empty_bucket_of_which_only_objects_may_be_read(
    strict: StrictBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.v2._internal.execution.storage import StorageContext

    def begin(trainer: Any) -> Any:  # what Ray Train does first, in another process
        config = trainer.run_config
        StorageContext(config.storage_path, config.name, config.storage_filesystem)
        return SimpleNamespace(return_value=Failure("it began", "", OptionError))

    strict.create("empty")
    strict.faults.inject("403", times=100, matching=r"/b/empty(\?|$)")
    monkeypatch.setattr("ray.train.v2.api.data_parallel_trainer.DataParallelTrainer.fit", begin)
    given = TrainConfig(architecture="baseline", epochs=1, global_batch_size=4, learning_rate=1e-4)
    try:
        with pytest.raises(OptionError, match="it began"):
            Run("first", given, place("gs://demo/x"), "0" * 64, reachable_place("gs://empty")).fit(None, None)
    finally:
        strict.faults.clear()
    assert ".runs/baseline-first/.validate_storage_marker" in strict.names("empty")


RACE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from cluster.manifest import seal
from cluster.models import ModelManifest
from cluster.models import point_to_latest
from cluster.places import place

def finish(minute):
    at = datetime(2026, 1, 1, 12, minute, tzinfo=UTC)
    manifest = ModelManifest(files=[], dataset_manifest_sha256="0" * 64, finished_at=at)
    folder = place(sys.argv[1]) / f"run-{minute:02}"
    if not sys.argv[1].startswith("gs:"):
        folder.mkdir(parents=True)
    seal(folder, manifest)
    point_to_latest(folder, manifest)

with ThreadPoolExecutor() as pool:
    list(pool.map(finish, map(int, sys.argv[2:])))
"""


def test_of_16_racers_for_one_pointer_the_last_to_finish_wins_and_it_is_always_valid(models: UPath) -> None:
    architecture = models / "baseline"
    minutes = [str(7 * minute % 16) for minute in range(16)]
    racers = [subprocess.Popen([sys.executable, "-c", RACE, str(architecture), *minutes[part::4]]) for part in range(4)]
    seen: list[Latest] = []
    while any(racer.poll() is None for racer in racers):
        latest = read_latest(architecture)  # raises if the pointer is incomplete
        if latest is not None:
            seen.append(latest)
    assert [racer.wait() for racer in racers] == [0, 0, 0, 0]
    last = read_latest(architecture)
    assert last is not None
    assert last.run == "run-15"
    times = [latest.finished_at for latest in seen]
    assert times == sorted(times)  # the pointer moves only to a later run


def test_a_folder_is_sealed_once(models: UPath) -> None:
    folder = write_run(models, "one")
    manifest = read_manifest(folder, ModelManifest)
    seal(folder, manifest)  # the same again, as by a retry after a lost answer
    other = manifest.model_copy(update={"finished_at": NOON + timedelta(hours=1)})
    with pytest.raises(DamageError, match="sealed by another job"):
        seal(folder, other)
    with pytest.raises(DamageError, match="sealed by another training"):
        write_model(folder, keras.Sequential([keras.layers.Dense(1)]), {"labels.txt": "rare\n"}, "0" * 64)
    assert verify(folder)[1:] == ([], [])
    assert read_manifest(folder, ModelManifest).finished_at == NOON


def test_a_lost_answer_to_an_exclusive_write_counts_as_success(strict: StrictBucket, folder: UPath) -> None:
    strict.faults.inject(
        "cut", times=2, method="POST", matching="ifGenerationMatch=0"
    )  # the manifest, then the pointer
    run = write_run(folder, "one")
    assert strict.faults.left() == 0
    assert [entry.status for entry in strict.requests if "ifGenerationMatch=0" in entry.path].count(412) >= 2
    assert verify(run)[1:] == ([], [])
    assert read_latest(run.parent) == Latest(run="one", finished_at=NOON)


@pytest.mark.parametrize("kind", ["429", "503", "cut", "slow", "flip"])
@pytest.mark.parametrize("file", ["model.keras", "labels.txt", "manifest.json", "latest.json"])
def test_a_fault_while_pulling_ends_in_the_right_bytes_or_one_line(
    strict: StrictBucket, folder: UPath, tmp_path: Path, kind: str, file: str
) -> None:
    write_run(folder, "one")
    to = place(tmp_path / "to")
    strict.faults.inject(
        kind, method="GET", matching=rf"{file}.*alt=media" if kind in ("cut", "flip", "slow") else file
    )
    try:
        pull(folder, to)
    except KuzushijiError as error:
        assert kind == "flip"
        assert "\n" not in str(error)
        pull(folder, to)  # resumes
    assert strict.faults.left() == 0
    assert verify(to / "baseline" / "one")[1:] == ([], [])
    for name, data in FILES.items():
        assert (tmp_path / "to" / "baseline" / "one" / name).read_bytes() == data


@pytest.mark.parametrize("kind", ["429", "503", "cut", "cut-upload"])
@pytest.mark.parametrize(
    "matching",
    ["upload_id=", "uploadType=multipart$", "ifGenerationMatch=0"],
    ids=["big", "small", "exclusive"],
)
def test_a_fault_while_writing_leaves_what_was_meant(
    strict: StrictBucket, folder: UPath, kind: str, matching: str
) -> None:
    strict.faults.inject(kind, times=2, matching=matching)
    run = write_run(folder, "one")
    write_listed(run / "labels.txt", FILES["labels.txt"])  # a second small file
    write_bytes(folder / "big", BIG)
    assert strict.faults.left() == 0
    assert verify(run)[1:] == ([], [])
    assert read_bytes(folder / "big") == BIG
    assert read_latest(run.parent) == Latest(run="one", finished_at=NOON)


def test_an_interrupted_pull_from_a_bucket_resumes_where_it_stopped(
    strict: StrictBucket, folder: UPath, tmp_path: Path
) -> None:
    write_run(folder, "one")
    part = tmp_path / "baseline" / "one" / ".model.keras.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BIG[: RANGE_BYTES + 5])
    (pulled,) = pull(folder, place(tmp_path))
    assert pulled.new_bytes == len(BIG) - RANGE_BYTES - 5 + len(FILES["labels.txt"])
    assert sha256_of(place(part.with_name("model.keras"))) == sha256_of(folder / "baseline" / "one" / "model.keras")


def test_corrupted_downloads_are_refused(strict: StrictBucket, folder: UPath, tmp_path: Path) -> None:
    write_bytes(folder / "labels.csv", b"image_id,labels\n")
    strict.faults.inject("flip")
    with pytest.raises(DamageError, match="must arrive unchanged"):
        read_bytes(folder / "labels.csv")
    strict.faults.inject("flip")
    with pytest.raises(DamageError, match="must arrive unchanged"):
        fetch(folder / "labels.csv", tmp_path / "labels.csv")
    assert read_bytes(folder / "labels.csv") == b"image_id,labels\n"


def test_an_object_replaced_while_it_is_read_is_not_mixed(folder: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.bucket.RANGE_BYTES", 1000)
    content = os.urandom(20_000)
    write_bytes(folder / "big", content)
    chunks = read_chunks(folder / "big", 0, len(content))
    received = [next(chunks)]
    write_bytes(folder / "big", content[::-1])
    with pytest.raises(FileNotFoundError):  # not at once: some ranges were requested before
        received.extend(chunks)
    assert content.startswith(b"".join(received))


@pytest.mark.parametrize("content", [None, "", "[]", '{"type": "service_account"}', "\xff"])
def test_a_file_of_credentials_that_can_not_be_used_is_one_line(
    content: str | None, kuzushiji: Kuzushiji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    forget()
    try:
        done = kuzushiji("verify", "gs://demo/x")
    finally:
        forget()
    (line,) = done.stderr.splitlines()
    assert done.code == 1
    assert "GOOGLE_APPLICATION_CREDENTIALS must name a file with credentials" in line


def test_listings_are_not_cached(folder: UPath) -> None:
    """Nothing is cached, because another process may have written."""
    assert list_files(folder) == {}
    write_bytes(folder / "x", b"1")
    assert list_files(folder) == {"x": 1}
    assert not is_file(folder / "y")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(write_bytes, folder / "y", b"2").result()
    assert is_file(folder / "y")


COMMANDS = [
    ["verify", "{place}/x"],
    ["pull", "--models", "{place}", "--to", "here"],
    ["evaluate", "--model", "{place}", "--dataset", "{place}"],
    ["prepare", "--pages", "{place}", "--labels", "{place}/x.csv", "--dataset", "{place}/y"],
    ["train", "--dataset", "{place}", "--models", "{place}", "--architecture", "baseline"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_missing_bucket_is_one_line(
    strict: StrictBucket, command: list[str], kuzushiji: Kuzushiji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = kuzushiji(*(word.format(place="gs://nowhere") for word in command))
    (line,) = done.stderr.splitlines()
    assert done.code == 1
    assert "gs://nowhere must exist." in line
    assert "gcloud storage buckets create gs://nowhere" in line


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("403", "gs://demo must grant you access."),
        ("401", "Run `gcloud auth application-default login`"),
    ],
)
def test_no_right_and_no_credentials_are_one_line_with_what_to_run(
    strict: StrictBucket, folder: UPath, kind: str, says: str, kuzushiji: Kuzushiji
) -> None:
    forget()
    strict.faults.inject(kind, times=100)
    done = kuzushiji("verify", "gs://demo/x")
    strict.faults.clear()
    (line,) = done.stderr.splitlines()
    assert done.code == 1
    assert says in line


@pytest.mark.parametrize(("kind", "says"), [("401", "needs credentials"), ("403", "must grant you access")])
def test_a_bucket_that_refuses_later_is_not_taken_for_an_empty_one(
    strict: StrictBucket, folder: UPath, kind: str, says: str
) -> None:
    write_run(folder, "one")
    strict.faults.inject(kind, times=100)
    for ask in (is_sealed, verify, resolve_model, read_latest):
        with pytest.raises(KuzushijiError, match=says):
            ask(folder / "baseline")


def test_a_page_that_is_refused_while_prepare_runs_is_one_line(
    strict: StrictBucket, folder: UPath, pages: Path, ray_here: None, kuzushiji: Kuzushiji, tmp_path: Path
) -> None:
    name = folder.path.partition("/")[2]
    for path in (pages / "train_images").iterdir():
        strict.write("demo", f"{name}/{path.name}", path.read_bytes())
    strict.faults.inject("403", times=100, matching=f"{name}/.*jpg")
    to = ["--dataset", tmp_path / "crops"]
    done = kuzushiji("prepare", "--pages", folder, "--labels", pages / "train.csv", *to)
    (line,) = done.lines
    assert done.code == 1
    assert "gs://demo must grant you access." in line


@pytest.fixture
def archive(folder: UPath, pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UPath:
    """Return a zip of the drawn pages on the bucket, read in small ranges: several requests, as for a large one."""
    local = Path(shutil.make_archive(str(tmp_path / "pages"), "zip", pages / "train_images"))
    write_bytes(folder / "pages.zip", local.read_bytes())
    monkeypatch.setattr(bucket, "RANGE_BYTES", 1000)
    monkeypatch.setattr("preprocessing.archive.TAIL_BYTES", 500)
    return folder / "pages.zip"


@pytest.mark.parametrize(("kind", "says"), [("401", "needs credentials"), ("403", "must grant you access")])
def test_an_archive_that_is_refused_later_is_no_loss_of_pages(
    strict: StrictBucket, archive: UPath, kind: str, says: str
) -> None:
    name = next(iter(list_pages(archive).scans))
    with page_reader(archive) as read:
        strict.faults.inject(kind, times=100)
        with pytest.raises(KuzushijiError, match=says):
            read(name)


@pytest.mark.parametrize("kind", ["429", "503", "cut", "flip"])
def test_a_fault_while_an_archive_is_read_loses_no_page(
    strict: StrictBucket, archive: UPath, pages: Path, kind: str
) -> None:
    listing = list_pages(archive)
    with page_reader(archive) as read:
        for name in list(listing.scans)[:4]:
            strict.faults.inject(kind, method="GET", matching="alt=media")
            assert read(name) == (pages / "train_images" / name).read_bytes()
            assert strict.faults.left() == 0


@pytest.mark.parametrize("downloads", range(3))
def test_a_flipped_byte_in_the_list_of_an_archives_pages_is_one_line_or_loses_no_page(
    strict: StrictBucket, archive: UPath, pages: Path, downloads: int
) -> None:
    listing = list_pages(archive)
    name = next(iter(listing.scans))
    for ask in (lambda: list_pages(archive), lambda: read_one(archive, name)):
        for _ in range(downloads):  # downloads before the flipped one
            strict.faults.inject("slow", method="GET", matching="alt=media")
        strict.faults.inject("flip", method="GET", matching="alt=media")
        try:
            got = ask()
        except KuzushijiError as error:
            assert "\n" not in str(error)
        else:
            assert got in (listing, (pages / "train_images" / name).read_bytes())
        assert strict.faults.left() == 0


def read_one(archive: UPath, name: str) -> bytes:
    with page_reader(archive) as read:
        return read(name)


def test_an_archive_replaced_while_it_is_read_is_not_mixed(archive: UPath) -> None:
    names = list(list_pages(archive).scans)
    with page_reader(archive) as read:
        read(names[0])
        write_bytes(archive, read_bytes(archive).replace(names[-1].encode(), b"x" * len(names[-1])))
        with pytest.raises(FileNotFoundError, match=f"{names[-1]} is no longer in the archive"):
            read(names[-1])


# flip and cut change the content of answers, which the answers of some operations do not have.
HAS_NO_CONTENT = {"flip": ("list", "list folders", "size", "remove file", "remove"), "cut": ("remove file",)}
ASK = {
    "list": lambda folder, here: list_files(folder / "run"),
    "list folders": lambda folder, here: list_folders(folder),
    "manifest": lambda folder, here: read_manifest(folder / "run", ModelManifest).files,
    "pointer": lambda folder, here: resolve_model(folder),
    "fetch": lambda folder, here: fetch(folder / "run" / "labels.txt", here) or here.read_bytes(),
    "verify": lambda folder, here: verify(folder / "run")[1:],
    "size": lambda folder, here: size_of(folder / "run" / "labels.txt"),
    "remove file": lambda folder, here: remove_file(folder / "run" / "more-0"),
    "remove": lambda folder, here: remove_folder(folder),
}  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (operation, kind)
        for operation in ASK
        for kind in ("429", "503", "cut", "flip", "401", "403")
        if operation not in HAS_NO_CONTENT.get(kind, ())
    ],
)
def test_whatever_is_asked_of_a_bucket_is_answered_rightly_or_in_one_line(
    strict: StrictBucket, folder: UPath, operation: str, kind: str, tmp_path: Path
) -> None:
    run = folder / "run"
    manifest = ModelManifest(
        files=[write_listed(run / "labels.txt", b"rare\n")], dataset_manifest_sha256="0" * 64, finished_at=NOON
    )
    seal(run, manifest)
    point_to_latest(run, manifest)
    for name in range(10):  # more than a page of a listing
        write_bytes(run / f"more-{name}", b"1")
    ask, here = ASK[operation], tmp_path / "here"
    right = ask(folder, here) if operation != "remove" else None
    refused = kind in ("401", "403")
    strict.faults.inject(kind, times=100 if refused else 1)
    try:
        assert ask(folder, here) == right
        assert strict.faults.left() == 0
    except Exception as error:  # as the command line reports it
        explanation = explained(error) or error
        assert isinstance(explanation, KuzushijiError)
        assert "\n" not in str(explanation)
        assert refused or kind == "flip"
        assert kind != "403" or "gs://demo must grant you access" in str(explanation)
        assert kind != "401" or "needs credentials" in str(explanation)
        assert refused or strict.faults.left() == 0
        strict.faults.clear()
        assert ask(folder, here) == right
    if operation == "remove":
        assert list_files(run) == {}


@pytest.mark.parametrize("kind", ["429", "503"])  # the answer to a removal has no body that could be cut
def test_a_fault_while_a_file_is_removed_removes_it(strict: StrictBucket, folder: UPath, kind: str) -> None:
    write_bytes(folder / "x", b"1")
    strict.faults.inject(kind)
    remove_file(folder / "x")
    assert strict.faults.left() == 0
    assert list_files(folder) == {}


@pytest.mark.parametrize("kind", ["429", "503", "cut", "flip", "403"])
def test_a_fault_while_a_dataset_is_staged_ends_in_the_right_crops_or_one_line(
    strict: StrictBucket, folder: UPath, few: Path, kind: str
) -> None:
    for path in few.iterdir():
        write_bytes(folder / path.name, path.read_bytes())
    strict.faults.inject(kind, times=100 if kind == "403" else 1, method="GET", matching=r"test\.tfrecord.*alt=media")
    try:
        with staged(folder, ["test"]) as data:
            found = np.array(data.splits["test"].images)
    except KuzushijiError as error:
        assert kind in ("flip", "403")
        assert "\n" not in str(error)
        strict.faults.clear()
        with staged(folder, ["test"]) as data:
            found = np.array(data.splits["test"].images)
    assert strict.faults.left() == 0
    with staged(place(few), ["test"]) as data:
        assert np.array_equal(found, data.splits["test"].images)


@pytest.mark.parametrize("kind", ["503", "cut", "flip", "403"])
def test_a_fault_while_a_model_is_loaded_loads_what_was_meant_or_nothing(
    strict: StrictBucket, folder: UPath, kind: str
) -> None:
    run = folder / "one"
    write_model(
        run, keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)]), {"labels.txt": "rare\n"}, "0" * 64
    )
    strict.faults.inject(kind, times=100 if kind == "403" else 1, method="GET", matching=r"model\.keras.*alt=media")
    try:
        names = load_model(folder)[1]
    except KuzushijiError as error:
        assert kind in ("flip", "403")
        assert "\n" not in str(error)
        strict.faults.clear()
        names = load_model(folder)[1]
    assert strict.faults.left() == 0
    assert names == ["rare"]


def test_a_refused_listing_of_models_is_an_error_not_an_empty_list(
    strict: StrictBucket, folder: UPath, tmp_path: Path
) -> None:
    write_run(folder, "one")
    strict.faults.inject("403", times=100, matching=r"/o\?")
    with pytest.raises(KuzushijiError, match="gs://demo must grant you access"):
        pull(folder, place(tmp_path))


def test_a_target_folder_removed_during_pull_is_one_line(strict: StrictBucket, folder: UPath, tmp_path: Path) -> None:
    write_run(folder, "one")
    strict.faults.inject("hold", method="GET", matching=r"labels\.txt.*alt=media")
    target = tmp_path / "to" / "baseline" / "one"
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(pull, folder, place(tmp_path / "to"))
        while strict.faults.left() and not pulling.done():  # until then, the part may be open but not yet locked
            time.sleep(0.01)
        shutil.rmtree(tmp_path / "to")
        strict.faults.clear()
        with pytest.raises(KuzushijiError, match=f"a folder must exist.* Received: {target}"):
            pulling.result()
    assert not (tmp_path / "to").exists()
    pull(folder, place(tmp_path / "to"))
    assert verify(place(target))[1:] == ([], [])


REFUSED = {
    "viewer": ("403", "GET", read_bytes, "To grant storage.objects.get, .*roles/storage.objectViewer`"),
    "lister": ("403", "GET", lambda x: list_files(x.parent), "storage.objects.list, .*roles/storage.objectViewer`"),
    "user": ("403", "POST", lambda x: write_bytes(x, b"2"), "storage.objects.create, .*roles/storage.objectUser`"),
    "remover": ("403", "DELETE", remove_file, "storage.objects.delete, .*roles/storage.objectUser`"),
    "remover of a folder": (
        "403", "DELETE", lambda x: remove_folder(x.parent), "storage.objects.delete, .*roles/storage.objectUser`"
    ),
    "retention": ("retained", "POST", lambda x: change_bytes(x, lambda _: b"2"), "update gs://demo --clear-retention"),
    "requester pays": ("unpaid", "GET", read_bytes, "400 .*provided. Set GOOGLE_CLOUD_QUOTA_PROJECT"),
    "organization": ("abroad", "GET", read_bytes, "403 .*organization's policy.*Identifier: 4. Ask its owner"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_bucket_refuses_is_one_line_with_the_mend_for_it(strict: StrictBucket, folder: UPath, why: str) -> None:
    kind, method, ask, says = REFUSED[why]
    write_bytes(folder / "x", b"1")
    strict.faults.inject(kind, times=100, method=method)
    with pytest.raises(KuzushijiError, match=f"gs://demo.* Received: .*{says}") as refused:
        ask(folder / "x")
    assert '{"error"' not in str(refused.value)


def test_a_bucket_whose_requesters_pay_is_used_with_the_project_of_googles_variable(
    strict: StrictBucket, folder: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", "payer")
    forget()
    strict.faults.inject("unpaid", times=100, matching="/o(?!.*(userProject=payer|upload_id=))")
    try:
        paid = reachable_place(folder)
        for name, data in (("x", b"1"), ("big", BIG)):
            write_bytes(paid / name, data)
            assert b"".join(read_chunks(paid / name, 0, size_of(paid / name))) == data
        change_bytes(paid / "x", lambda old: (old or b"") + b"2")
        assert (is_file(paid / "x"), list_files(paid)) == (True, {"x": 2, "big": len(BIG)})
        files = arrow_filesystem(paid)  # gcsfs, which Ray Train uses
        with files.open_output_stream(f"{paid.path}/y") as stream:
            stream.write(b"3")
        with files.open_input_file(f"{paid.path}/y") as stream:
            assert stream.read() == b"3"
        remove_file(paid / "x")
        remove_folder(paid)
        assert strict.faults.left() == 100
    finally:
        monkeypatch.delenv("GOOGLE_CLOUD_QUOTA_PROJECT")
        forget()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (DefaultCredentialsError("Your default credentials were not found."), "Google Cloud needs credentials"),
        (RefreshError("invalid_grant: Token has been expired or revoked."), "must accept the credentials"),
        (RetryError("Timeout of 120.0s exceeded", ServiceUnavailable("GET https://x/b/demo/o: 503")), "must answer"),
        (OSError("Forbidden: https://x/b/demo/o\nno storage.objects.list access"), "gs://demo must grant you access"),
        (Forbidden("b/demo/o: no serviceusage.services.use access"), "--role=roles/serviceusage.serviceUsageConsumer"),
        (BadRequest("b/demo/o: User project specified in the request is invalid."), "Set GOOGLE_CLOUD_QUOTA_PROJECT"),
    ],
)  # fmt: skip
def test_what_google_says_is_one_line_with_what_to_run(error: Exception, says: str) -> None:
    explanation = explained(error)
    assert explanation is not None
    assert says in str(explanation)
    assert "\n" not in str(explanation)


def test_a_failed_upload_in_parts_names_the_bucket_and_no_secret(strict: StrictBucket, folder: UPath) -> None:
    strict.faults.inject("403", times=100, method="PUT")
    with pytest.raises(KuzushijiError, match="gs://demo must grant you access.*upload_id=\\.\\.\\.") as refused:
        write_bytes(folder / "big", BIG)
    secrets = [re.search("upload_id=([^&]+)", logged.path) for logged in strict.requests]
    assert not any(secret and secret[1] in str(refused.value) for secret in secrets)
    other = BadRequest(f"PUT https://x/upload?upload_id={BIG[:8].hex()}: no")  # not explained
    assert BIG[:8].hex() not in one_line(other)
    answer = requests.Response()
    answer.status_code = 503
    last = InvalidResponse(answer, "Request failed with status code", 503, "Expected one of", 200)
    error = explained(RetryError("Timeout of 120.0s exceeded", last), "gs://demo")
    assert str(error) == "gs://demo must answer. Received, after retries: HTTP 503. Run the same command again"


def test_other_failures_are_left_as_they_are() -> None:
    assert explained(OSError("disk full")) is None
    assert explained(ValueError("x")) is None


def test_a_bucket_is_checked_for_access_once_per_process(strict: StrictBucket, folder: UPath) -> None:
    bucket.reach.cache_clear()
    before = len([logged for logged in strict.requests if logged.path.startswith("/storage/v1/b/demo/o?")])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(reachable_place, folder).result()
    reachable_place(folder / "x")
    after = len([logged for logged in strict.requests if logged.path.startswith("/storage/v1/b/demo/o?")])
    assert after == before + 1

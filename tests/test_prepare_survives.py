"""prepare, killed or run twice at the same time, in real processes: always the bytes of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos import AT_WORK, Chaos, draw_pages, hashes_of_dataset, prepare_command, title

from cluster.errors import InputError, KuzushijiError
from cluster.manifest import is_sealed, seal
from cluster.places import place
from cluster.runtime import START_TIMED_OUT
from job.verify import verify
from preprocessing.config import PrepareConfig
from preprocessing.dataset import DatasetManifest
from preprocessing.group_files import write_groups
from preprocessing.plan import make_plan
from preprocessing.prepare import _finish, prepare
from preprocessing.shards import CutGroup
from preprocessing.tries import Tries

CONFIG = PrepareConfig(coverage=0.2, val_fraction=0.35, test_fraction=0.35)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    draw_pages(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(ray_here: None, source: Path) -> Path:
    prepare_here(source, source / "dataset")
    return source / "dataset"


def prepare_here(source: Path, dataset: Path) -> bool:
    """Run `prepare` in this process, with the Ray of the session. Return whether anything was written."""
    pages, labels = place(source / "pages" / "train_images"), place(source / "pages" / "train.csv")
    return prepare(pages, labels, place(dataset), CONFIG)[1]


def reported(dataset: Path) -> dict[str, int]:
    """Return the inodes of the shards that a killed attempt finished."""
    reports = [json.loads(path.read_text()) for path in (dataset / ".prepare").glob("group-*.json")]
    names = [shard["name"] for report in reports for shard in report["shards"].values()]
    return {name: (dataset / name).stat().st_ino for name in names}


def workers() -> list[psutil.Process]:
    """Return the processes of the tests' Ray that run a task or train."""
    return [one for one in psutil.Process().children(recursive=True) if title(one).startswith(AT_WORK)]


def test_a_killed_prepare_is_finished_by_the_next_which_makes_nothing_again(
    chaos: Chaos, source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dataset"
    command = prepare_command(source, out)
    ended = True
    while ended:
        attempt = chaos.start(command)
        while not (ended := attempt.process.poll() is not None) and not any((out / ".prepare").glob("group-*.json")):
            time.sleep(0.005)
        assert not ended or attempt.says(START_TIMED_OUT)
    attempt.process.kill()
    attempt.process.wait()
    while chaos.writers():  # tasks of the killed driver still run for a while
        time.sleep(0.05)
    done = reported(out)
    assert done
    (out / ".tmp-0123").write_bytes(b"of a task that was killed while it wrote")
    prepare_here(source, out)
    assert hashes_of_dataset(out) == hashes_of_dataset(undisturbed)
    assert {name: (out / name).stat().st_ino for name in done} == done


def test_two_prepares_and_a_killed_worker_never_show_an_incomplete_dataset(
    chaos: Chaos, source: Path, undisturbed: Path, ray_address: str, tmp_path: Path
) -> None:
    out = tmp_path / "dataset"
    command = prepare_command(source, out)
    attempts = [chaos.start(command, RAY_ADDRESS=ray_address) for _ in range(2)]
    killed, seen = False, 0
    while any(attempt.process.poll() is None for attempt in attempts):
        if not killed and (found := workers()):
            with suppress(psutil.NoSuchProcess):  # it may have ended since it was found
                found[0].kill()
                killed = True
        if is_sealed(place(out)):
            assert verify(place(out))[1] == []
            seen += 1
        time.sleep(0.02)
    assert killed
    assert seen
    for attempt in attempts:
        assert attempt.process.returncode == 0, attempt.stderr.read_text()
    assert hashes_of_dataset(out) == hashes_of_dataset(undisturbed)


def test_ctrl_c_at_the_first_pages_stops_ray_datas_thread_before_ray(
    ray_here: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the thread would start another Ray, fail with a traceback, and leave the terminal without a cursor."""

    def stopped(*_: object, **__: object) -> None:
        assert any(map(of_ray_data, threading.enumerate()))
        raise KeyboardInterrupt

    def of_ray_data(thread: threading.Thread) -> bool:
        return thread.name.startswith("StreamingExecutor")

    monkeypatch.setattr("ray.data.iterator.BatchIterator", stopped)
    with pytest.raises(KeyboardInterrupt) as held:  # keeps the traceback, as at the end of a command
        prepare_here(source, tmp_path / "dataset")
    assert held.tb is not None
    assert not any(map(of_ray_data, threading.enumerate()))


def test_a_prepare_that_finishes_second_accepts_the_sealed_folder(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "dataset"

    def overtaken(*_: object, **__: object) -> None:
        monkeypatch.undo()
        assert prepare_here(source, out)
        (out / ".prepare").mkdir()  # by one of our tasks, whose temporary file is gone
        raise FileNotFoundError(out / ".tmp-0123")

    monkeypatch.setattr("preprocessing.prepare.map_tasks", overtaken)
    assert not prepare_here(source, out)
    assert hashes_of_dataset(out) == hashes_of_dataset(undisturbed)


def test_prepare_removes_no_file_that_another_prepare_writes_before_the_dataset_is_sealed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, the other one would fail: it accepts only a sealed dataset."""
    out, seen = tmp_path / "dataset", []
    others = [out / ".tmp-0123", out / ".prepare" / ".tmp-4567"]

    def finish(*arguments: Any) -> DatasetManifest:
        for path in others:
            path.touch()
        return _finish(*arguments)

    def sealed(*arguments: Any) -> None:
        seen.extend(path.exists() for path in others)
        seal(*arguments)

    monkeypatch.setattr("preprocessing.prepare._finish", finish)
    monkeypatch.setattr("preprocessing.prepare.seal", sealed)
    assert prepare_here(source, out)
    assert seen == [True, True]
    assert not any(path.exists() for path in others)


def test_a_killed_prepare_resumes_with_a_zip_of_the_same_pages(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the zip, the files have other names."""
    out = tmp_path / "dataset"

    def killed(_: int, work: Callable[[int], Any], *__: object, begin: Callable[[], None], **___: object) -> None:
        begin()
        work(0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.prepare.map_tasks", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_here(source, out)
    done = reported(out)
    assert done
    with zipfile.ZipFile(tmp_path / "pages.zip", "w") as archive:
        for path in (source / "pages" / "train_images").iterdir():
            archive.write(path, f"a folder/{path.name}")
    assert prepare(place(tmp_path / "pages.zip"), place(source / "pages" / "train.csv"), place(out), CONFIG)[1]
    assert hashes_of_dataset(out) == hashes_of_dataset(undisturbed)
    assert {name: (out / name).stat().st_ino for name in done} == done


@pytest.mark.parametrize("moment", ["prepare.seal", "resumable.Resumable.remove_traces"])
def test_a_prepare_that_is_killed_as_it_seals_is_finished_by_the_next(
    moment: str, source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "dataset"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"preprocessing.{moment}", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_here(source, out)
    monkeypatch.undo()
    assert (out / ".prepare").exists()
    assert prepare_here(source, out) == (moment == "prepare.seal")
    assert hashes_of_dataset(out) == hashes_of_dataset(undisturbed)


def test_a_task_that_outlives_its_prepare_adds_nothing_to_a_sealed_dataset(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from preprocessing.cutting import _read_page

    out = tmp_path / "dataset"
    shutil.copytree(undisturbed, out)
    before = {path.name: path.stat().st_ino for path in out.iterdir()}
    (out / ".prepare").mkdir()
    (out / ".prepare" / "plan.json").touch()

    def slow(*page: Any) -> Any:
        shutil.rmtree(out / ".prepare", ignore_errors=True)  # as the next prepare does after it seals the dataset
        return _read_page(*page)

    monkeypatch.setattr("preprocessing.cutting._read_page", slow)
    pages, labels = place(source / "pages" / "train_images"), place(source / "pages" / "train.csv")
    cut = CutGroup(str(pages), str(out))
    write_groups(make_plan(pages, labels, CONFIG).groups, place(out / ".prepare"), cut.attempt)
    with pytest.raises(KuzushijiError, match=r"\.prepare"):
        cut(0)
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == before


# --- pages that end the process that works on them


def work_that_dies_at(page_id: str) -> Callable[..., Callable[[int], Any]]:
    """Return a replacement for `CutGroup` whose process is killed at a page, and which allows one death.

    It is a closure: for a top-level function, Ray's workers would import this file.
    """

    def make(*places: str) -> Callable[[int], Any]:
        cut = CutGroup(*places)

        def work(number: int) -> Any:
            from preprocessing import cutting, tries

            read, most = cutting._read_page, tries.MOST_DEATHS

            def read_or_die(*given: Any) -> Any:
                return os.kill(os.getpid(), signal.SIGKILL) if given[1].id == page_id else read(*given)

            cutting._read_page, tries.MOST_DEATHS = read_or_die, 1  # type: ignore[assignment]
            try:
                return cut(number)
            finally:
                cutting._read_page, tries.MOST_DEATHS = read, most

        work.attempt = cut.attempt  # type: ignore[attr-defined]
        return work

    return make


def test_a_page_that_ends_each_process_ends_prepare_in_one_line_that_names_it(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_id = sorted(path.stem for path in (source / "pages" / "train_images").iterdir())[-1]
    monkeypatch.setattr("preprocessing.prepare.CutGroup", work_that_dies_at(page_id))
    with pytest.raises(
        InputError, match=f"^no page may end .* Received: {page_id}, where 1 processes ended .*folder. See docs/faq.md$"
    ):
        prepare_here(source, tmp_path / "dataset")
    monkeypatch.undo()
    assert prepare_here(source, tmp_path / "dataset")
    assert hashes_of_dataset(tmp_path / "dataset") == hashes_of_dataset(undisturbed)


class Killed(BaseException):
    """Simulates the death of a process in a test that has only one: none of our code catches it."""


class Deaths:
    """Cuts one group with all pages, in processes that die at given pages; 0 is the first page."""

    def __init__(self, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from preprocessing import cutting

        self.pages, labels = place(source / "pages" / "train_images"), place(source / "pages" / "train.csv")
        self.groups = make_plan(self.pages, labels, CONFIG.model_copy(update={"shards": 1})).groups
        (self.group,) = self.groups
        self.out, self.deadly = out, set[int]()
        (out / ".prepare").mkdir(parents=True)
        (out / ".prepare" / "plan.json").touch()
        self.new_attempt()
        read = cutting._read_page

        def read_or_die(*given: Any) -> Any:
            if self.group.page_ids.index(given[1].id) in self.deadly:
                raise Killed
            return read(*given)

        monkeypatch.setattr("preprocessing.cutting._read_page", read_or_die)

    def new_attempt(self) -> None:
        self.cut = CutGroup(str(self.pages), str(self.out))
        write_groups(self.groups, place(self.out / ".prepare"), self.cut.attempt)

    def die_at(self, *pages: int) -> None:
        self.deadly = set(pages)
        with pytest.raises(Killed):
            self.cut(0)


@pytest.fixture
def deaths(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deaths:
    return Deaths(source, tmp_path / "dataset", monkeypatch)


def test_a_page_is_named_after_three_processes_that_died_at_it_and_each_attempt_of_the_command_counts_anew(
    deaths: Deaths,
) -> None:
    for _ in range(2):
        deaths.die_at(5)  # the first process notes no page, so its death counts for none
        for _ in range(3):
            deaths.die_at(5)
        with pytest.raises(InputError, match=f"Received: {deaths.group.page_ids[5]}, where 3 processes ended"):
            deaths.cut(0)
        deaths.new_attempt()


def test_finishing_a_page_resets_its_deaths_but_deaths_at_other_pages_do_not(deaths: Deaths) -> None:
    for page in (5, 5, 5, 7, 5, 5):  # the fourth process gets past page 5
        deaths.die_at(page)
    deaths.die_at(3)
    deaths.die_at(5)
    with pytest.raises(InputError, match=f"Received: {deaths.group.page_ids[5]}, where 3 processes ended"):
        deaths.cut(0)


def test_one_death_at_each_page_does_not_fail_prepare_and_leaves_no_note(deaths: Deaths) -> None:
    shuffled = random.Random(1)
    for page in shuffled.sample(range(16), 16):
        deaths.die_at(page)
    deaths.deadly = set()
    assert sum(shard.examples for shard in deaths.cut(0).shards.values()) == len(deaths.group.labels)
    left = {path.name for path in (deaths.out / ".prepare").iterdir()}
    assert left == {"group-00000.json", f"{deaths.cut.attempt}-groups-00000.parquet", "plan.json"}


def test_a_cancelled_task_leaves_no_note(deaths: Deaths) -> None:
    folder = deaths.out / ".prepare"
    tries = Tries(deaths.group, place(folder), "attempt")
    assert list(folder.glob(".tmp-attempt-*"))
    with pytest.raises(KeyboardInterrupt), tries:
        raise KeyboardInterrupt
    assert not list(folder.glob(".tmp-*"))


def test_a_group_that_ends_its_processes_outside_of_its_pages_is_named_by_its_first_and_last_page(
    deaths: Deaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: object) -> None:
        raise Killed

    monkeypatch.setattr("preprocessing.shards._ShardWriter.close", killed)
    for _ in range(4):
        deaths.die_at()
    pages = deaths.group.page_ids
    with pytest.raises(InputError, match=f"Received: {pages[0]} to {pages[-1]}, where 3 processes ended"):
        deaths.cut(0)

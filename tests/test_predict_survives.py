"""predict, killed, run again or twice at the same time: the bytes of an undisturbed run, and no work done twice."""

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from chaos import Chaos, draw_pages, hashes_of_predictions, predict_command
from conftest import CPUS
from test_predict import any_model
from test_storage_faults import wait_for_tasks

from cluster.errors import InputError, OptionError
from cluster.manifest import seal
from cluster.places import place
from cluster.storage import check_writable, write_bytes
from job.predict.predict import _check_tables, predict
from job.predict.read_group import ReadGroup, resumable, unfinished_pictures
from preprocessing.group_files import write_groups
from preprocessing.groups import group_pages
from preprocessing.labels.read import read_labels
from preprocessing.pages import list_pages

LABELS = "U+306F\nU+306E\nrare\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `pages` and `models`."""
    folder = tmp_path_factory.mktemp("source")
    draw_pages(folder)
    any_model(folder / "models", LABELS, {})
    return folder


@pytest.fixture(scope="module")
def undisturbed(ray_here: None, source: Path) -> Path:
    """Return a folder with the `read` and the `pictures` of an undisturbed run."""
    assert predict_here(source, source / "whole")
    return source / "whole"


def predict_here(source: Path, to: Path, pictures: bool = True, **options: Any) -> bool:
    """Run `predict` in this process, with the Ray of the session. Return whether anything was written."""
    places = [source / "models" / "baseline", source / "pages" / "train_images", source / "pages" / "train.csv"]
    annotate = place(to / "pictures") if pictures else None
    return predict(*map(place, places), place(to / "read"), annotate=annotate, **options)[1]


def written(folder: Path) -> dict[str, int]:
    """Return the inode of each file. A file that is written again has another inode."""
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def finished(to: Path) -> dict[str, int]:
    """Return the inodes of the tables and pictures that a killed attempt finished."""
    reports = [json.loads(path.read_text()) for path in (to / "read" / ".predict").glob("group-*.json")]
    names = [f"read/{entry['name']}" for report in reports for entry in report["files"]]
    names += [f"pictures/{page_id}.jpeg" for report in reports for page_id in report["pictures"]]
    return {name: (to / name).stat().st_ino for name in names}


def test_a_killed_predict_is_finished_by_the_next_which_reads_nothing_again(
    chaos: Chaos, source: Path, undisturbed: Path, ray_address: str, tmp_path: Path
) -> None:
    to = tmp_path / "to"
    attempt = chaos.start(predict_command(source, source / "models", to), RAY_ADDRESS=ray_address)
    while not any((to / "read" / ".predict").glob("group-*.json")):
        assert attempt.process.poll() is None, attempt.stderr.read_text()
        time.sleep(0.005)
    attempt.process.kill()
    attempt.process.wait()
    wait_for_tasks()  # those of the killed driver still run for a while
    done = finished(to)
    assert done
    assert not (to / "read" / "manifest.json").exists()
    (to / "read" / ".tmp-0123").write_bytes(b"of a task that was killed while it wrote")
    assert predict_here(source, to)
    assert hashes_of_predictions(to) == hashes_of_predictions(undisturbed)
    assert {name: (to / name).stat().st_ino for name in done} == done


def test_two_predicts_of_one_folder_end_with_one_folder_that_is_whole(
    chaos: Chaos, source: Path, undisturbed: Path, ray_address: str, tmp_path: Path
) -> None:
    command = predict_command(source, source / "models", tmp_path / "to")
    attempts = [chaos.start(command, RAY_ADDRESS=ray_address) for _ in range(2)]
    for attempt in attempts:
        assert attempt.process.wait() == 0, attempt.stderr.read_text()
    assert hashes_of_predictions(tmp_path / "to") == hashes_of_predictions(undisturbed)


def test_a_predict_that_finishes_second_accepts_the_sealed_folder(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*_: object, **__: object) -> None:
        monkeypatch.undo()
        assert predict_here(source, tmp_path)
        raise FileNotFoundError(tmp_path / "read" / ".tmp-0123")  # the other command removed it

    monkeypatch.setattr("job.predict.predict.map_tasks", overtaken)
    assert not predict_here(source, tmp_path)
    assert hashes_of_predictions(tmp_path) == hashes_of_predictions(undisturbed)


def test_predict_removes_no_file_that_another_predict_writes_before_the_folder_is_sealed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, the other one would fail: it accepts only a sealed folder."""
    out, seen = place(tmp_path / "read"), []
    others = [Path(out.path, ".tmp-0123"), Path(resumable(out).progress_folder.path, ".tmp-4567")]

    def check_tables(*arguments: Any) -> None:
        for path in others:
            path.touch()
        _check_tables(*arguments)

    def sealed(*arguments: Any) -> None:
        seen.extend(path.exists() for path in others)
        seal(*arguments)

    monkeypatch.setattr("job.predict.predict._check_tables", check_tables)
    monkeypatch.setattr("job.predict.predict.seal", sealed)
    assert predict_here(source, tmp_path)
    assert seen == [True, True]
    assert not any(path.exists() for path in others)


@pytest.mark.parametrize("moment", ["job.predict.predict.seal", "preprocessing.resumable.Resumable.remove_traces"])
def test_a_predict_that_is_killed_as_it_seals_is_finished_by_the_next(
    moment: str, source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, killed)
    with pytest.raises(KeyboardInterrupt):
        predict_here(source, tmp_path)
    monkeypatch.undo()
    before = written(tmp_path)
    assert predict_here(source, tmp_path) == moment.endswith("seal")
    assert hashes_of_predictions(tmp_path) == hashes_of_predictions(undisturbed)
    after = written(tmp_path)
    assert {name: before[name] for name in after if name in before} == {
        name: inode for name, inode in after.items() if name in before
    }


def test_the_same_command_on_a_complete_folder_writes_nothing_and_mends_what_is_damaged(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    before = written(tmp_path)
    assert not predict_here(source, tmp_path)
    assert written(tmp_path) == before
    first = min((tmp_path / "read").glob("pages-*"))
    first.write_bytes(b"damage")
    assert predict_here(source, tmp_path)
    assert hashes_of_predictions(tmp_path) == hashes_of_predictions(undisturbed)


def test_a_complete_folder_without_pictures_is_refused_with_them_and_stays_sealed(source: Path, tmp_path: Path) -> None:
    assert predict_here(source, tmp_path, pictures=False)
    before = written(tmp_path)
    with pytest.raises(OptionError, match=r"these differ: annotate \(was False, now True\)"):
        predict_here(source, tmp_path)
    assert written(tmp_path) == before


def test_pictures_may_be_removed_and_are_drawn_again_with_damaged_tables(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "pictures")
    assert not predict_here(source, tmp_path)
    min((tmp_path / "read").glob("pages-*")).write_bytes(b"damage")
    assert predict_here(source, tmp_path)
    assert hashes_of_predictions(tmp_path) == hashes_of_predictions(undisturbed)


def test_cleanup_keeps_the_plan_of_another_attempt(source: Path, tmp_path: Path) -> None:
    assert predict_here(source, tmp_path)
    out = resumable(place(tmp_path / "read"))
    write_bytes(out.plan_file, b"{}")
    (tmp_path / "read" / "manifest.json").unlink()
    out.remove_traces()
    assert (tmp_path / "read" / ".predict" / "plan.json").exists()


def test_a_folder_of_another_job_is_refused_with_what_differs_finished_or_not(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(undisturbed, tmp_path / "sealed")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("job.predict.predict.map_tasks", killed)
        with pytest.raises(KeyboardInterrupt):
            predict_here(source, tmp_path / "begun")
    shutil.copytree(source / "models", tmp_path / "other" / "models")
    shutil.copytree(source / "pages", tmp_path / "other" / "pages")
    with (tmp_path / "other" / "pages" / "train.csv").open("a") as boxes:
        boxes.write("another,1 2 3 4\n")
    (tmp_path / "of another model").mkdir()
    (tmp_path / "of another model" / "pages").symlink_to(source / "pages")
    any_model(tmp_path / "of another model" / "models", LABELS.replace("U+306F", "U+306B"), {})
    for name in ("sealed", "begun"):
        before = written(tmp_path / name)
        for other, options, key in (
            (source, {"min_confidence": 0.5}, "min_confidence (was 0.0, now 0.5)"),
            (source, {"form": "csv"}, "format (was parquet, now csv)"),
            (tmp_path / "of another model", {}, "model (was "),
            (tmp_path / "other", {}, "input (was "),
        ):
            with pytest.raises(
                OptionError,
                match=rf"--out must be a new folder, or one .* differ: {re.escape(key)}.*remove it. See docs/faq.md$",
            ):
                predict_here(other, tmp_path / name, **options)
        assert written(tmp_path / name) == before


def test_where_nothing_could_be_read_the_next_attempt_reads_the_pages_again(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(source / "models", tmp_path / "models")
    shutil.copytree(source / "pages", tmp_path / "pages")
    scans = sorted((tmp_path / "pages" / "train_images").iterdir())
    whole = [scan.read_bytes() for scan in scans]
    for scan, data in zip(scans, whole, strict=True):
        scan.write_bytes(bytes(len(data)))
    with pytest.raises(InputError, match="at least one box must be readable"):
        predict_here(tmp_path, tmp_path / "to")
    for scan, data in zip(scans, whole, strict=True):
        scan.write_bytes(data)
    assert predict_here(tmp_path, tmp_path / "to")
    assert hashes_of_predictions(tmp_path / "to") == hashes_of_predictions(undisturbed)


def test_what_was_read_on_another_kind_of_device_is_read_again_and_not_refused(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("job.predict.predict.seal", killed)
        with pytest.raises(KeyboardInterrupt):
            predict_here(source, tmp_path)
    done = finished(tmp_path)
    report = tmp_path / "read" / ".predict" / "group-00000.json"
    report.write_text(report.read_text().replace('"on_gpu":false', '"on_gpu":true'))
    assert predict_here(source, tmp_path)
    again = {name for name, inode in done.items() if (tmp_path / name).stat().st_ino != inode}
    assert {name.split("/")[1].split("-")[1] for name in again if name.startswith("read/")} == {"00000"}
    assert len(again) == 3  # two tables, a picture
    assert hashes_of_predictions(tmp_path) == hashes_of_predictions(undisturbed)


# --- what is done once


class AnyInference:
    """A classifier that computes nothing, for tests of the code around it."""

    def top(self, images: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(images), 3), np.int64), np.full((len(images), 3), 0.3, np.float32)


def one_group(source: Path, to: Path, annotate: Path | None) -> ReadGroup:
    """Return a `ReadGroup` for one group with all pages, to be called in this process."""
    pages, labels = place(source / "pages" / "train_images"), read_labels(place(source / "pages" / "train.csv"))
    groups = group_pages(labels, list_pages(pages).files_of(labels.page_ids), 1)
    if annotate:
        check_writable(unfinished_pictures(place(annotate), place(to)))
    pictures = str(annotate) if annotate else None
    work = ReadGroup("", "", str(pages), str(to), pictures, form="csv", groups=1, on_gpu=False)
    write_bytes(resumable(place(to)).plan_file, b"{}")
    write_groups(groups, resumable(place(to)).progress_folder, work.attempt)
    return work


@pytest.mark.parametrize("annotate", [False, True])
def test_each_page_is_fetched_and_decoded_once_also_with_pictures(
    annotate: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2
    import simplejpeg
    from PIL import Image

    opened: Counter[str] = Counter()
    decoded: Counter[str] = Counter()
    counts = True

    def opens(event: str, arguments: tuple[Any, ...]) -> None:
        if counts and event == "open" and isinstance(arguments[0], str | bytes):
            opened[os.fsdecode(arguments[0])] += 1

    def counting(module: Any, name: str) -> None:
        decode = getattr(module, name)

        def counted(*given: Any, **options: Any) -> Any:
            decoded[name] += 1
            return decode(*given, **options)

        monkeypatch.setattr(module, name, counted)

    for module, name in ((simplejpeg, "decode_jpeg"), (cv2, "imdecode"), (Image, "open")):
        counting(module, name)
    monkeypatch.setattr("job.predict.read_group._load", lambda *_: (AnyInference(), LABELS.split()))
    work = one_group(source, tmp_path / "out", tmp_path / "pictures" if annotate else None)
    sys.addaudithook(opens)  # stays until this process ends
    try:
        report = work(0)
    finally:
        counts = False
    scans = {str(path) for path in (source / "pages" / "train_images").iterdir()}
    assert {name: count for name, count in opened.items() if name in scans} == dict.fromkeys(scans, 1)
    assert decoded == {"decode_jpeg": len(scans)}
    assert len(report.pictures) == (len(scans) if annotate else 0)


def test_pictures_are_drawn_as_pages_are_read_and_few_pages_wait_for_theirs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.predict.read_group._load", lambda *_: (AnyInference(), LABELS.split()))
    monkeypatch.setattr("job.predict.readings.MOST_WAITING", 3)
    steps: list[str] = []
    monkeypatch.setattr("preprocessing.tries.Tries.begin", lambda _, step: steps.append(step))
    report = one_group(source, tmp_path / "out", tmp_path / "pictures")(0)
    assert len(report.pictures) == 16
    waiting = 0
    for step in steps:
        waiting += -1 if step.endswith(".jpeg") else not step.startswith("(")
        assert 0 <= waiting <= 3
    assert waiting == 0


def test_a_batch_holds_crops_of_several_pages_and_each_page_gets_its_own_predictions(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting:
        """Predicts for each crop its number, in the order in which the crops arrive."""

        seen = 0
        batches: list[int] = []  # noqa: RUF012 - of one test

        def top(self, images: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
            numbers = self.seen + np.arange(len(images))
            self.seen += len(images)
            self.batches.append(len(images))
            return np.zeros((len(images), 3), np.int64), np.repeat(numbers[:, None], 3, axis=1).astype(np.float32)

    inference = Counting()
    monkeypatch.setattr("job.predict.read_group._load", lambda *_: (inference, LABELS.split()))
    monkeypatch.setattr("job.predict.readings.BATCH", 20)
    report = one_group(source, tmp_path / "out", None)(0)
    labels = read_labels(place(source / "pages" / "train.csv"))
    assert report.read == len(labels.boxes) == sum(inference.batches)
    assert set(inference.batches[:-1]) == {20}
    table = pd.read_csv(tmp_path / "out" / report.files[0].name)
    number = {
        (labels.page_ids[page], *box): i
        for page in range(len(labels.page_ids))
        for i, box in enumerate(labels.boxes.tolist())
        if labels.starts[page] <= i < labels.starts[page + 1]
    }
    boxes = table[["image_id", "x", "y", "width", "height"]].itertuples(index=False)
    assert table["probability_1"].tolist() == [number[tuple(box)] for box in boxes]


def counting_loads(log: Path) -> Callable[..., Callable[[int], Any]]:
    """Return a replacement for `ReadGroup` that logs the process of each load of the model.

    It is a closure: for a top-level function, Ray's workers would import this file.
    """

    def make(**fields: Any) -> Callable[[int], Any]:
        read = ReadGroup(**fields)

        class Work:
            attempt = read.attempt

            def __call__(self, number: int) -> Any:
                from job.predict import read_group

                load = read_group.load_model

                def noted(folder: Any) -> Any:
                    with log.open("a") as file:
                        file.write(f"{os.getpid()}\n")
                    return load(folder)

                read_group.load_model = noted
                try:
                    return read(number)
                finally:
                    read_group.load_model = load

        return Work()

    return make


def test_the_model_is_loaded_once_a_process_and_by_no_more_processes_than_cpus(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(source / "models", tmp_path / "models")  # no process has loaded this copy
    (tmp_path / "pages").symlink_to(source / "pages")
    monkeypatch.setattr("job.predict.predict.ReadGroup", counting_loads(tmp_path / "loads"))
    assert predict_here(tmp_path, tmp_path / "to")
    loads = (tmp_path / "loads").read_text().split()
    assert len(loads) == len(set(loads)) <= CPUS
    assert hashes_of_predictions(tmp_path / "to") == hashes_of_predictions(undisturbed)

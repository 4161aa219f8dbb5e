"""docs/data.md: each of its commands reads the labels that the page states, from small files of the same names."""

import csv
import re
import shlex
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Kuzushiji
from fuzz import Row, write_form

from cluster.places import place
from job.cli import main
from preprocessing.config import PrepareConfig
from preprocessing.labels.read import read_labels
from preprocessing.labels.table import Labels
from preprocessing.pages import list_pages, size_reader
from preprocessing.plan import make_plan

SIZE = (200, 300)
CHARACTERS = "はにのか"
BOXES: list[Row] = [(ord(CHARACTERS[i % 4]), 10 + 40 * (i % 4), 20 + 90 * (i // 4), 30, 80) for i in range(12)]
PAGES = dict.fromkeys(("100241706_00004_2", "200003076_00002_1", "hnsd001-003"), BOXES)

DOCS = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
COMMANDS = [
    line.removeprefix("kuzushiji ")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", DOCS, re.M | re.S)
    if not language  # blocks marked `sh` have commands for other inputs
    for line in block.splitlines()
    if line.startswith("kuzushiji ")
]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write small files with the names that docs/data.md uses into a new folder, the current one."""
    monkeypatch.chdir(tmp_path)
    page = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0]), np.uint8)
    jpeg = cv2.imencode(".jpg", page)[1].tobytes()
    crop = cv2.imencode(".jpg", page[:80, :30])[1].tobytes()
    for folder in ("scans", "new_pages", "yolo/images"):
        (tmp_path / folder).mkdir(parents=True)
        for page_id in PAGES:
            (tmp_path / folder / f"{page_id}.jpg").write_bytes(jpeg)
    with zipfile.ZipFile("train_images.zip", "w") as archive:
        for page_id in PAGES:
            archive.writestr(f"{page_id}.jpg", jpeg)
    write_form("kaggle", PAGES, tmp_path, SIZE)
    Path("boxes.csv").write_text(re.sub(r"U\+[0-9A-F]+ ", "", Path("train.csv").read_text()))
    write_form("yolo", PAGES, tmp_path / "yolo", SIZE)
    write_form("coco", PAGES, tmp_path, SIZE).rename("instances.json")
    annotations = re.search(r'"annotations": (\[.*\])\}', Path("instances.json").read_text())
    assert annotations
    Path("detections.json").write_text(annotations[1])
    write_form("curation", PAGES, tmp_path, SIZE)
    cells = [[page_id, chr(box[0]), *box[1:]] for page_id, boxes in PAGES.items() for box in boxes]
    with open("sheet.csv", "w", newline="", encoding="cp932") as stream:
        csv.writer(stream).writerows([["Image", "Unicode", "X", "Y", "Width", "Height"], *cells])
    with open("canvases.csv", "w", newline="") as stream:
        rows = [[f"https://example.org/canvas/{page_id}", f"{page_id}.jpg"] for page_id in PAGES]
        csv.writer(stream).writerows([["canvas", "file"], *rows])
    for page_id, boxes in PAGES.items():
        book = re.split("[_-]", page_id)[0]
        folder = tmp_path / "codh" / book
        (folder / "images").mkdir(parents=True)
        (folder / "images" / f"{page_id}.jpg").write_bytes(jpeg)
        write_form("codh", {page_id: boxes}, folder, SIZE).rename(folder / f"{book}_coordinate.csv")
        if book.isdigit():
            Path(f"{book}_coordinate.csv").write_bytes((folder / f"{book}_coordinate.csv").read_bytes())
        for code, x, y, _, _ in boxes:
            path = tmp_path / "characters" / f"U+{code:04X}" / f"U+{code:04X}_{page_id}_X{x:04}_Y{y:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(crop)
        (folder / "characters" / "U+306F").mkdir(parents=True)
        (folder / "characters" / "U+306F" / f"U+306F_{page_id}_X0001_Y0001.jpg").write_bytes(crop)
    return tmp_path


def labels_of(command: str) -> tuple[Labels, set[str]]:
    """Return the labels that a command reads, and the pages that have a file."""
    name, *arguments = shlex.split(command)
    given = main.commands[name].make_context(name, arguments).params
    canvases = place(given["canvases"]) if given["canvases"] else None
    if name == "prepare":
        pages = place(given["crops"] or given["pages"])
        places = None if given["crops"] else [place(text) for text in given["labels"]]
        plan = make_plan(pages, places, PrepareConfig(split=given["split"], coverage=1), canvases)
        with_file = [page.id for group in plan.groups for page in group.pages if page.file_name]
        return plan.labels, set(with_file)
    pages, places = place(given["pages"]), [place(text) for text in given["boxes"]]
    listing = list_pages(pages)
    with size_reader(pages, lambda: listing) as size_of:
        labels = read_labels(places, "--boxes", True, size_of, canvases)
    return labels, set(listing.files_of(labels.page_ids))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_docs_reads_its_labels(command: str, inputs: Path) -> None:
    labels, pages = labels_of(command)
    books = 2 if "coordinate.csv" in command else 3
    assert len(labels.boxes) == books * len(BOXES)
    assert set(labels.page_ids) <= pages
    if "--crops" not in command:
        assert labels.boxes[: len(BOXES)].tolist() == [list(row[1:]) for row in BOXES]
        characters = [row[0] for row in BOXES] if "boxes.csv" not in command else [-1] * len(BOXES)
        assert labels.code_points[: len(BOXES)].tolist() == characters


@pytest.mark.parametrize("form", ["--crops characters", "--labels instances.json"])
def test_commands_of_the_docs_make_datasets(form: str, inputs: Path, ray_here: None, kuzushiji: Kuzushiji) -> None:
    (command,) = [text for text in COMMANDS if form in text and text.startswith("prepare")]
    done = kuzushiji(*shlex.split(command))
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("36 crops in ")
    assert "0 boxes lost, 0 clipped" in done.stdout


def test_the_docs_have_a_command_for_each_form() -> None:
    inputs = (
        "train.csv boxes.csv codh coordinate.csv instances.json detections.json yolo curation.json canvases.csv --crops"
    )
    assert [name for name in inputs.split() if not any(name in command for command in COMMANDS)] == []

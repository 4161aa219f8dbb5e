"""README and docs: their commands and programs run, one page after the other, on small data of the same names.

The blocks without a language in docs/data.md run in `test_data_docs.py`, what needs a cluster in `test_cloud.py`. Not
run: `gcloud`, `docker`, the long targets of make, and TensorFlow Datasets, which is not installed.
"""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Kuzushiji
from PIL import Image
from test_docs import CODE, ROOT, commands

from preprocessing.books import book_of
from preprocessing.fonts import packaged_font

SMALLER = {
    "--num-pages 240": "--num-pages 12 --scale 0.2",
    "--num-pages 40 --layouts": "--num-pages 4 --layouts",
    "--out trial --num-pages 40": "--out trial --num-pages 12 --scale 0.2",
    "--folds 5": "--folds 3",
    "--epochs 20": "--epochs 1",
    "--val-fraction 0.02 --test-fraction 0.02": "--val-fraction 0.1 --test-fraction 0.1",
    " --gpus-per-worker 1": "",
}
NOT_HERE = ("gs://", "ray_cluster.yaml", "submit", "--architecture fcn")  # a cluster, or minutes per step without a GPU


def pages_by_book(pages: Path) -> None:
    """Make `pages/`, with a folder per book and a drawn page, and the files of `--train-only`, as in docs/data.md."""
    for scan in sorted((pages / "train_images").iterdir()):
        folder = Path("pages") / book_of(scan.stem)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(scan, folder)
    Path("pages/drawn").mkdir()
    Path("drawn").mkdir()
    labels = pd.read_csv(pages / "train.csv", keep_default_na=False)
    labels[:1].assign(image_id="359047271_00012_1").to_csv("drawn/train.csv", index=False)
    shutil.copy(pages / "train_images" / f"{labels['image_id'][0]}.jpg", "pages/drawn/359047271_00012_1.jpg")
    Path("train-only.txt").write_text("drawn\n")


def labels_of_half_the_size(sheet: list[list[str]]) -> None:
    """Write `labels.json` in COCO's form, with boxes that were made on scans of half the size."""
    pages = sorted({row[0] for row in sheet})
    images = []
    for number, page in enumerate(pages):
        with Image.open(f"scans/{page}.jpg") as scan:
            images.append(
                {"id": number, "file_name": f"{page}.jpg", "width": scan.width // 2, "height": scan.height // 2}
            )
    kinds = sorted({row[1] for row in sheet})
    annotations = [
        {
            "image_id": pages.index(page),
            "category_id": kinds.index(kind),
            "bbox": [int(number) / 2 for number in box],
        }
        for page, kind, *box in sheet
    ]
    categories = [{"id": number, "name": kind} for number, kind in enumerate(kinds)]
    Path("labels.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))


@pytest.fixture
def inputs(pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the inputs that the docs name into a new folder, the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.make_archive("train_images", "zip", pages / "train_images")
    for name in ("scans", "new_pages"):
        shutil.copytree(pages / "train_images", name)
    for name in ("train.csv", "boxes.csv", "labels.csv"):
        shutil.copy(pages / "train.csv", name)
    sheet = []
    for page_id, labels in pd.read_csv("train.csv", keep_default_na=False).itertuples(index=False):
        fields = labels.split()
        sheet += [[page_id, *fields[at : at + 5]] for at in range(0, len(fields), 5)]
    with open("sheet.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["Image", "Unicode", "X", "Y", "Width", "Height"], *sheet])
    labels_of_half_the_size(sheet)
    ids = sorted({row[0] for row in sheet})
    with open("books.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["prefix", "book"], *([page, f"book {at % 4}"] for at, page in enumerate(ids))])
    pages_by_book(pages)
    np.save("crop.npy", np.zeros((80, 80, 1), np.uint8))
    Path("fonts").mkdir()
    shutil.copy(packaged_font().path, "fonts")


def to_run(name: str) -> Iterator[str]:
    """Yield the commands of a page that can run here, made smaller."""
    languages = ("sh",) if name == "docs/data.md" else ("", "sh")
    for command in commands((ROOT / name).read_text(), languages):
        if any(word in command for word in NOT_HERE):
            continue
        for large, small in SMALLER.items():
            command = command.replace(large, small)
        if command.startswith("kuzushiji train ") and "--epochs" not in command:
            command += " --epochs 1"  # instead of the recipe's
        yield command


@pytest.mark.long
def test_the_commands_and_programs_of_the_docs_run_on_small_data(
    ray_here: None, kuzushiji: Kuzushiji, inputs: None
) -> None:
    train = shlex.split("train --dataset crops --models models --architecture resnet --run first --epochs 1")
    for name in ("README.md", "docs/data.md", "docs/models.md", "docs/faq.md", "docs/formats.md"):
        if name == "docs/formats.md":  # a report is of models that were trained on its dataset
            shutil.rmtree("models")
            assert kuzushiji(*train).code == 0
        for command in to_run(name):
            made = re.match(r"kuzushiji (?:prepare|sample|predict) .*(?:--dataset|--out) (\S+)", command)
            if made:  # an earlier section may have made it
                shutil.rmtree(made[1], ignore_errors=True)
            if "new-crops" in command:
                shutil.copytree("real-crops", "new-crops")
            done = kuzushiji(*shlex.split(command)[1:])
            assert done.code == 0, (name, command, done.stderr)
        for _, language, program in CODE.findall((ROOT / name).read_text()):
            if language == "python" and "tensorflow_datasets" not in program:
                subprocess.run([sys.executable, "-c", program, "here/resnet/first", "crop.npy"], check=True)

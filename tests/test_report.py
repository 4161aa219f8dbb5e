"""Reports: one self-contained file that shows what a dataset or a models folder contains."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, look_at
from conftest import Kuzushiji, reseal

from cluster.errors import DamageError, OptionError
from cluster.manifest import read_manifest
from cluster.places import place
from job.data.staging import staged
from job.report.dataset import dataset_report, write_dataset_report
from job.report.html import page, paragraph
from job.report.models import model_report
from job.report.pictures import pairs
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest


class Page(HTMLParser):
    """The addresses and the text of an HTML page. Asserts that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


@pytest.fixture(scope="module")
def of_real(real_dataset: Path) -> str:
    return dataset_report(place(real_dataset)).decode()


def test_a_report_loads_no_other_file(of_real: str) -> None:
    addresses = Page(of_real).addresses
    assert {urlparse(address).scheme for address in addresses if not address.startswith("#")} == {"data"}
    assert set(re.findall(r"url\(\"?(data:|#|.)", of_real)) <= {"data:", "#"}
    assert "<script" not in of_real


def test_plot_texts_are_not_parsed_as_formulas(of_real: str, of_two: str) -> None:
    drawn = re.findall(r"<!-- (.*?) -->", of_real + of_two)  # each text that was drawn as shapes
    assert {"1", "10", "100%", "accuracy"} <= set(drawn)
    assert not [text for text in drawn if "$" in text or "\\" in text]


def test_a_dataset_report_has_the_numbers_of_the_manifest(of_real: str, real_dataset: Path) -> None:
    counts = read_manifest(place(real_dataset), DatasetManifest).counts
    text = Page(of_real).text
    for split, of_split in counts.items():
        assert f"{split}\n{of_split['examples']}\n{of_split['pages']}\n{of_split['books']}\n" in text
    assert "0 boxes lost, 0 clipped" in text
    classes = len((real_dataset / "label.labels.txt").read_text().splitlines()) - 1
    assert f"{classes} have a class of their own" in text
    with staged(place(real_dataset), SPLITS) as data:
        labels = np.concatenate([crops.labels for crops in data.splits.values()])
    rare, share = (labels == classes).sum(), 100 * (labels == classes).mean()
    assert f"of the class rare: {rare:,} crops, {share:.0f} %." in text


def test_a_report_shows_the_leakage_of_a_random_split(of_real: str, real_dataset: Path) -> None:
    held = read_manifest(place(real_dataset), DatasetManifest).counts["test"]["examples"]
    assert f"test\n{held}\n1.0000\n{held}\n1.0000\n" in Page(of_real).text


def test_a_character_that_the_font_lacks_is_told_by_its_code_point() -> None:
    html = page("Models", [paragraph("は \U0001f600")]).decode()
    assert "は U+1F600" in html
    assert "\U0001f600" not in html


def test_the_same_dataset_gives_the_same_report(of_real: str, real_dataset: Path) -> None:
    assert dataset_report(place(real_dataset)).decode() == of_real


@pytest.fixture(scope="module")
def two(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one model under two architectures."""
    models = tmp_path_factory.mktemp("two")
    for name in ("baseline", "fcn"):
        shutil.copytree(trained.parent, models / name)
    return models


@pytest.fixture(scope="module")
def of_two(two: Path, few: Path) -> str:
    return model_report(place(two), place(few)).decode()


def test_a_model_report_has_the_metrics_and_the_studys_figures(of_two: str, trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    text = Page(of_two).text
    accuracy, f1 = (f"{metrics['test'][key]:.4f}" for key in ("accuracy", "macro_f1"))
    assert f"baseline\n{accuracy}\n{f1}\n0.9500\n0.9200\n{metrics['parameters']:,}\n" in text
    assert f"fcn\n{accuracy}\n{f1}\n0.6500\n0.3800\n" in text
    for split in ("train", "validation", "test"):
        assert f"{split}\n{metrics[split]['examples']}\n{metrics[split]['accuracy']:.4f}\n" in text


def test_what_a_model_gets_wrong_is_listed_as_evaluate_does_and_shown_in_pairs(
    of_two: str, trained: Path, few: Path
) -> None:
    from job.evaluate import evaluate

    found = evaluate(place(trained), place(few), "test")
    text = Page(of_two).text
    assert found.confusions
    assert all(line in text for line in found.confusions)
    assert "augmented crops" in text
    worst = found.misclassified.groupby(["label", "predicted"]).size().max()
    assert f"({worst})" in text


def test_misclassified_crops_that_are_not_of_the_dataset_are_damage(few: Path) -> None:
    with staged(place(few), ("train", "test")) as data:
        page_id, (x, y, width, height) = next(data.splits["test"].page_ids()), data.splits["test"].boxes[0].tolist()
        box = {"x": x, "y": y, "width": width, "height": height}
        for odd in ({"image_id": "nobody"}, {"predicted": "U+1F600"}, {"x": -1}):
            row = {"image_id": page_id, **box, "label": "rare", "predicted": "rare"} | odd
            with pytest.raises(DamageError, match="must be of the dataset that it was trained on"):
                list(pairs(pd.DataFrame([row]), data))


def test_a_report_of_models_needs_no_dataset(two: Path, of_two: str) -> None:
    alone = model_report(place(two)).decode()
    assert "<img" not in alone
    assert set(re.findall(r"<h2>(.*?)</h2>", alone)) < set(re.findall(r"<h2>(.*?)</h2>", of_two))


def test_a_model_that_was_changed_and_a_dataset_that_it_was_not_trained_on_are_refused(
    two: Path, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="must be the one that the models were trained on"):
        model_report(place(two), place(dataset))
    shutil.copytree(two, tmp_path / "models")
    with (tmp_path / "models" / "fcn" / "first" / "per_class.csv").open("a") as table:
        table.write("\n")
    with pytest.raises(DamageError, match=r"per_class.csv, whose SHA-256 is not the manifest's"):
        model_report(place(tmp_path / "models"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", b"{}"),
        ("metrics.json", b"[" * 100_000),
        ("history.jsonl", b'{"epoch": 1}'),
        ("per_class.csv", b"label,examples\n"),
        ("misclassified.csv", b"image_id,x,y,width,height,label,predicted\n1,1,1,1,1,nobody,rare\n"),
        ("misclassified.csv", b"image_id,x,y,width,height,label,predicted\n1,1,1,1,1,U+4E00,rare\n"),
        ("misclassified.csv", b"image_id,x,y,width,height,label,predicted\n1,%d,1,1,1,rare,rare\n" % 10**20),
    ],
)
def test_a_model_folder_that_others_sealed_with_other_content_is_refused_in_one_line(
    trained: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = tmp_path / "baseline" / trained.name
    shutil.copytree(trained.parent, folder.parent)
    reseal(folder, name, content)
    with pytest.raises(DamageError, match="must not change after it was sealed"):
        model_report(place(tmp_path))


@pytest.mark.parametrize("value", ["1e400", "1" + 400 * "0", '"many"'])
@pytest.mark.parametrize("key", ["parameters", "accuracy"])
def test_what_is_no_finite_number_in_the_metrics_of_a_model_is_refused_in_one_line(
    key: str, value: str, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained.parent, tmp_path / "baseline")
    text = (trained / "metrics.json").read_text()
    changed = re.sub(rf'"{key}": [0-9.e-]+', f'"{key}": {value}', text)
    assert changed != text
    reseal(tmp_path / "baseline" / trained.name, "metrics.json", changed.encode())
    with pytest.raises(DamageError, match="must not change after it was sealed. Received: [^\n]*$"):
        model_report(place(tmp_path))


def test_a_model_folder_of_an_earlier_release_is_verified_evaluated_exported_and_reported(
    trained: Path, few: Path, tmp_path: Path, kuzushiji: Kuzushiji
) -> None:
    """It lacks the options that were added later, the temperature and the calibration metrics."""
    folder = tmp_path / "models" / "baseline" / trained.name
    shutil.copytree(trained.parent, folder.parent)
    config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    later = {"margin", "license", "schedule", "augment", "weight_decay", "label_smoothing"}
    old = {name: value for name, value in config.items() if name not in later}
    for numbers in (metrics[split] for split in ("train", "validation", "test")):
        for name in ("ece", "at_99", "errors_by_share"):
            del numbers[name]
    del metrics["temperature"]
    reseal(folder, "config.json", json.dumps(old).encode())
    reseal(folder, "metrics.json", json.dumps(metrics).encode())
    for command in (
        ("verify", folder),
        ("evaluate", "--model", folder, "--dataset", few),
        ("export", "--model", folder, "--format", "savedmodel", "--out", tmp_path / "out"),
    ):
        done = kuzushiji(*command)
        assert done.code == 0, done.stderr
    text = Page(model_report(place(tmp_path / "models"), place(few)).decode()).text
    assert f"test\n{metrics['test']['examples']}\n{metrics['test']['accuracy']:.4f}\n" in text


@pytest.mark.skipif(not CHROMIUM, reason="need Chromium (apt install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["dataset", "models"])
def test_a_browser_shows_all_of_a_report_and_has_no_complaint(
    of_real: str, of_two: str, tmp_path: Path, kind: str, width: int
) -> None:
    (tmp_path / "report.html").write_text(of_real if kind == "dataset" else of_two)
    seen = look_at(tmp_path / "report.html", width, dark=width < 600)
    assert (seen.complaints, seen.too_wide, seen.broken) == ([], 0, 0)
    assert seen.pictures >= 48


def test_the_command_writes_the_report_and_prints_only_its_path(
    dataset: Path, few: Path, two: Path, kuzushiji: Kuzushiji, tmp_path: Path
) -> None:
    asked = ["report", "--dataset", dataset, "--out", tmp_path / "out"]
    for options in (asked, ["report", "--models", two, "--dataset", few, "--out", tmp_path / "out"]):
        done = kuzushiji(*options)
        assert (done.code, done.stdout, done.stderr) == (0, f"report: {tmp_path / 'out' / 'report.html'}\n", "")
        Page((tmp_path / "out" / "report.html").read_text())
    refused = kuzushiji(*asked[:-1], dataset)
    assert refused.code == 2
    assert "--out must not be a finished dataset or model folder" in refused.stderr


def test_a_very_large_dataset_and_a_whole_bucket_are_not_staged_for_a_report(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(place(dataset), DatasetManifest)
    warnings = ["no report was written next to the dataset: run `kuzushiji report`"]
    assert write_dataset_report(place("gs://bucket"), manifest, new=True) == warnings
    monkeypatch.setattr("job.report.dataset.MAX_STAGED_BYTES", sum(shard.bytes for shard in manifest.shards) - 1)
    assert write_dataset_report(place(tmp_path / "crops"), manifest, new=True) == warnings
    assert write_dataset_report(place(tmp_path / "crops"), manifest, new=False) == []
    assert list(tmp_path.iterdir()) == []


def test_prepare_writes_the_report_beside_the_dataset_and_makes_one_that_is_missing(
    pages: Path, ray_here: None, kuzushiji: Kuzushiji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "crops.report.html"
    asked = ["prepare", "--pages", pages / "train_images", "--labels", pages / "train.csv", "--dataset", "crops"]
    assert kuzushiji(*asked).stdout.splitlines()[-1] == f"report: {target}"
    first = target.read_bytes()
    Page(first.decode())
    assert kuzushiji(*asked).stdout == "crops is complete and valid: nothing written\n"
    target.unlink()
    assert kuzushiji(*asked).stdout.splitlines()[-1] == f"report: {target}"
    assert target.read_bytes() == first
    target.unlink()
    target.mkdir()
    again = kuzushiji(*asked)
    assert again.code == 0
    assert "report: " not in again.stdout
    assert f"{target} could not be written: " in again.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"crops", target.name}

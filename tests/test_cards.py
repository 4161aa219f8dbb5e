"""The cards of datasets, models and exports: what hubs read from them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Kuzushiji, reseal
from huggingface_hub import DatasetCard, ModelCard

from cluster.errors import DamageError
from cluster.places import place
from cluster.storage import sha256_of
from job.model.folder import read_trained_on
from preprocessing.config import PrepareConfig
from preprocessing.dataset import DatasetManifest
from preprocessing.prepare import prepare


def test_a_hub_reads_the_card_of_a_dataset(ray_here: None, pages: Path, tmp_path: Path) -> None:
    source = place(pages / "train_images"), place(pages / "train.csv")
    manifest, _ = prepare(*source, place(tmp_path / "crops"), PrepareConfig(coverage=0.5, license="CC0-1.0"))
    card = DatasetCard.load(tmp_path / "crops" / "README.md")
    assert card.data.license == "cc0-1.0"
    assert card.data.language == ["ja"]
    assert card.data.task_categories == ["image-classification"]
    assert 1_000 < sum(split["examples"] for split in manifest.counts.values()) < 10_000
    assert card.data.size_categories == ["1K<n<10K"]
    assert card.text.strip().startswith("# Kuzushiji crops\n")
    assert "that they were cut from: cc0-1.0, as `--license` says." in card.text


def test_a_hub_reads_the_card_of_a_model(trained: Path, few: Path) -> None:
    card, test = ModelCard.load(trained / "README.md"), json.loads((trained / "metrics.json").read_text())["test"]
    assert card.data.license == "unknown"  # `--license` was not given
    assert card.data.language == ["ja"]
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "keras"
    results = card.data.eval_results
    assert [(result.metric_type, result.metric_value) for result in results] == [
        ("accuracy", test["accuracy"]),
        ("f1", test["macro_f1"]),
    ]
    assert {result.dataset_revision for result in results} == {sha256_of(place(few / "manifest.json"))}
    assert {result.dataset_name for result in results} == {"Kuzushiji crops, split by random"}
    assert card.text.strip().startswith("# baseline, run first\n")


def test_models_and_exports_state_the_licence_of_their_pages(trained: Path, few: Path) -> None:
    from job.config import TrainConfig
    from job.data.staging import staged
    from job.export.card import export_card
    from job.metrics import misclassified
    from job.model.folder import TrainedOn, load_model
    from job.train.checkpoint import EpochRow
    from job.train.evaluation import Predicted
    from job.train.result import folder_texts

    manifest = DatasetManifest.model_validate_json((few / "manifest.json").read_bytes())
    with_license = manifest.model_copy(update={"config": manifest.config | {"license": "cc-by-4.0"}})
    assert (manifest.license, with_license.license) == (None, "cc-by-4.0")
    fields = set(TrainConfig.model_fields)
    given = {key: value for key, value in json.loads((trained / "config.json").read_text()).items() if key in fields}
    row = EpochRow(**json.loads((trained / "history.jsonl").read_text().splitlines()[0]))
    with staged(place(few), ["train", "validation", "test"]) as data:
        predictions = {
            split: Predicted(np.zeros((len(crops), 4), np.float32), crops.labels)
            for split, crops in data.splits.items()
        }
        table = misclassified(predictions["test"].predictions, data.splits["test"], data.class_names)
        licensed = replace(data, manifest=with_license)
        model, *_ = load_model(place(trained))
        texts = folder_texts(TrainConfig(**given), "first", model, predictions, table, licensed, [row], 1, 1.0)
    assert json.loads(texts["config.json"])["license"] == "cc-by-4.0"
    export = export_card(place(trained), TrainedOn(0.0, "cc-by-4.0"), "onnx", "none", None, (None, 80, 80, 1), 6)
    for card in (ModelCard(texts["README.md"]), ModelCard(export)):
        assert card.data.license == "cc-by-4.0"
        assert "- Licence of the pages that it was trained on: cc-by-4.0.\n" in card.text


def test_a_card_tells_that_a_temperature_is_at_its_limit(trained: Path, few: Path) -> None:
    from job.train.card import TEMPERATURES, model_card
    from job.train.temperature import SCALES

    assert tuple(1 / SCALES[[-1, 0]]) == pytest.approx(TEMPERATURES)
    manifest = DatasetManifest.model_validate_json((few / "manifest.json").read_bytes())
    config, metrics = (json.loads((trained / name).read_text()) for name in ("config.json", "metrics.json"))
    cards = [model_card(config, metrics | {"temperature": value}, "first", manifest) for value in (1.5, *TEMPERATURES)]
    assert ["a limit of the range" in card for card in cards] == [False, True, True]


@pytest.mark.parametrize("wrong", ["CC BY-SA 4.0", "a\nb", "x" * 51])
def test_a_licence_is_an_identifier(wrong: str, kuzushiji: Kuzushiji, tmp_path: Path) -> None:
    done = kuzushiji(
        "prepare", "--pages", tmp_path, "--labels", tmp_path, "--dataset", tmp_path / "out", "--license", wrong
    )
    assert done.code == 2
    assert (
        "--license must be an identifier of letters, digits, '.' and '-', such as cc-by-sa-4.0. Received:"
        in done.stderr
    )


def test_a_malformed_licence_in_a_dataset_or_model_is_damage(few: Path, trained: Path, tmp_path: Path) -> None:
    manifest = json.loads((few / "manifest.json").read_text())
    manifest["config"]["license"] = "a\n---\nlanguage: none"
    with pytest.raises(ValueError, match="the licence must be an identifier"):
        DatasetManifest.model_validate(manifest)
    shutil.copytree(trained, tmp_path / "first")
    config = json.loads((trained / "config.json").read_text())
    reseal(tmp_path / "first", "config.json", json.dumps(config | {"license": ["x"]}).encode())
    with pytest.raises(DamageError, match=r"the licence must be an identifier. Received: \['x'\]"):
        read_trained_on(place(tmp_path / "first"))

"""Calibration: the metrics of how sure a model is, and the temperature that a training fits."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from job.metrics import confusions, metrics

NAMES = ["U+3042", "U+3044", "U+3046", "rare"]


def of(probabilities: list[float], correct: list[bool]) -> Any:
    """Return the metrics of crops for which the first class was predicted with these probabilities."""
    predictions = np.zeros((len(correct), 4), np.float32)
    predictions[:, 1] = probabilities
    return metrics(predictions, np.where(correct, 0, 1), NAMES)


def test_ece_is_the_mean_gap_of_probability_and_accuracy_in_bins_of_equally_many_crops() -> None:
    sure = of([0.9] * 1500, [True] * 1500)
    assert sure.ece == pytest.approx(0.1, abs=1e-6)
    # Two thirds of the crops have probability 0.5, half of them right; a third have 1, none right: gaps of 0 and 1.
    mixed = of([0.5] * 1000 + [1.0] * 500, [True, False] * 500 + [False] * 500)
    assert mixed.ece == pytest.approx(1 / 3, abs=1e-2)
    assert of([0.25], [True]).ece == pytest.approx(0.75)


def test_at_99_and_errors_by_share_rank_crops_by_certainty() -> None:
    # The 400 most certain crops are right, then every second one.
    probabilities = np.linspace(1, 0.1, 1000).tolist()
    found = of(probabilities, [True] * 400 + [False, True] * 300)
    assert found.at_99 == pytest.approx(0.408, abs=2e-3)  # 404 right of 408 are 99 %
    assert found.errors_by_share[7] == 0  # 40 %
    assert found.errors_by_share[-1] == pytest.approx(0.3)
    assert len(found.errors_by_share) == 20
    backwards = of(probabilities[::-1], ([True] * 400 + [False, True] * 300)[::-1])
    assert backwards.at_99 == found.at_99
    assert of([0.9, 0.8], [False, False]).at_99 == 0
    # Crops of the same probability have no order.
    saturated = [of([1.0] * 100, right) for right in ([True] * 60 + [False] * 40, [False] * 40 + [True] * 60)]
    assert saturated[0] == saturated[1]
    assert saturated[0].errors_by_share == pytest.approx([0.4] * 20)
    assert saturated[0].at_99 == 0


@pytest.mark.parametrize("crops", [1, 2, 19, 21])
def test_all_metrics_exist_for_few_crops(crops: int) -> None:
    found = of(np.linspace(0.2, 0.9, crops).tolist(), [True] * crops)
    assert found.at_99 == 1
    assert found.errors_by_share == (0.0,) * 20
    assert 0 < found.ece < 1


def test_the_temperature_is_the_one_of_the_least_cross_entropy() -> None:
    from job.train.temperature import SCALES, best_scale

    logits = np.random.default_rng(0).normal(0, 3, (20_000, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([np.random.default_rng(i).choice(5, p=p) for i, p in enumerate(probabilities)])
    for factor in (0.5, 1.0, 2.5):  # a model that is less or more sure than it should be
        wrong = factor * logits
        losses = np.array(
            [
                np.mean(np.log(np.exp(scale * wrong).sum(axis=1)) - scale * wrong[np.arange(len(labels)), labels])
                for scale in SCALES
            ]
        )
        assert best_scale(losses) * factor == pytest.approx(1, rel=0.05)
    rising = np.arange(65.0)
    assert best_scale(rising) == SCALES[0]
    assert best_scale(rising[::-1].copy()) == SCALES[-1]
    assert best_scale(np.array([2.0] * 30 + [0.0] * 35)) == SCALES[-1]  # all crops right: the loss rounds to 0


def test_a_line_of_confusions_has_at_most_60_predictions() -> None:
    classes = pd.DataFrame({"label": ["U+304B", "rare"], "examples": [70, 9]})
    wrong = pd.DataFrame({"label": ["U+304B"] * 63 + ["rare"] * 2, "predicted": ["rare"] * 63 + ["U+304B"] * 2})
    assert confusions(wrong, classes) == [f"か (70): {' '.join('〓' * 60)} ... and 3 more", "〓 (9): か か"]


@pytest.mark.parametrize("architecture", ["resnet", "fcn", "baseline"])
def test_a_scale_of_the_logits_changes_probabilities_and_no_prediction(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    from job.model import architectures
    from job.train.temperature import SCALES, losses_of, scale_logits

    monkeypatch.setattr(architectures, "FCN_FILTERS", (8, 8))
    monkeypatch.setattr(architectures, "BASELINE_HEAD", (20, 10))
    keras.utils.set_random_seed(1)
    model = architectures.ARCHITECTURES[architecture](7)
    images = np.random.default_rng(0).integers(0, 256, (6, 80, 80, 1), dtype=np.uint8)
    labels = np.arange(6)
    before = np.asarray(model(images, training=False))
    losses = losses_of(model, images, labels).numpy()
    scale_logits(model, float(SCALES[40]))
    after = np.asarray(model(images, training=False))
    scaled = before ** SCALES[40]
    assert after == pytest.approx(scaled / scaled.sum(axis=1, keepdims=True), abs=1e-5)
    assert (after.argmax(axis=1) == before.argmax(axis=1)).all()
    assert losses[32] == pytest.approx(-np.log(before[np.arange(6), labels]).sum(), rel=1e-4)
    assert losses[40] == pytest.approx(-np.log(after[np.arange(6), labels]).sum(), rel=1e-4)

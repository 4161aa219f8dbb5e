"""The numbers of `make recognition`: what its tables say is what its rows say."""

import numpy as np
import pandas as pd
import pytest
from benchmarks.recognition import RECIPES, calibration_error, error_ratio, parts


def test_the_calibration_error_is_the_mean_gap_of_confidence_and_accuracy() -> None:
    sure, unsure = np.full(10, 0.9, np.float32), np.full(10, 0.5, np.float32)
    right = np.arange(10) < 9
    assert calibration_error(sure, right) == pytest.approx(0, abs=1e-6)
    assert calibration_error(sure, ~right) == pytest.approx(0.8, abs=1e-6)
    both = calibration_error(np.concatenate([sure, unsure]), np.concatenate([right, right]))
    assert both == pytest.approx(0.2, abs=1e-6)


def test_errors_are_compared_on_the_same_pages_folds_and_seeds() -> None:
    theirs, *_, ours = RECIPES
    of_all = {"study": "books", "crops": 100}
    rows = [
        of_all
        | {"recipe": recipe, "fold": fold, "seed": seed, "book": f"b{page % 2}", "page": page, "correct": correct}
        for recipe, fold, seed, correct in [(theirs, 0, 1, 60), (ours, 0, 1, 80), (ours, 0, 2, 0), (ours, 1, 1, 0)]
        for page in range(6)
    ]
    assert error_ratio(pd.DataFrame(rows), ours) == "0.50 (0.50 to 0.50)"
    assert error_ratio(pd.DataFrame(rows), theirs) == "1.00 (1.00 to 1.00)"


def test_no_part_is_tested_on_the_fold_on_which_recipes_were_chosen() -> None:
    folds = {part.fold for part in parts() if part.study == "books"}
    assert folds == {0, 1, 2}
    assert len({part.name for part in parts()}) == len(list(parts()))

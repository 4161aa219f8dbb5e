"""The numbers of `make recognition`: what its tables say is what its rows say."""

import pandas as pd
from benchmarks.recognition import CHOSEN_ON, RECIPES, error_ratio, parts
from benchmarks.recognition_data import FOLDS


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
    assert folds == {*range(FOLDS)} - {CHOSEN_ON}
    assert len(set(parts())) == len(list(parts()))

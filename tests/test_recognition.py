"""The tables of `make recognition` agree with the rows that it measured."""

import pandas as pd
from benchmarks.recognition import CHOSEN_ON, RECIPES, error_ratio, parts, time_ratio
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


def test_times_are_compared_from_the_first_epoch_of_real_pages() -> None:
    def epochs(recipe: str, accuracies: list[float], study: str) -> list[dict[str, object]]:
        of_all = {"study": study, "recipe": recipe, "fold": 0, "seed": 1}
        return [
            of_all | {"epoch": epoch, "seconds": 10 * epoch, "val_accuracy": accuracy}
            for epoch, accuracy in enumerate(accuracies, 1)
        ]

    theirs, ours = "baseline, the study's", "resnet, ours"
    rows = [*epochs(theirs, [0.1, 0.3, 0.2], "books"), *epochs(ours, [0.9, 0.2, 0.3], "books")]
    assert time_ratio(pd.DataFrame(rows), ours) == "1.50"
    assert time_ratio(pd.DataFrame(rows), theirs) == "1.00"
    assert time_ratio(pd.DataFrame(rows[:5]), ours) == "inf"
    assert time_ratio(pd.DataFrame(rows[3:]), ours) == ""
    alone = [*epochs(theirs, [0.1, 0.3], "hands"), *epochs(ours, [0.4, 0.2], "hands")]
    assert time_ratio(pd.DataFrame(alone), ours) == "0.50"


def test_no_part_is_tested_on_the_fold_on_which_recipes_were_chosen() -> None:
    folds = {part.fold for part in parts() if part.study == "books"}
    assert folds == {*range(FOLDS)} - {CHOSEN_ON}
    assert len(set(parts())) == len(list(parts()))

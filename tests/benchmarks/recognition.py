"""How well each recipe reads books, hands and crops that it was not trained on: `make recognition`.

A part is one training and its test. Parts that already have rows in docs/recognition/ are skipped, so you can stop the
command and run it again. At the end, docs/recognition/tables.md is computed from the rows.
"""

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from benchmarks.recognition_data import FOLDS, Data, Part, crops_of, run

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "docs" / "recognition"


@dataclass(frozen=True)
class Recipe:
    options: str
    """Of all its trainings."""
    alone: str
    """More options of a training that is the only one."""
    drawn_then_real: tuple[str, str] | None = None
    """More options of a training on the drawn pages of `books`, and of the next one, on the real pages. None: one
    training on both.
    """
    margin: float = 0.0
    """`prepare --margin`, for all that it is trained and tested on."""

    @property
    def architecture(self) -> str:
        return self.options.split()[1]


RECIPES = {
    "baseline, the study's": Recipe("--architecture baseline --global-batch-size 512", "--learning-rate 1e-4"),
    "resnet, ours": Recipe(
        "--architecture resnet --global-batch-size 32 --weight-decay 0.5",
        "--learning-rate 3e-3",
        ("--learning-rate 3e-3 --sampling balanced", "--learning-rate 2e-3"),
        margin=0.1,
    ),
    "baseline, ours": Recipe(
        "--architecture baseline --global-batch-size 32 --schedule cosine --augment standard --weight-decay 0.05",
        "--learning-rate 5e-4",
        ("--learning-rate 5e-4", "--learning-rate 3e-4"),
        margin=0.1,
    ),
}
BOTH = 2  # epochs over drawn and real crops, about 104,000 in all; recipes with two trainings see as many
ALONE = 8  # epochs in the other studies
SHOWN = {
    "accuracy": "accuracy", "without_rare": "without rare", "top5": "top 5", "macro_f1": "macro F1", "ece": "ECE",
    "at_99": "at 99 %",
}  # fmt: skip
STUDIED = ["baseline, the study's", "resnet, ours"]  # the two main recipes
SEEDS = (42, 43, 44)  # the first for all recipes, the others for the two main ones
CHOSEN_ON = 3  # the fold (book 200021763) on which recipes were chosen


def parts() -> Iterator[Part]:
    """Yield all parts, the most important ones first: for a seed, `baseline` with our recipe is last."""
    for seed in SEEDS:
        studies = [("books", fold) for fold in range(FOLDS) if fold != CHOSEN_ON]
        studies += [("hands", 0), ("random", 0)] if seed == SEEDS[0] else []
        groups = [STUDIED, [recipe for recipe in RECIPES if recipe not in STUDIED]] if seed == SEEDS[0] else [STUDIED]
        for recipes in groups:
            yield from (Part(study, fold, recipe, seed) for study, fold in studies for recipe in recipes)


def measure(part: Part, data: Data, models: Path) -> None:
    """Train, test, and add the rows."""
    recipe, number = RECIPES[part.recipe], list(RECIPES).index(part.recipe)
    name, first = f"{part.folder}-{number}-{part.seed}", f"drawn-{number}-{part.seed}"
    trainings = Trainings(models, recipe, part.seed)
    if part.study == "books" and recipe.drawn_then_real:
        of_drawn, of_real = recipe.drawn_then_real
        drawn, dataset, trained = data.drawn(recipe.margin), data.real_of(part, recipe.margin), data.of(part)
        epochs = round((BOTH * crops_of(trained) - crops_of(drawn)) / crops_of(dataset))
        trainings.add(first, drawn, 1, of_drawn)
        trainings.add(name, dataset, epochs, of_real, go_on_from=first)
    else:
        dataset = trained = data.of(part, recipe.margin)
        trainings.add(name, dataset, BOTH if part.study == "books" else ALONE, recipe.alone)
    history = trainings.history()
    numbers, pages = tested(models / recipe.architecture / name, dataset, trained)
    add(ROWS / "pages.csv", part, pages)
    add(ROWS / "epochs.csv", part, history.to_dict("records"))
    row = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPUs, {processor()}",
        "command": "; ".join(trainings.commands),
        "crops_per_s": history["crops_per_s"].median(),
        "seconds": history["seconds"].iloc[-1],
    }
    add(ROWS / "runs.csv", part, [row | numbers])  # last, because it marks the part as done


class Trainings:
    """One training, or two, of which the second starts from the model of the first."""

    def __init__(self, models: Path, recipe: Recipe, seed: int) -> None:
        self.models, self.recipe, self.seed = models, recipe, seed
        self.commands: list[str] = []
        self._histories: list[pd.DataFrame] = []

    def add(self, name: str, dataset: Path, epochs: int, more: str, go_on_from: str | None = None) -> None:
        """Train. more: options of this training."""
        folder = self.models / self.recipe.architecture
        options = [*self.recipe.options.split(), *more.split(), "--epochs", epochs, "--seed", self.seed]
        begin = ["--weights", folder / go_on_from] if go_on_from else []
        places = ["--dataset", dataset, "--models", self.models, "--run", name]
        run("train", *places, *options, *begin, "--workers", 1)
        shown = [f"--dataset {dataset.name}", *map(str, options), *([f"--weights {go_on_from}"] if go_on_from else [])]
        self.commands.append(f"train {' '.join(shown)}")
        self._histories.append(pd.read_json(folder / name / "history.jsonl", lines=True))

    def history(self) -> pd.DataFrame:
        """Return one row per epoch: seconds and crops since the start of the first one, and validation accuracy.

        The validation accuracy of a training on drawn pages only is that on drawn pages.
        """
        rows = pd.concat(self._histories, ignore_index=True)
        seen = (rows["crops_per_s"] * rows["seconds"]).round().cumsum().astype(int)
        columns = rows[["val_accuracy", "crops_per_s"]]
        return columns.assign(seconds=rows["seconds"].cumsum(), seen=seen, epoch=range(1, len(rows) + 1))


def processor() -> str:
    """Return the processor's name from /proc/cpuinfo, or else the machine's architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return names[1] if names else platform.machine()


def tested(folder: Path, dataset: Path, trained: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the metrics of a model on the test split, and the numbers of all and of correct crops of each page.

    trained: the dataset whose training crops are counted as the examples of a class.
    """
    from cluster.places import place
    from job.data.staging import staged
    from job.metrics import metrics, per_class
    from job.model.folder import load_model
    from job.model.inference import Inference

    model, names, _ = load_model(place(folder))
    with staged(place(trained), ["train"]) as data:
        examples = np.bincount(data.splits["train"].labels, minlength=len(names))
    with staged(place(dataset), ["test"]) as data:
        crops, books = data.splits["test"], data.books()
        predictions = Inference(model).predict(crops.images, crops.labels)
        table = per_class(predictions, crops.labels, names).assign(trained=examples).query("examples > 0")
        of_test = metrics(predictions, crops.labels, names)
        frame = pd.DataFrame({"page": list(crops.page_ids()), "correct": predictions[:, 0] == crops.labels})
        frame["not_rare"] = crops.labels != len(names) - 1
        frame["correct_not_rare"] = frame["correct"] & frame["not_rare"]
        rows = frame.assign(crops=1).groupby("page").sum().reset_index()
        rows.insert(0, "book", rows["page"].map(books))
    by_examples = pd.cut(table["trained"], [-1, 9, 99, 10**9], labels=["f1_under_10", "f1_10_to_99", "f1_from_100"])
    numbers = {
        "accuracy": of_test.accuracy, "without_rare": of_test.accuracy_without_rare, "top5": of_test.top5,
        "macro_f1": of_test.macro_f1, "ece": of_test.ece, "at_99": of_test.at_99,
        **table.groupby(by_examples, observed=False)["f1"].mean().to_dict(),
        "parameters": model.count_params(),
        "gradient_bytes": 4 * sum(int(np.prod(variable.shape)) for variable in model.trainable_variables),
    }  # fmt: skip
    return numbers, rows.to_dict("records")


def add(file: Path, part: Part, rows: Sequence[dict[str, Any]]) -> None:
    """Add the rows of a part. They replace its earlier rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = [{key: f"{v:.5g}" if isinstance(v, float) else str(v) for key, v in row.items()} for row in rows]
    new = pd.DataFrame([{key: str(value) for key, value in vars(part).items()} | row for row in texts])
    if file.exists():
        old = pd.read_csv(file, dtype=str, keep_default_na=False)
        of_part = (old[list(vars(part))] == new[list(vars(part))].iloc[0]).all(axis=1)
        new = pd.concat([old[~of_part], new])
    written = file.with_suffix(".new")
    new.to_csv(written, index=False, lineterminator="\n")
    written.rename(file)


def tables() -> str:
    """Return the tables of all rows, in Markdown."""
    runs, pages, epochs = (pd.read_csv(ROWS / f"{name}.csv") for name in ("runs", "pages", "epochs"))
    texts = []
    for study in dict.fromkeys(runs["study"]):
        of_study = runs[runs["study"] == study].groupby(["fold", "seed"]).filter(_has_both)
        if of_study.empty:
            continue
        means = of_study.groupby("recipe").mean(numeric_only=True)
        lines = []
        for recipe in filter(means.index.__contains__, RECIPES):
            count = (of_study["recipe"] == recipe).sum()
            numbers = [f"{means.loc[recipe, name]:.3f}" for name in SHOWN]
            ratio = error_ratio(pages[pages["study"] == study], recipe)
            time_taken = time_ratio(epochs[epochs["study"] == study], recipe)
            cost = f"{means.loc[recipe, 'gradient_bytes'] / 1e6:.1f} | {means.loc[recipe, 'crops_per_s']:.0f}"
            lines.append(f"| {recipe} | {count} | {' | '.join(numbers)} | {ratio} | {time_taken} | {cost} |")
        header = f"| {study} | trainings | {' | '.join(SHOWN.values())} | errors | time | gradients, MB | crops/s |"
        texts.append("\n".join([header, f"|{'---|' * (len(SHOWN) + 6)}", *lines]))
    return "\n\n".join(texts) + "\n"


def _has_both(rows: pd.DataFrame) -> bool:
    """Return whether both main recipes have rows. Otherwise, their means would be over different folds."""
    return {*STUDIED} <= {*rows["recipe"]}


def error_ratio(pages: pd.DataFrame, recipe: str, other: str = STUDIED[0], rounds: int = 2000) -> str:
    """Return the errors of a recipe divided by those of another one, with the 95 % interval.

    Both are on the same folds and seeds. The interval is that of a bootstrap over the pages of each book.
    """
    keys = ["fold", "seed", "book", "page"]
    pages = pages.assign(errors=pages["crops"] - pages["correct"])
    sides = [pages[pages["recipe"] == name].set_index(keys)["errors"] for name in (recipe, other)]
    both = pd.concat(sides, axis=1, keys=["ours", "theirs"], join="inner").groupby(["book", "page"]).sum()
    if both.empty:
        return ""
    rng, ratios = np.random.default_rng(0), []
    books = [rows.to_numpy() for _, rows in both.groupby("book")]
    for _ in range(rounds):
        ours, theirs = sum(rows[rng.integers(len(rows), size=len(rows))].sum(axis=0) for rows in books)
        ratios.append(ours / theirs)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return f"{both['ours'].sum() / both['theirs'].sum():.2f} ({low:.2f} to {high:.2f})"


def time_ratio(epochs: pd.DataFrame, recipe: str) -> str:
    """Return the time that a recipe takes to be as accurate as `baseline` with the study's, divided by its time.

    It is the time until the recipe's validation accuracy reaches the best one of that `baseline`: seconds of training,
    the median over folds and seeds.
    """
    trainings = dict(iter(epochs.groupby(["recipe", "fold", "seed"])))
    ratios = []
    for (name, *key), rows in trainings.items():
        theirs = trainings.get((next(iter(RECIPES)), *key))
        if name != recipe or theirs is None:
            continue
        if RECIPES[recipe].drawn_then_real and (rows["study"] == "books").all():
            rows = rows[rows["epoch"] > 1]  # the first one is on drawn pages, and so is its validation
        best = theirs.loc[theirs["val_accuracy"].idxmax()]
        enough = rows[rows["val_accuracy"] >= best["val_accuracy"]]
        ratios.append(enough["seconds"].iloc[0] / best["seconds"] if len(enough) else np.inf)
    return f"{np.median(ratios):.2f}" if ratios else ""


def done() -> set[Part]:
    if not (ROWS / "runs.csv").exists():
        return set()
    runs = pd.read_csv(ROWS / "runs.csv")
    return {Part(*row) for row in runs[["study", "fold", "recipe", "seed"]].itertuples(index=False, name=None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "recognition", help="folder for pages, datasets and models")
    parser.add_argument("--real", type=Path, default=ROOT.parent / "shared" / "kuzushiji", help="the real pages")
    parser.add_argument("--fonts", type=Path, required=True, help="folder of five brush fonts, one file each")
    parser.add_argument("--minutes", type=float, default=30, help="no part begins that may end later")
    given = parser.parse_args()
    data, end, longest = Data(given.work, given.real, given.fonts), time.monotonic() + 60 * given.minutes, 0.0
    for part in parts():
        if part in done():
            continue
        if time.monotonic() + longest > end:
            break
        began = time.monotonic()
        click.echo(f"{part.study}, fold {part.fold}: {part.recipe}, seed {part.seed}")
        measure(part, data, given.work / "models")
        longest = max(longest, time.monotonic() - began)
    left = len([part for part in parts() if part not in done()])
    if done():
        (ROWS / "tables.md").write_text(tables())
    click.echo(f"{left} parts are left" if left else "all parts are done")


if __name__ == "__main__":
    sys.exit(main())

"""How well each recipe reads books, hands and crops that it was not trained on: `make recognition`.

A part is one training and its test. Parts that have rows in docs/recognition/ are done and are skipped, so that the
command can be stopped and called again. At the end docs/recognition/tables.md is computed from the rows.
"""

import argparse
import csv
import os
import platform
import shlex
import shutil
import subprocess
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

from benchmarks.growth import KUZUSHIJI
from preprocessing.books import book_of

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "docs" / "recognition"
EPOCHS = 12
RECIPES = {
    "baseline, the study's": "--architecture baseline --global-batch-size 512 --learning-rate 1e-4",
    "baseline, ours": "--architecture baseline --global-batch-size 128 --learning-rate 1e-3 --schedule cosine "
    "--augment standard --weight-decay 0.05",
    "resnet, ours": "--architecture resnet",
}
SHOWN = {
    "accuracy": "accuracy", "without_rare": "without rare", "top5": "top 5", "macro_f1": "macro F1", "ece": "ECE",
    "at_99": "at 99 %",
}  # fmt: skip
SEEDS = (42, 43, 44)  # the first of all recipes, the others of the two that matter
PAGES_OF_A_FONT = 20
DRAWN_PAGES = 60


@dataclass(frozen=True)
class Part:
    study: str
    """`books`: real pages of books that it was not trained on. `hands`: drawn pages of other fonts.
    `random`: drawn pages, crops at random."""
    fold: int
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.study}-{self.fold}-{list(RECIPES).index(self.recipe)}-{self.seed}"


def parts() -> Iterator[Part]:
    """In the order in which they are worth most. Recipes were chosen on fold 3 of the books, which is in no table."""
    for seed in SEEDS:
        recipes = [recipe for recipe in RECIPES if seed == SEEDS[0] or recipe != "baseline, ours"]
        for study, folds in (("books", (2, 1, 0)), ("hands", (0,)), ("random", (0,))):
            if seed == SEEDS[0] or study == "books":
                yield from (Part(study, fold, recipe, seed) for fold in folds for recipe in recipes)


class Data:
    """The datasets of all parts, in a folder. They are made when they are needed, and then kept."""

    def __init__(self, folder: Path, real: Path, fonts: Path) -> None:
        """real: folder of real pages, with `train.csv`, `real/train.csv`, `layouts.csv` and `class_counts.csv`."""
        self.folder, self.real, self.fonts = folder, real, fonts
        folder.mkdir(parents=True, exist_ok=True)

    def dataset(self, part: Part) -> Path:
        dataset = self.folder / f"{part.study}-{part.fold}"
        if (dataset / "manifest.json").exists():
            return dataset
        pages, options = self._books() if part.study == "books" else self._hands()
        split = ["--split", "random"]
        if part.study != "random":
            split = ["--split", "book", "--folds", 4 if part.study == "books" else 5, "--fold", part.fold]
            split += options
        classes = self.folder / "label.labels.txt"
        counts = pd.read_csv(self.real / "class_counts.csv")
        classes.write_text("".join(f"{name}\n" for name in [*counts[counts["kept"] == 1]["unicode"], "rare"]))
        labels = [word for file in sorted(pages.glob("*.csv")) for word in ("--labels", file)]
        run("prepare", "--pages", pages / "images", *labels, "--dataset", dataset, "--classes", classes, *split)
        return dataset

    def _books(self) -> tuple[Path, list[Any]]:
        """The real pages, and drawn ones in the layouts of other books, for training alone."""
        pages = self.folder / "books"
        if not pages.exists():
            new = self._new(pages)
            for folder in (self.real, self.real / "real"):
                for page in (folder / "pages").iterdir():
                    (new / "images" / page.name).symlink_to(page.resolve())
                shutil.copy(folder / "train.csv", new / f"{folder.name}.csv")
            drawn = self._draw(new, "drawn", self._layouts()[:DRAWN_PAGES], self.fonts)
            (new / "train-only.txt").write_text("".join(f"{page}\n" for page in drawn))
            new.rename(pages)
        return pages, ["--train-only", pages / "train-only.txt"]

    def _hands(self) -> tuple[Path, list[Any]]:
        """Drawn pages; a book is a font."""
        pages = self.folder / "hands"
        if not pages.exists():
            new, books, layouts = self._new(pages), [], self._layouts()
            for number, font in enumerate(sorted(self.fonts.iterdir())):
                one = new / f"font-{number}"
                one.mkdir()
                (one / font.name).symlink_to(font.resolve())
                rows = layouts[number * PAGES_OF_A_FONT : (number + 1) * PAGES_OF_A_FONT]
                books += [(page, f"font-{number}") for page in self._draw(new, f"drawn-{number}", rows, one)]
            pd.DataFrame(books, columns=["page", "book"]).to_csv(new / "books.txt", index=False)
            new.rename(pages)
        return pages, ["--books", pages / "books.txt"]

    def _new(self, pages: Path) -> Path:
        new = pages.with_name(f"{pages.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        (new / "images").mkdir(parents=True)
        return new

    def _layouts(self) -> list[tuple[str, str]]:
        """Id and labels of pages of books that are not among the real ones, in a random order."""
        rows = pd.read_csv(self.real / "layouts.csv", dtype=str).dropna()
        real = {
            book_of(page.stem) for folder in (self.real, self.real / "real") for page in (folder / "pages").iterdir()
        }
        rows = rows[~rows["image_id"].map(book_of).isin(real)].sample(frac=1, random_state=0)
        return list(rows.itertuples(index=False, name=None))

    def _draw(self, pages: Path, name: str, rows: list[tuple[str, str]], fonts: Path) -> list[str]:
        layouts, drawn = pages / "layouts", pages / name
        pd.DataFrame(rows, columns=["image_id", "labels"]).to_csv(layouts, index=False)
        run("sample", "--out", drawn, "--num-pages", len(rows), "--layouts", layouts, "--fonts", fonts, "--seed", 1)
        for page in (drawn / "train_images").iterdir():
            page.rename(pages / "images" / page.name)
        (drawn / "train.csv").rename(pages / f"{name}.csv")
        return [page for page, _ in rows]


def run(*arguments: object) -> None:
    command = [str(word) for word in (KUZUSHIJI, *arguments)]
    click.echo(f"$ kuzushiji {shlex.join(command[1:])}")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(part: Part, dataset: Path, models: Path) -> None:
    """Train, test, and add the rows."""
    options = RECIPES[part.recipe].split()
    recipe = [*options, "--epochs", EPOCHS, "--seed", part.seed, "--workers", 1]
    run("train", "--dataset", dataset, "--models", models, "--run", part.name, *recipe)
    folder = models / options[1] / part.name
    numbers, pages = tested(folder, dataset)
    add(ROWS / "pages.csv", [vars(part) | row for row in pages])
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    told = {"date": date.today().isoformat(), "machine": machine, "command": shlex.join(map(str, ("train", *recipe)))}
    add(ROWS / "runs.csv", [vars(part) | told | numbers])  # last: it says that the part is done


def tested(folder: Path, dataset: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The numbers of a model on the test split, and the crops and errors of each page."""
    from cluster.storage import place
    from job.data.staging import staged
    from job.metrics import metrics, per_class
    from job.model.folder import load_model
    from job.model.inference import Inference

    model, names, _ = load_model(place(folder))
    history = pd.read_json(folder / "history.jsonl", lines=True)
    with staged(place(dataset), ["train", "test"]) as data:
        crops, books = data.splits["test"], data.books()
        predictions = Inference(model).predict(crops.images, crops.labels)
        examples = np.bincount(data.splits["train"].labels, minlength=len(names))
        table = per_class(predictions, crops.labels, names).assign(trained=examples).query("examples > 0")
        of_test = metrics(predictions, crops.labels, names)
        frame = pd.DataFrame({"page": crops.page_ids, "correct": predictions[:, 0] == crops.labels})
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
        "crops_per_s": history["crops_per_s"].median(), "seconds": history["seconds"].sum(),
        "val_accuracy": history["val_accuracy"].max(),
    }  # fmt: skip
    return numbers, rows.to_dict("records")


def add(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)


def tables() -> str:
    """The tables of all rows, in Markdown."""
    runs, pages = pd.read_csv(ROWS / "runs.csv"), pd.read_csv(ROWS / "pages.csv")
    texts = []
    for study in dict.fromkeys(runs["study"]):
        of_study = runs[runs["study"] == study]
        means = of_study.groupby("recipe", sort=False).mean(numeric_only=True)
        lines = []
        for recipe in means.index:
            count = (of_study["recipe"] == recipe).sum()
            numbers = [f"{means.loc[recipe, name]:.3f}" for name in SHOWN]
            ratio = error_ratio(pages[pages["study"] == study], recipe)
            cost = f"{means.loc[recipe, 'gradient_bytes'] / 1e6:.1f} | {means.loc[recipe, 'crops_per_s']:.0f}"
            lines.append(f"| {recipe} | {count} | {' | '.join(numbers)} | {ratio} | {cost} |")
        header = f"| {study} | trainings | {' | '.join(SHOWN.values())} | errors | gradients, MB | crops/s |"
        texts.append("\n".join([header, f"|{'---|' * (len(SHOWN) + 5)}", *lines]))
    return "\n\n".join(texts) + "\n"


def error_ratio(pages: pd.DataFrame, recipe: str, rounds: int = 2000) -> str:
    """Errors of a recipe over those of `baseline` by the study's, on the same folds and seeds, with the 95 % interval
    of a bootstrap over the pages of each book.
    """
    keys = ["fold", "seed", "book", "page"]
    pages = pages.assign(errors=pages["crops"] - pages["correct"])
    sides = [pages[pages["recipe"] == name].set_index(keys)["errors"] for name in (recipe, next(iter(RECIPES)))]
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
        measure(part, data.dataset(part), given.work / "models")
        longest = max(longest, time.monotonic() - began)
    left = len([part for part in parts() if part not in done()])
    if done():
        (ROWS / "tables.md").write_text(tables())
    click.echo(f"{left} parts are left" if left else "all parts are done")


if __name__ == "__main__":
    sys.exit(main())

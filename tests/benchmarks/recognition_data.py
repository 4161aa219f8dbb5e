"""The datasets of `make recognition`: real pages of seven books, drawn pages in the layouts of others, drawn hands."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pandas as pd

from benchmarks.growth import KUZUSHIJI
from preprocessing.books import book_of

PAGES_OF_A_FONT = 20
DRAWN_PAGES = 240
FOLDS = 7  # of the real pages, one per book


@dataclass(frozen=True)
class Part:
    study: str
    """`books`: tested on real pages of books that it was not trained on. `hands`: on drawn pages of other fonts.
    `random`: on random crops of drawn pages.
    """
    fold: int
    recipe: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.study}-{self.fold}"


class Data:
    """The datasets of all parts, in a folder. Each is created when it is needed first."""

    def __init__(self, folder: Path, real: Path, fonts: Path) -> None:
        """real: folder of real pages, with `train.csv`, `real/train.csv`, `layouts.csv` and `class_counts.csv`."""
        self.folder, self.real, self.fonts = folder, real, fonts
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, part: Part, margin: float = 0.0) -> Path:
        """Return the dataset with everything that a part is trained on, and its test."""
        if part.study == "books":
            pages = self._books()
            split = [*self._fold(FOLDS, part.fold), "--train-only", pages / "train-only.txt"]
            return self._dataset(part.folder, pages, ["real", "kuzushiji", "drawn"], split, margin)
        pages = self._hands()
        split = [*self._fold(5, part.fold), "--books", pages / "books.txt"] if part.study == "hands" else []
        labels = sorted(file.stem for file in pages.glob("drawn-*.csv"))
        return self._dataset(part.folder, pages, labels, split, margin)

    def drawn(self, margin: float) -> Path:
        """Return the dataset with only the drawn pages of `books`."""
        few = ["--split", "page", "--val-fraction", 0.02, "--test-fraction", 0.02]
        return self._dataset("drawn", self._books(), ["drawn"], few, margin)

    def real_of(self, part: Part, margin: float) -> Path:
        """Return the dataset with only the real pages of a part of `books`. Its test has the boxes of that of `of`."""
        split = self._fold(FOLDS, part.fold)
        return self._dataset(f"real-{part.fold}", self._books(), ["real", "kuzushiji"], split, margin)

    def _fold(self, folds: int, fold: int) -> list[object]:
        return ["--split", "book", "--folds", folds, "--fold", fold]

    def _dataset(self, name: str, pages: Path, labels: Sequence[str], split: Sequence[object], margin: float) -> Path:
        dataset = self.folder / (f"{name}-margin-{margin}" if margin else name)
        if not (dataset / "manifest.json").exists():
            classes = self.folder / "label.labels.txt"
            counts = pd.read_csv(self.real / "class_counts.csv")
            classes.write_text("".join(f"{code}\n" for code in [*counts[counts["kept"] == 1]["unicode"], "rare"]))
            files = [word for label in labels for word in ("--labels", pages / f"{label}.csv")]
            places = ["--pages", pages / "images", *files, "--dataset", dataset]
            run("prepare", *places, "--classes", classes, "--margin", margin, *split)
        return dataset

    def _books(self) -> Path:
        """Return a folder of the real pages, and of drawn pages in the layouts of other books (for training only)."""
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
        return pages

    def _hands(self) -> Path:
        """Return a folder of drawn pages. Each font is a book."""
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
        return pages

    def _new(self, pages: Path) -> Path:
        new = pages.with_name(f"{pages.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        (new / "images").mkdir(parents=True)
        return new

    def _layouts(self) -> list[tuple[str, str]]:
        """Return page ids and labels from books that are not among the real pages, in random order."""
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


def crops_of(dataset: Path) -> int:
    """Return the number of training crops."""
    return int(json.loads((dataset / "manifest.json").read_text())["counts"]["train"]["examples"])


def run(*arguments: object) -> None:
    command = [str(word) for word in (KUZUSHIJI, *arguments)]
    click.echo(f"$ kuzushiji {shlex.join(command[1:])}")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

"""README and docs: their size, numbers, links, named files, commands and options are right."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from benchmarks.recognition import RECIPES, error_ratio
from benchmarks.recognition_data import DRAWN_PAGES
from test_project import PACKAGES

from job.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/fake_cloud/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CODE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.M | re.S)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    return CODE.sub("", text)


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str, languages: tuple[str, ...] = ("", "sh")) -> Iterator[str]:
    """Yield the `kuzushiji` commands of a page's code blocks in one of `languages`, each as one line."""
    for _, language, block in CODE.findall(text):
        if language not in languages:
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.strip().startswith("kuzushiji "):
                yield line.split(" #")[0].strip()


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    assert len(text.encode()) <= 12_000
    assert not re.search(r"@[A-Z]+@", text)  # a number that is still to be measured


@pytest.mark.parametrize("name", ["README.md", "docs/models.md"])
def test_the_numbers_of_recognition_are_those_of_its_tables(name: str) -> None:
    text = " ".join((ROOT / name).read_text().split())
    tables = (ROOT / "docs" / "recognition" / "tables.md").read_text().split("\n\n")[0]  # those of the study `books`
    study, ours = (
        re.findall(rf"^\| {recipe} \| (.*) \|$", tables, re.M)[0].split(" | ")
        for recipe in ("baseline, the study's", "resnet, ours")
    )
    runs = pd.read_csv(ROOT / "docs" / "recognition" / "runs.csv").query("study == 'books'")
    means = runs.groupby("recipe")[["accuracy", "top5", "without_rare"]].mean()  # the tables have rounded ones
    (accuracy, top5, without_rare), (of_study, top5_of_study, without_rare_of_study) = (
        means.loc[recipe] for recipe in ("resnet, ours", "baseline, the study's")
    )
    assert [f"{accuracy:.3f}", f"{of_study:.3f}"] == [ours[1], study[1]]
    errors, low, high = re.findall(r"[0-9.]+", ours[7])
    assert f"not `rare`, the accuracies are {without_rare:.2f} and {without_rare_of_study:.2f}." in text
    if name == "README.md":
        assert re.search(rf"\| `resnet` on unseen books \|.*?\| accuracy {accuracy:.2f}, top 5 {top5:.2f} \|", text)
        by_study = rf"\| `baseline` by the study's recipe \|.*?\| accuracy {of_study:.2f}, top 5 {top5_of_study:.2f} \|"
        assert re.search(by_study, text)
        assert f"makes {errors} of the errors of `baseline` (95 % interval: {low} to {high})" in text
        return
    assert f"accuracy {accuracy:.2f} and top 5 {top5:.2f}, where `baseline` by the study's recipe reaches" in text
    assert f"reaches {of_study:.2f} and {top5_of_study:.2f} from as many crops; {errors} of its errors" in text
    assert f"({low} to {high}, the 95 % interval)" in text
    assert f"the mean of `ece` was {float(ours[5]):.2f} on those of recipe 2" in text


def test_recipe_2_is_the_one_that_was_measured() -> None:
    def options(words: list[str], but: str) -> dict[str, str]:
        return {key: value for key, value in zip(words[::2], words[1::2], strict=True) if key not in but.split()}

    section = (ROOT / "docs" / "models.md").read_text().split("\n## Recipe ")[2]
    real, sample, drawn, *trainings = commands(section)
    margin = RECIPES["resnet, ours"].margin
    assert f" --margin {margin} " in real
    assert f" --margin {margin} " in drawn
    assert sample.endswith(f" --num-pages {DRAWN_PAGES} --seed 1")
    assert " --weights models/resnet/drawn " in trainings[1]
    rows = pd.read_csv(ROOT / "docs" / "recognition" / "runs.csv")
    ours = rows[(rows["study"] == "books") & (rows["recipe"] == "resnet, ours")]
    assert len(ours) >= 6
    for measured in ours["command"].str.split("; "):
        assert all(f"-margin-{margin} " in training for training in measured)
        for command, training, differ in zip(trainings, measured, ("", "--epochs"), strict=True):
            places = f"--dataset --models --run --weights --seed {differ}"
            assert options(shlex.split(command)[2:], places) == options(shlex.split(training)[1:], places)


def test_the_ratios_of_books_are_those_of_their_rows() -> None:
    rows = pd.read_csv(ROOT / "docs" / "recognition" / "pages.csv", dtype={"book": str}).query("study == 'books'")
    text = " ".join((ROOT / "docs" / "recognition" / "README.md").read_text().split())
    crops = rows.drop_duplicates("page").groupby("book")["crops"].sum()
    for book, of_book in rows.groupby("book"):
        ratios = error_ratio(of_book, "resnet, ours")[:4], error_ratio(of_book, "baseline, ours")[:4]
        assert f", {book} | {crops[book]:,} | {' | '.join(ratios)} |" in text
    of_baseline = error_ratio(rows, "baseline, ours")
    assert f"| all | {crops.sum():,} | {error_ratio(rows, 'resnet, ours')} | {of_baseline} |" in text
    largest = rows[rows["book"] == "200010454"]
    seeds, of_largest = (
        [error_ratio(some[some["seed"] == seed], "resnet, ours") for seed in (42, 43, 44)] for some in (rows, largest)
    )
    assert "With seed 42 `resnet` makes {}, with 43 {}, with 44 {};".format(*seeds) in text
    assert "; on 200010454 {}, {} and {}.".format(*(ratio[:4] for ratio in of_largest)) in text
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "{}, {} and {} by seed,".format(*(ratio[:4] for ratio in seeds)) in readme
    assert f"`baseline` by our recipe makes {of_baseline[:4]}," in readme
    by_book = sorted(error_ratio(of_book, "resnet, ours")[:4] for _, of_book in rows.groupby("book"))
    changes = " ".join((ROOT / "CHANGELOG.md").read_text().split())
    assert f"{error_ratio(rows, 'resnet, ours')[:4]} of the errors of `baseline` by the study's recipe" in changes
    assert f"from {by_book[0]} to {by_book[-1]} by book" in changes
    runs = pd.read_csv(ROOT / "docs" / "recognition" / "runs.csv").query("study == 'books' and seed == 42")
    means = runs.groupby("recipe")["accuracy"].mean()
    assert f"`resnet` is {means['resnet, ours']:.3f} as a mean over the books" in text
    assert f"that of `baseline` by our recipe {means['baseline, ours']:.3f}:" in text
    of_both = [
        error_ratio(some, "resnet, ours", "baseline, ours") for some in (rows, rows[rows["book"] != "200010454"])
    ]
    assert f"`resnet` makes {of_both[0]} of the errors of `baseline` by our recipe" in text
    assert f"without 200010454 {of_both[1]}." in text
    others = error_ratio(rows[rows["book"] != "200010454"], "resnet, ours")
    assert f"On the other five together it is {others}" in text
    untouched = error_ratio(rows[rows["book"].isin(["200021869", "100241706", "200020019"])], "resnet, ours")
    assert f"on the three that were no validation split of a trial {untouched}" in text
    for name in ("README.md", "docs/models.md"):
        assert f"without the largest book {others[:4]}" in " ".join((ROOT / name).read_text().split())


@pytest.mark.parametrize("study", ["hands", "random"])
def test_the_numbers_of_drawn_pages_are_those_of_their_rows(study: str) -> None:
    runs, pages = (pd.read_csv(ROOT / "docs" / "recognition" / f"{name}.csv") for name in ("runs", "pages"))
    runs, pages = (rows[rows["study"] == study] for rows in (runs, pages))
    accuracy = runs.set_index("recipe")["accuracy"]
    recipes = ("baseline, the study's", "baseline, ours", "resnet, ours")
    numbers = " | ".join(f"{accuracy[recipe]:.3f}" for recipe in recipes)
    crops = pages.drop_duplicates("page")["crops"].sum()
    row = f"| `{study}` | {crops:,} | {numbers} | {error_ratio(pages, 'resnet, ours', 'baseline, ours')} |"
    assert row in (ROOT / "docs" / "recognition" / "README.md").read_text()


def test_the_accuracies_of_fully_labelled_pages_are_those_of_their_rows() -> None:
    rows = pd.read_csv(ROOT / "docs" / "recognition" / "pages.csv", dtype={"book": str}).query("study == 'books'")
    rows = rows[rows["recipe"] != "baseline, ours"]
    full = rows["book"].isin(["200021869", "100241706"]) | rows["page"].isin(["200010454_00002_2", "200010454_00016_1"])
    sums = rows.groupby([full, rows["recipe"].str.startswith("resnet")])[["correct", "crops"]].sum()
    right = {key: f"{row['correct'] / row['crops']:.2f}" for key, row in sums.iterrows()}
    of_full = f"is {right[True, True]} (`baseline` {right[True, False]})"
    of_others = f"on the others {right[False, True]} ({right[False, False]})"
    assert f"{of_full}, {of_others}" in " ".join((ROOT / "README.md").read_text().split())


def test_the_speed_of_the_readme_is_that_of_the_bench() -> None:
    (ratio,) = re.findall(r"`crop_vs_study` \| ([0-9.]+)", (ROOT / "docs" / "bench.md").read_text())
    assert f"{float(ratio):.1f} times the study's way" in (ROOT / "README.md").read_text()


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "cli.py"))
    assert (ROOT / "docs" / "cli.md").read_text() == made["page"](), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_the_docs_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"https?:", target):
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place).resolve() if place else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_docs_name_files_that_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:tests|docs|cluster|preprocessing|job|\.ci)/[\w./-]*\w)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_commands_are_found_in_the_docs() -> None:
    assert len(list(commands((ROOT / "README.md").read_text()))) >= 9
    assert sum(len(list(commands(page.read_text()))) for page in PAGES) >= 60


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_docs_have_valid_options(page: Path) -> None:
    for command in commands(page.read_text()):
        name, *rest = shlex.split(command)[1:]
        if "..." in rest:
            continue
        main.commands[name].make_context(name, list(rest))  # raises if an option is wrong
        if name == "submit" and "--" in rest:
            job, *options = rest[rest.index("--") + 1 :]
            main.commands[job].make_context(job, list(options))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_of_the_docs_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = page.read_text()
    named = re.findall(r"^make ([a-z-]+)", text, re.M) + re.findall(r"`make ([a-z-]+)", text)
    assert set(named) <= targets


def test_the_docs_map_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for package in PACKAGES:
        _, _, rest = text.partition(f"\n{package}/ ")
        listed = re.findall(r"^  (\S+\.py) ", re.split(r"\n(?=\S)", rest)[0], re.M)
        there = {str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py")}
        assert sorted(listed) == sorted(path for path in there if not path.endswith("__init__.py"))


def messages() -> str:
    """Return the source of all packages, with the lines of each message joined."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in files)


def test_errors_name_pages_and_sections_that_are_there() -> None:
    named = re.findall(r"docs/([\w-]+\.md)(?:#([\w-]+))?", messages())
    assert len(named) >= 40
    for page, anchor in named:
        assert (ROOT / "docs" / page).exists(), page
        assert not anchor or anchor in anchors(ROOT / "docs" / page), (page, anchor)


def test_the_errors_of_the_faq_are_those_that_commands_print() -> None:
    source = messages()
    text = (ROOT / "docs" / "faq.md").read_text()
    of_others = ("Install Python", "No space left", "The object store")
    headings = [heading for heading in re.findall(r"^### `(.*)`$", text, re.M) if not heading.startswith(of_others)]
    assert len(headings) >= 15
    for heading in headings:
        parts = re.split(r"^--\w+|\b[A-Z]{4,}\b|\d+(?:\.\d+)?|\.\.\.", heading)  # at the placeholders of values
        literal = max(parts, key=len)
        assert literal in source, heading

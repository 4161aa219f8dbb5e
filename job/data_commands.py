"""The commands that make datasets: `sample` and `prepare`; and the options that `predict` has too."""

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from cluster.capacity import START_LIMIT
from cluster.errors import OptionError, counted
from job.command import Output, command, config_of, option
from preprocessing.config import SPLITS, PrepareConfig

start_limit_option = click.option(
    "--start-limit",
    default=START_LIMIT,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="SECONDS",
    help="Longest wait for room on a cluster.",
)

canvases_option = click.option(
    "--canvases", metavar="FILE", help="CSV canvas,file: the file of each canvas of IIIF Curations."
)


def labels_option(name: str, text: str, required: bool = False) -> Callable[..., Any]:
    """Return the click option for label files."""
    return click.option(name, multiple=True, required=required, metavar="PLACE", help=f"{text} Can be repeated.")


@command
@click.option(
    "--out", required=True, metavar="DIR", help="New folder for train.csv, train_images/, unicode_translation.csv."
)
@click.option("--num-pages", required=True, type=int, help="Number of pages to draw, about 200 characters each.")
@click.option(
    "--seed", default=42, show_default=True, type=int, help="Random seed. The same seed and fonts give the same bytes."
)
@click.option(
    "--scale", default=1.0, show_default=True, type=float, help="Scale of the pages; 1: about 2,400 x 3,900 px."
)
@click.option(
    "--layouts", metavar="FILE", help="Kaggle's train.csv: draw its first pages, with their ids, boxes and characters."
)
@click.option("--fonts", metavar="DIR", help="Folder of the fonts to draw with.  [default: those of this machine]")
def sample(out: str, num_pages: int, seed: int, scale: float, layouts: str | None, fonts: str | None) -> Output:
    """Draw synthetic pages in Kaggle's format, to test without data."""
    from cluster.places import local_path
    from preprocessing.sample.sample import sample as draw

    layouts_file = local_path(layouts, "--layouts") if layouts else None
    font_folder = local_path(fonts, "--fonts") if fonts else None
    summary = draw(local_path(out, "--out"), num_pages, seed, scale, layouts_file, fonts=font_folder)
    result = {"out": out, "pages": summary.pages, "characters": summary.characters, "books": summary.books}
    result |= {"fonts": summary.fonts}
    return result, [
        f"{counted(summary.pages, 'page')}, {counted(summary.books, 'book')}, "
        f"{counted(summary.characters, 'character')}: {out}",
        f"fonts: {', '.join(summary.fonts)}",
    ]


@command
@click.option("--pages", metavar="PLACE", help="Folder or .zip of page scans: <image_id>.jpg, .png ...")
@labels_option("--labels", "CSV (Kaggle, CODH, spreadsheet), COCO, YOLO, IIIF.")
@canvases_option
@click.option("--crops", metavar="PLACE",
              help="Instead of pages and labels: a folder of images per character.")  # fmt: skip
@click.option("--dataset", required=True, metavar="PLACE", help="New folder, or one to complete or repair.")
@option(PrepareConfig, "split")
@option(PrepareConfig, "books", type=str, metavar="FILE")
@option(PrepareConfig, "seed")
@option(PrepareConfig, "val_fraction")
@option(PrepareConfig, "test_fraction")
@option(PrepareConfig, "folds", metavar="N")
@option(PrepareConfig, "fold", metavar="K")
@option(PrepareConfig, "train_only", type=str, metavar="FILE")
@option(PrepareConfig, "coverage")
@option(PrepareConfig, "classes", type=str, metavar="FILE")
@option(PrepareConfig, "shards")
@option(PrepareConfig, "rescale", is_flag=True, flag_value=True)
@option(PrepareConfig, "margin")
@option(PrepareConfig, "license", metavar="ID")
@option(PrepareConfig, "max_bad_fraction")
@start_limit_option
def prepare(
    pages: str | None,
    labels: tuple[str, ...],
    canvases: str | None,
    crops: str | None,
    dataset: str,
    start_limit: float,
    **options: Any,
) -> Output:
    """Cut labelled pages into crops, written as TFRecords."""
    from cluster.places import reachable_place
    from preprocessing.books import read_books, read_train_only
    from preprocessing.box_checks import ink_line
    from preprocessing.classes import read_class_names
    from preprocessing.parquet import LOSSES_TABLE
    from preprocessing.prepare import prepare as run

    for name, read in (("classes", read_class_names), ("books", read_books), ("train_only", read_train_only)):
        options[name] = read(reachable_place(options[name])) if options[name] else None
    for name in ("val_fraction", "test_fraction"):  # --folds is refused with fractions that were given
        if click.get_current_context().get_parameter_source(name) == ParameterSource.DEFAULT:
            del options[name]
    config = config_of(PrepareConfig, **options)
    given = [name for name, value in (("--pages", pages), ("--labels", labels), ("--crops", crops)) if value]
    if given not in (["--pages", "--labels"], ["--crops"]):
        raise OptionError(f"--pages and --labels, or --crops, must be given. Received: {' and '.join(given) or 'none'}")
    if crops and canvases:
        raise OptionError("--canvases must be given with --labels. Received: --crops. Leave one of them out")
    if crops and config.margin:
        raise OptionError(
            f"--margin must be given with --labels, whose boxes it widens. Received: --margin {config.margin:g} and "
            "--crops. Leave it out"
        )
    label_places = None if crops else [reachable_place(label) for label in labels]
    canvases_place = reachable_place(canvases) if canvases else None
    source = reachable_place(crops or pages or ""), label_places
    manifest, new = run(*source, reachable_place(dataset), config, start_limit, canvases_place)
    from job.report.dataset import write_dataset_report  # imports the plotting library: not before prepare begins

    counts = {split: manifest.counts[split]["examples"] for split in SPLITS}
    lost = {"losses": manifest.lost, "clipped": len(manifest.clipped), "unlabelled": len(manifest.unlabelled)}
    lost |= {"warnings": len(manifest.warnings) + manifest.more_warnings, "without_ink": manifest.ink.without_ink}
    result = {"dataset": dataset, "written": new, "crops": counts, "shards": len(manifest.shards)} | lost
    reported = write_dataset_report(reachable_place(dataset), manifest, new)
    if not new:
        return result, [f"{dataset} is complete and valid: nothing written", *reported]
    split_line = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    return result, [
        f"{sum(counts.values()):,} crops in {counted(len(manifest.shards), 'shard')} ({split_line}): {dataset}",
        f"{counted(lost['losses'], 'box', 'boxes')} lost, {lost['clipped']:,} clipped, "
        f"{counted(lost['unlabelled'], 'page')} without labels, {counted(lost['warnings'], 'warning')}: "
        f"each is listed in manifest.json{f' or {LOSSES_TABLE}' if manifest.more_losses else ''}",
        *ink_line(manifest.ink),
        *reported,
    ]

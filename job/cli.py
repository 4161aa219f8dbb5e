"""The command line. Commands import their dependencies when they run: `--help` loads neither TensorFlow nor Ray."""

import logging
import shlex
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource

from cluster.capacity import START_LIMIT
from cluster.errors import InputError, OptionError
from job.command import Outcome, command, config_of, main, option
from job.config import TrainConfig
from preprocessing.config import SPLITS, PrepareConfig

SHOWN_CONFUSIONS = 20
# Commands that can run as jobs on a cluster. The others read or write the local disk.
JOBS = ("prepare", "train", "evaluate", "predict", "report", "export", "verify")

log = logging.getLogger("kuzushiji")

start_limit_option = click.option(
    "--start-limit",
    default=START_LIMIT,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="SECONDS",
    help="Longest wait for hosts of a cluster.",
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
@click.option("--num-pages", required=True, type=int, help="Number of pages to draw, about 190 characters each.")
@click.option(
    "--seed", default=42, show_default=True, type=int, help="Random seed. The same seed and fonts give the same bytes."
)
@click.option(
    "--scale", default=1.0, show_default=True, type=float, help="Scale of the pages; 1: about 2,400 x 3,900 px."
)
@click.option(
    "--layouts", metavar="FILE", help="Label file; its first pages are drawn, with their ids, boxes, characters."
)
def sample(out: str, num_pages: int, seed: int, scale: float, layouts: str | None) -> Outcome:
    """Draw synthetic pages in Kaggle's format, to test without data."""
    from cluster.storage import local_path
    from preprocessing.sample.sample import sample as draw

    layouts_file = local_path(layouts, "--layouts") if layouts else None
    summary = draw(local_path(out, "--out"), num_pages, seed, scale, layouts_file)
    result = {"out": out, "pages": summary.pages, "characters": summary.characters, "books": summary.books}
    return result, [f"{summary.pages} pages, {summary.books} books, {summary.characters:,} characters: {out}"]


@command
@click.option("--pages", metavar="PLACE", help="Folder or .zip of page scans: <image_id>.jpg, .png ...")
@labels_option("--labels", "Kaggle's or CODH's CSV, COCO, YOLO, IIIF Curation.")
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
) -> Outcome:
    """Cut labelled pages into crops, written as TFRecords."""
    from cluster.storage import reachable_place
    from job.report.dataset import write_dataset_report
    from preprocessing.books import read_books, read_train_only
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
    label_places = None if crops else [reachable_place(label) for label in labels]
    canvases_place = reachable_place(canvases) if canvases else None
    source = reachable_place(crops or pages or ""), label_places
    manifest, new = run(*source, reachable_place(dataset), config, start_limit, canvases_place)
    counts = {split: manifest.counts[split]["examples"] for split in SPLITS}
    lost = {"losses": manifest.lost, "clipped": len(manifest.clipped), "unlabelled": len(manifest.unlabelled)}
    lost |= {"warnings": len(manifest.warnings) + manifest.more_warnings, "without_ink": manifest.ink.without_ink}
    result = {"dataset": dataset, "written": new, "crops": counts, "shards": len(manifest.shards)} | lost
    reported = write_dataset_report(reachable_place(dataset), manifest, new)
    if not new:
        return result, [f"{dataset} is complete and valid: nothing written", *reported]
    split_line = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    return result, [
        f"{sum(counts.values()):,} crops in {len(manifest.shards)} shards ({split_line}): {dataset}",
        f"{lost['losses']} boxes lost, {lost['clipped']} clipped, {lost['unlabelled']} pages without labels, "
        f"{lost['warnings']} warnings: "
        f"each is listed in manifest.json{f' or {LOSSES_TABLE}' if manifest.more_losses else ''}",
        *reported,
    ]


@command
@click.option("--dataset", required=True, metavar="PLACE", help="Folder made by `prepare`.")
@click.option("--models", required=True, metavar="PLACE", help="Folder for the models: <architecture>/<run>/.")
@click.option("--architecture", "architectures", required=True, multiple=True, metavar="NAME",
              help="baseline, xception, resnet152v2, inceptionresnetv2, fcn (550 times the cost of baseline), "
              "or all. Can be repeated.")  # fmt: skip
@option(TrainConfig, "weights", metavar="imagenet|none|FILE")
@option(TrainConfig, "unfreeze")
@option(TrainConfig, "workers")
@option(TrainConfig, "gpus_per_worker")
@option(TrainConfig, "cpus_per_worker")
@option(TrainConfig, "epochs")
@option(TrainConfig, "global_batch_size")
@option(TrainConfig, "learning_rate")
@option(TrainConfig, "precision", metavar="NAME")
@option(TrainConfig, "deterministic", "--deterministic/--fast")
@option(TrainConfig, "class_weights", metavar="none|balanced")
@option(TrainConfig, "seed")
@option(TrainConfig, "patience")
@option(TrainConfig, "checkpoint_every", metavar="STEPS")
@option(TrainConfig, "max_failures")
@option(TrainConfig, "step_limit", metavar="SECONDS")
@start_limit_option
@click.option(
    "--run",
    metavar="NAME",
    help="Name of the run; a run that exists is resumed.  [default: the time]",
)
def train(
    dataset: str,
    models: str,
    architectures: tuple[str, ...],
    weights: str | None,
    run: str | None,
    start_limit: float,
    **options: Any,
) -> Outcome:
    """Train and evaluate classifiers with Ray Train."""
    from cluster.storage import reachable_place
    from job.config import configs_of
    from job.model.pretrained import weights_option_file
    from job.tables import outcome_lines, outcome_result
    from job.train.driver import default_cpus_per_worker, new_run_name
    from job.train.driver import train as start

    if options["cpus_per_worker"] is None:
        options["cpus_per_worker"] = default_cpus_per_worker(max(1, options["workers"]))
    file = weights_option_file(weights)
    configs = configs_of(architectures, weights=file.identity if file else weights, **options)
    places = reachable_place(dataset), reachable_place(models)
    outcomes = start(*places, configs, run or new_run_name(), file, start_limit)
    return outcome_result(outcomes), outcome_lines(outcomes)


@command
@click.option("--model", required=True, metavar="PLACE", help="Model folder, or architecture folder (latest run).")
@click.option("--dataset", required=True, metavar="PLACE", help="Folder made by `prepare`, with the same classes.")
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True, help="Split to evaluate.")
@click.option("--out", metavar="DIR", help="Folder for metrics.json, per_class.csv and misclassified.csv.")
def evaluate(model: str, dataset: str, split: str, out: str | None) -> Outcome:
    """Evaluate a model on a split, and list its confusions."""
    from cluster.storage import reachable_place
    from job.evaluate import evaluate as run
    from job.evaluate import write_evaluation
    from job.tables import splits_table

    folder = reachable_place(out) if out else None
    evaluation = run(reachable_place(model), reachable_place(dataset), split, folder)
    if folder:
        write_evaluation(evaluation, folder)
    weakest_first = evaluation.per_class.query("examples > 0").sort_values(
        ["f1", "examples"], ascending=[True, False], kind="stable"
    )
    columns = ["character", "label", "examples", "precision", "recall", "f1"]
    confusions = evaluation.confusions
    more = (
        [f"... and {len(confusions) - SHOWN_CONFUSIONS} more; --out DIR writes all misclassified crops"]
        if len(confusions) > SHOWN_CONFUSIONS
        else []
    )
    return {"split": split} | asdict(evaluation.metrics), [
        f"weakest of {len(weakest_first)} classes:",
        weakest_first.head(10)[columns].to_string(index=False, float_format="{:.3f}".format),
        "",
        "confusions, as character (crops): predicted characters",
        *confusions[:SHOWN_CONFUSIONS],
        *more,
        "",
        *splits_table({split: asdict(evaluation.metrics)}),
    ]


@command
@click.option("--model", required=True, metavar="PLACE", help="Model folder, or architecture folder (latest run).")
@click.option("--pages", required=True, metavar="PLACE", help="Folder or .zip of page scans: <image_id>.jpg, .png ...")
@labels_option("--boxes", "Label files as for prepare; the characters may be missing.", required=True)
@canvases_option
@click.option("--out", required=True, metavar="PLACE", help="New folder for a table of boxes and a table of pages.")
@click.option("--format", "form", type=click.Choice(["parquet", "csv"]), default="parquet", show_default=True,
              help="Format of the tables.")  # fmt: skip
@click.option("--annotate", metavar="PLACE", help="Folder for pictures of the pages with the predicted characters.")
@click.option("--gpus", default=0, show_default=True, type=click.IntRange(min=0),
              help="Number of actors, each with one GPU; 0: one task per CPU.")  # fmt: skip
@click.option("--rescale", is_flag=True,
              help="Scale boxes that were made for another size of their page, if --boxes says it.")  # fmt: skip
@start_limit_option
def predict(
    model: str,
    pages: str,
    boxes: tuple[str, ...],
    canvases: str | None,
    out: str,
    form: str,
    annotate: str | None,
    gpus: int,
    rescale: bool,
    start_limit: float,
) -> Outcome:
    """Predict the characters in boxes of new pages, and their text."""
    from cluster.storage import reachable_place
    from job.predict.predict import predict as run

    model_place, pages_place, *box_places, out_place = map(reachable_place, (model, pages, *boxes, out))
    pictures, canvases_place = (reachable_place(text) if text else None for text in (annotate, canvases))
    folders = model_place, pages_place, box_places, out_place
    manifest = run(*folders, form, pictures, gpus, start_limit, rescale, canvases_place)
    counts, accuracy, lost = manifest.counts, manifest.accuracy, len(manifest.losses)
    result = {"out": out} | counts | {"losses": lost, "clipped": len(manifest.clipped), "accuracy": accuracy}
    result |= {"warnings": len(manifest.warnings), "without_ink": manifest.ink.without_ink}
    lines = [f"{counts['read']:,} of {counts['boxes']:,} boxes on {counts['pages']:,} pages read: {out}"]
    if accuracy:
        names = {"accuracy": "accuracy", "accuracy_without_rare": "without rare", "top5": "top 5"}
        scores = ", ".join(f"{name} {value:.4f}" for key, name in names.items() if (value := accuracy[key]) is not None)
        lines.append(f"{scores}, {accuracy['examples']:,} boxes with a character")
    lines.append(f"{lost} boxes lost, {len(manifest.clipped)} clipped: each is listed in manifest.json")
    return result, lines


@command
@click.option("--model", required=True, metavar="PLACE", help="Model folder, or architecture folder (latest run).")
@click.option("--format", "form", type=click.Choice(["savedmodel", "tflite"]), required=True,
              help="savedmodel: TensorFlow Serving; tflite: LiteRT on small devices.")  # fmt: skip
@click.option("--out", required=True, metavar="PLACE", help="New folder.")
def export(model: str, form: str, out: str) -> Outcome:
    """Convert a model for other runtimes, and compare predictions."""
    from cluster.storage import reachable_place
    from job.export import export as run

    difference = run(reachable_place(model), form, reachable_place(out))
    return {"out": out, "largest_difference": difference}, [
        f"{form}: {out}",
        f"probabilities differ from the model's by at most {difference:.1g}",
    ]


@command
@click.option("--dataset", metavar="PLACE", help="Folder made by `prepare`; with --models: for pictures of its crops.")
@click.option("--models", metavar="PLACE", help="Folder of trained models; shows the latest run of each architecture.")
@click.option("--out", required=True, metavar="PLACE", help="Folder for report.html.")
def report(dataset: str | None, models: str | None, out: str) -> Outcome:
    """Write a self-contained HTML report of a dataset or of models."""
    from cluster.storage import reachable_place, write_bytes
    from job.evaluate import check_out
    from job.report.dataset import dataset_report
    from job.report.models import model_report

    if not (dataset or models):
        raise OptionError("--dataset or --models must be given. Received: neither")
    data = reachable_place(dataset) if dataset else None
    folder = reachable_place(out)
    check_out(folder)
    target = folder / "report.html"
    if models:
        write_bytes(target, model_report(reachable_place(models), data))
    elif data:
        write_bytes(target, dataset_report(data))
    return {"report": str(target)}, [f"report: {target}"]


@command
@click.option("--models", required=True, metavar="PLACE", help="Folder of trained models.")
@click.option("--to", required=True, metavar="DIR", help="Local folder; gets the same structure.")
@click.argument("names", nargs=-1, metavar="[NAME[/RUN]]...")
def pull(models: str, to: str, names: tuple[str, ...]) -> Outcome:
    """Download and verify trained models: the latest runs, or those named."""
    from cluster.pull import pull as fetch
    from cluster.storage import local_path, place, reachable_place

    pulled = fetch(reachable_place(models), place(local_path(to, "--to")), names)
    lines = [
        f"{model.name}/{model.run}: {model.new_bytes:,} bytes downloaded, all files verified: {model.folder}"
        for model in pulled
    ]
    return {"models": [vars(model) for model in pulled]}, lines


@command
@click.argument("folder", metavar="PLACE")
def verify(folder: str) -> Outcome:
    """Verify a dataset, model or predictions folder, or check a cluster file (.yaml) before `ray up`."""
    from cluster.cluster_file import SUFFIXES, faults_of_cluster_file
    from cluster.models import resolve_model
    from cluster.storage import local_path, reachable_place
    from job.verify import verify as check

    if folder.endswith(SUFFIXES):
        faults = faults_of_cluster_file(local_path(folder, "a cluster file"))
        verdict = f"{len(faults)} faults" if faults else "ready for `ray up`"
        return {"place": folder, "kind": "cluster", "faults": faults}, [*faults, f"cluster file {folder}: {verdict}"]
    checked = resolve_model(reachable_place(folder))
    manifest, faults, unlisted = check(checked)
    for name in unlisted:
        log.warning("%s is not listed in the manifest", name)
    result = {
        "place": str(checked),
        "kind": manifest.kind,
        "files": len(manifest.entries),
        "faults": faults,
        "unlisted": unlisted,
    }
    verdict = (
        f"{len(faults)} of {len(manifest.entries)} files are damaged"
        if faults
        else f"{len(manifest.entries)} files are valid"
    )
    return result, [*faults, f"{manifest.kind} {checked}: {verdict}"]


@command
@click.option("--cluster", metavar="FILE", help="Cluster file that `ray up` was given.  [default: ray_cluster.yaml]")
@click.option(
    "--address", metavar="URL", help="Address of a head node, such as http://127.0.0.1:8265, instead of --cluster."
)
@click.option("--insecure", is_flag=True, help="Send the token to --address without encryption.")
@click.option("--working-dir", metavar="DIR", help="Checkout to upload; the job runs its code instead of the image's.")
@click.option("--no-wait", is_flag=True, help="Return as soon as the job is submitted.")
@click.option("--attach", metavar="JOB", help="Follow a job that was submitted before.")
@click.argument("arguments", nargs=-1, metavar="[-- prepare|train|evaluate|predict|... ...]")
def submit(
    cluster: str | None,
    address: str | None,
    insecure: bool,
    working_dir: str | None,
    no_wait: bool,
    attach: str | None,
    arguments: tuple[str, ...],
) -> Outcome:
    """Run a command as a job on a cluster, and follow its log.

    The exit code is that of the job.
    """
    from cluster.storage import local_path, plain_name
    from cluster.submit import Head, connected, follow, submit_job

    if cluster and address:
        raise OptionError("only one of --cluster and --address must be given. Received: both")
    if bool(attach) == bool(arguments):
        raise OptionError(
            f"either a command after -- or --attach JOB must be given. Received: {' '.join(arguments) or 'none'}"
        )
    if arguments:
        _check_job(arguments)
    elif attach:
        try:
            plain_name(attach, "--attach")
        except InputError as error:
            raise OptionError(str(error)) from error
    folder = local_path(working_dir, "--working-dir") if working_dir else None
    if folder and not folder.is_dir():
        raise OptionError(f"--working-dir must be an existing folder. Received: {working_dir}")
    file = None if address else local_path(cluster or "ray_cluster.yaml", "--cluster")
    head = Head(address, file, insecure)
    with connected(head) as client:
        job = attach or submit_job(client, arguments, folder, head)
        log.info("job %s%s", job, "" if attach else f" was submitted: kuzushiji {shlex.join(arguments)}")
        if no_wait:
            return {"job": job}, [f"to follow it: kuzushiji submit {head.option} --attach {job}"]
        code = follow(client, job, head)
    return {"job": job, "exit_code": code}, []


def _check_job(arguments: tuple[str, ...]) -> None:
    """Find usage errors before the job is submitted, not after minutes on a cluster.

    Raises:
        OptionError: the command can't run as a job.
        click.UsageError: its options are invalid.
    """
    name, *rest = arguments
    if name not in JOBS:
        raise OptionError(f"a job must be one of {', '.join(JOBS)}. Received: {name}")
    main.commands[name].make_context(f"kuzushiji {name}", rest)

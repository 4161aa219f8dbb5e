"""The command line. Commands import their dependencies when they run: `--help` loads neither TensorFlow nor Ray.

Of datasets: `data_commands.py`; of clusters: `submit_command.py`; all others are here.
"""

import logging
from dataclasses import asdict
from typing import Any

import click

from cluster.errors import OptionError, counted
from job.command import Output, command, main, option
from job.config import TrainConfig
from job.data_commands import canvases_option, labels_option, prepare, sample, start_limit_option
from job.submit_command import submit
from preprocessing.config import SPLITS

__all__ = ["evaluate", "export", "main", "predict", "prepare", "pull", "report", "sample", "submit", "train", "verify"]

log = logging.getLogger("kuzushiji")


@command
@click.option("--dataset", required=True, metavar="PLACE", help="Folder made by `prepare`.")
@click.option("--models", required=True, metavar="PLACE", help="Folder for the models: <architecture>/<run>/.")
@click.option("--architecture", "architectures", required=True, multiple=True, metavar="NAME",
              help="resnet (recommended), baseline, xception, resnet152v2, inceptionresnetv2, fcn (550 times the "
              "cost of baseline), or all. Can be repeated.")  # fmt: skip
@option(TrainConfig, "weights", metavar="WEIGHTS")
@option(TrainConfig, "unfreeze")
@option(TrainConfig, "workers")
@option(TrainConfig, "gpus_per_worker")
@option(TrainConfig, "cpus_per_worker")
@option(TrainConfig, "epochs")
@option(TrainConfig, "global_batch_size")
@option(TrainConfig, "partitions")
@option(TrainConfig, "learning_rate")
@option(TrainConfig, "schedule", metavar="constant|cosine")
@option(TrainConfig, "augment", metavar="none|standard")
@option(TrainConfig, "weight_decay")
@option(TrainConfig, "label_smoothing")
@option(TrainConfig, "precision", metavar="NAME")
@option(TrainConfig, "deterministic", "--deterministic/--fast")
@option(TrainConfig, "sampling", metavar="uniform|balanced")
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
) -> Output:
    """Train and evaluate classifiers with Ray Train."""
    from cluster.places import reachable_place
    from job.config import configs_of
    from job.model.pretrained import weights_option
    from job.tables import outcome_lines, outcome_result
    from job.train.driver import default_cpus_per_worker
    from job.train.driver import train as start

    if options["cpus_per_worker"] is None:
        options["cpus_per_worker"] = default_cpus_per_worker(max(1, options["workers"]))
    given = weights_option(weights)
    configs = configs_of(architectures, weights=given.identity if given else weights, **options)
    places = reachable_place(dataset), reachable_place(models)
    outcomes = start(*places, configs, run, given, start_limit)
    return outcome_result(outcomes), outcome_lines(outcomes)


@command
@click.option("--model", required=True, metavar="PLACE", help="Model folder, or architecture folder (latest run).")
@click.option("--dataset", required=True, metavar="PLACE",
              help="Folder made by `prepare`, with the model's classes and margin.")  # fmt: skip
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True, help="Split to evaluate.")
@click.option("--out", metavar="PLACE", help="Folder for metrics.json, per_class.csv and misclassified.csv.")
def evaluate(model: str, dataset: str, split: str, out: str | None) -> Output:
    """Evaluate a model on a split, and list its confusions."""
    from cluster.places import reachable_place
    from job.evaluate import evaluate as run
    from job.evaluate import write_evaluation
    from job.tables import evaluation_lines

    folder = reachable_place(out) if out else None
    evaluation = run(reachable_place(model), reachable_place(dataset), split, folder)
    if folder:
        write_evaluation(evaluation, folder)
    lines = evaluation_lines(evaluation, split) + ([f"tables: {out}"] if out else [])
    return {"split": split} | asdict(evaluation.metrics), lines


@command
@click.option("--model", required=True, metavar="PLACE", help="Model folder, or architecture folder (latest run).")
@click.option("--pages", required=True, metavar="PLACE", help="Folder or .zip of page scans: <image_id>.jpg, .png ...")
@labels_option("--boxes", "Label files as for prepare; the characters may be missing.", required=True)
@canvases_option
@click.option("--out", required=True, metavar="PLACE", help="New folder for the tables, or one to complete.")
@click.option("--format", "form", type=click.Choice(["parquet", "csv"]), default="parquet", show_default=True,
              help="Format of the tables.")  # fmt: skip
@click.option("--annotate", metavar="PLACE", help="Folder for pictures of the pages with the predicted characters.")
@click.option("--min-confidence", default=0.0, show_default=True, type=click.FloatRange(0, 1), metavar="P",
              help="Show 〓 in texts and pictures for characters less probable than P.")  # fmt: skip
@click.option("--gpus", default=0, show_default=True, type=click.IntRange(min=0),
              help="Number of actors, each with one GPU; 0: one task per CPU.")  # fmt: skip
@click.option("--rescale", is_flag=True,
              help="Scale boxes that were made for another page size, if --boxes states it.")  # fmt: skip
@start_limit_option
def predict(
    model: str,
    pages: str,
    boxes: tuple[str, ...],
    canvases: str | None,
    out: str,
    form: str,
    annotate: str | None,
    min_confidence: float,
    gpus: int,
    rescale: bool,
    start_limit: float,
) -> Output:
    """Predict the characters in boxes of new pages, and their text."""
    from cluster.places import reachable_place
    from job.predict.predict import predict as run
    from job.tables import predictions_lines, predictions_result

    manifest, new = run(
        reachable_place(model),
        reachable_place(pages),
        [reachable_place(text) for text in boxes],
        reachable_place(out),
        form=form,
        annotate=reachable_place(annotate) if annotate else None,
        gpus=gpus,
        start_limit=start_limit,
        rescale=rescale,
        canvases=reachable_place(canvases) if canvases else None,
        min_confidence=min_confidence,
    )
    return predictions_result(manifest, out, new), predictions_lines(manifest, out, new, annotate)


@command
@click.option("--model", required=True, metavar="PLACE", help="Model folder, or architecture folder (latest run).")
@click.option("--format", "form", type=click.Choice(["savedmodel", "onnx", "tflite"]), required=True,
              help="savedmodel: TensorFlow Serving; onnx: ONNX; tflite: LiteRT on small devices.")  # fmt: skip
@click.option("--quantize", type=click.Choice(["none", "float16", "int8"]), default="none", show_default=True,
              help="Precision of a tflite; int8 is calibrated on crops of --dataset.")  # fmt: skip
@click.option("--out", required=True, metavar="PLACE", help="New or empty folder.")
@click.option("--dataset", metavar="PLACE",
              help="Folder made by `prepare`, with the model's classes and margin; compares accuracies.")  # fmt: skip
@click.option("--split", type=click.Choice(SPLITS), help="Split to compare on.  [default: test]")
def export(model: str, form: Any, quantize: Any, out: str, dataset: str | None, split: str | None) -> Output:
    """Convert a model for other programs, and compare predictions."""
    from cluster.places import reachable_place
    from job.export.export import export as run

    if split and dataset is None:
        raise OptionError(f"--split must be given with --dataset. Received: --split {split} alone")
    data = None if dataset is None else reachable_place(dataset)
    exported = run(reachable_place(model), form, reachable_place(out), quantize, data, split or "test")
    lines = [
        f"{form}: {out}, {sum(exported.files.values()):,} bytes",
        f"probabilities differ from the model's by at most {exported.largest_difference:.1g} (float32, random images)",
    ]
    if accuracy := exported.accuracy:
        lines.append(
            f"accuracy on {accuracy.split} ({accuracy.crops:,} crops): {accuracy.of_export:.4f} (model: "
            f"{accuracy.of_model:.4f}); the same class predicted for {accuracy.same:.2%}"
        )
    return {"out": out} | asdict(exported), lines


@command
@click.option("--dataset", metavar="PLACE",
              help="Folder made by `prepare`; with --models: the dataset of all the runs, for pictures.")  # fmt: skip
@click.option("--models", metavar="PLACE", help="Folder of trained models; shows the latest run of each architecture.")
@click.option("--out", required=True, metavar="PLACE", help="Folder for report.html.")
def report(dataset: str | None, models: str | None, out: str) -> Output:
    """Write a self-contained HTML report of a dataset or of models."""
    from cluster.places import reachable_place
    from cluster.storage import write_bytes
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
def pull(models: str, to: str, names: tuple[str, ...]) -> Output:
    """Download trained models, and verify them.

    Without names, the latest run of each architecture.
    """
    from cluster.places import local_path, place, reachable_place
    from cluster.pull import pull as fetch

    pulled = fetch(reachable_place(models), place(local_path(to, "--to")), names)
    lines = [
        f"{model.name}/{model.run}: {model.new_bytes:,} bytes downloaded, all files verified: {model.folder}"
        for model in pulled
    ]
    return {"models": [vars(model) for model in pulled]}, lines


@command
@click.argument("folder", metavar="PLACE")
def verify(folder: str) -> Output:
    """Verify a folder that a command wrote, or a cluster file.

    Folders (datasets, models, predictions) are verified against their manifest. A cluster file (.yaml) is checked
    before `ray up`.
    """
    from cluster.cluster_file import SUFFIXES, faults_of_cluster_file
    from cluster.models import resolve_model
    from cluster.places import local_path, reachable_place
    from job.verify import verify as check

    if folder.endswith(SUFFIXES):
        faults = faults_of_cluster_file(local_path(folder, "a cluster file"))
        verdict = counted(len(faults), "fault") if faults else "no faults (Google was not asked whether names exist)"
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

"""One GPU: crops/s of a training against `keras.Model.fit`, a step's time by kernel, losses against those of CPUs.

python -m benchmarks.gpu rates DATASET                     # about 30 s per line on an H100
python -m benchmarks.gpu losses DATASET [--against FILE]   # prints JSON lines: FILE for a call on another machine

`PYTHONPATH=tests`; DATASET is a folder that `prepare` wrote. Each line is measured in a process of its own, because
determinism and precision are settings of a process, and is printed at once. Without a GPU it runs on the CPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from cluster.places import place
from job.config import NAMES, RECIPES, TrainConfig

PRECISIONS = ("float32", "mixed_bfloat16")
MODES = ("train", "fit", "train-without-xla", "train-deterministic")
KERNELS_SHOWN = 12
STEPS_BY_KERNEL = 10


class Bench:
    """The training step of a `train` worker, in this process."""

    def __init__(self, dataset: str, architecture: Any, precision: Any, size: int, mode: str) -> None:
        """Build the step. mode: one of `MODES`; `fit` leaves all settings at TensorFlow's defaults."""
        import keras
        import tensorflow as tf

        from job.data.staging import staged
        from job.model.architectures import ARCHITECTURES, XLA_COMPILES
        from job.model.load_tensorflow import configure_gpus
        from job.train.optimizer import FusedAdam
        from job.train.step import Steps, training_form
        from job.train.strategy import configure_tensorflow, make_strategy

        gpus = len(tf.config.list_physical_devices("GPU"))
        self.config = TrainConfig(
            architecture=architecture, precision=precision, global_batch_size=size, gpus_per_worker=gpus, epochs=1,
            learning_rate=RECIPES[architecture].learning_rate, deterministic=mode == "train-deterministic",
            cpus_per_worker=8,
        )  # fmt: skip
        if mode == "fit":
            configure_gpus(gpus > 0)
            keras.config.set_dtype_policy(precision)
            keras.utils.set_random_seed(self.config.seed)
        else:
            configure_tensorflow(self.config)
        with staged(place(dataset), ["train"]) as data:
            crops = data.splits["train"]
            self.images, self.labels = np.array(crops.images), np.array(crops.labels)
            self.plain = ARCHITECTURES[architecture](len(data.class_names))
        if mode == "fit":
            self.plain.compile(
                keras.optimizers.Adam(self.config.learning_rate),
                "sparse_categorical_crossentropy",
                metrics=["accuracy"],
            )
            return
        model = training_form(self.plain, self.config.seed, dropout=True, synchronized=not gpus)
        optimizer = FusedAdam(self.config.learning_rate)
        optimizer.build(model.trainable_variables)
        xla = mode == "train" and gpus > 0 and architecture in XLA_COMPILES
        self.steps = Steps(make_strategy(1), 1, model, optimizer, size, xla=xla)

    def batches(self, steps: int) -> Iterator[tuple[Any, Any]]:
        """Yield batches, gathered as `Training.rows_of` does, but with replacement: the dataset may be small."""
        size = self.config.global_batch_size
        order = np.random.default_rng(0).integers(0, len(self.labels), steps * size)
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            yield self.images[rows], self.labels[rows]

    def train(self, steps: int) -> None:
        for images, labels in self.batches(steps):
            sums = self.steps.train(images, labels, 0)
        sums.numpy()  # waits for the steps in the GPU's queue

    def losses(self, steps: int) -> list[float]:
        return [float(self.steps.train(*batch, 0)[0]) / len(batch[1]) for batch in self.batches(steps)]


def rate(bench: Bench, mode: str, steps: int, repeats: int) -> str:
    """Return a line with crops/s, without the first round, which compiles."""
    seconds: list[float] = []
    if mode == "fit":
        import keras

        class Clock(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
            def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
                self.begin = time.perf_counter()

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                seconds.append(time.perf_counter() - self.begin)

        images, labels = (np.concatenate(part) for part in zip(*bench.batches(steps), strict=True))
        size = bench.config.global_batch_size
        bench.plain.fit(images, labels, size, epochs=1 + repeats, verbose=0, callbacks=[Clock()])
    else:
        for _ in range(1 + repeats):
            seconds.append(timed(lambda: bench.train(steps)))
    typical = median(seconds[1:])
    crops = steps * bench.config.global_batch_size / typical
    return f"{crops:,.0f} crops/s, {typical / steps * 1e3:.2f} ms a step; the first {steps} took {seconds[0]:.1f} s"


def timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def kernels(bench: Bench) -> Iterator[str]:
    """Yield the kernels that a GPU ran in a step, longest first. Without a GPU, yield nothing."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        bench.train(STEPS_BY_KERNEL)
        tf.profiler.experimental.stop()
        (written,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(written.read_bytes())
    for plane in space.planes:
        if "/device:GPU" not in plane.name:
            continue
        spent: Counter[str] = Counter()
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    spent[plane.event_metadata[event.metadata_id].name] += event.duration_ps / 1e9 / STEPS_BY_KERNEL
        yield f"  {plane.name}: {spent.total():.2f} ms a step in {len(spent)} kernels"
        yield from (f"  {ms:8.3f} ms  {name[:100]}" for name, ms in spent.most_common(KERNELS_SHOWN))


def one_rate(given: argparse.Namespace) -> None:
    mode, precision = given.one.split(":")
    bench = Bench(given.dataset, given.architecture, precision, given.size, mode)
    click.echo(f"{given.architecture} {mode} {precision}: {rate(bench, mode, given.steps, given.repeats)}")
    if mode != "fit":
        click.echo("\n".join(kernels(bench)))


def one_loss(given: argparse.Namespace) -> None:
    architecture, precision = given.one.split(":")
    bench = Bench(given.dataset, architecture, precision, given.size, "train-deterministic")
    found = bench.losses(given.steps)
    row = {"training": given.one, "losses": found}
    for line in Path(given.against).read_text().splitlines() if given.against else []:
        known = json.loads(line)
        if known["training"] == f"{architecture}:float32":
            row["off"] = [f"{abs(a - b) / b:.1e}" for a, b in zip(found, known["losses"], strict=True)]
    click.echo(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Measure one GPU.")
    parser.add_argument("what", choices=["rates", "losses"])
    parser.add_argument("dataset")
    parser.add_argument("--architecture", choices=NAMES, default="baseline", help="whose rates")
    parser.add_argument("--size", type=int, default=512, help="crops of a batch")
    parser.add_argument("--steps", type=int, default=24, help="of a round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", help="file with the lines of an earlier `losses`")
    parser.add_argument("--seconds", type=float, default=120, help="after which a line is given up")
    parser.add_argument("--one", help="this line alone, in this process")
    given = parser.parse_args()
    if given.one:
        (one_rate if given.what == "rates" else one_loss)(given)
        return
    names = MODES if given.what == "rates" else NAMES
    for one in (f"{name}:{precision}" for precision in PRECISIONS for name in names):
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--one", one]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=given.seconds)
            click.echo(done.stdout.strip() or f"{one}: {done.stderr.strip()[-300:]}")
        except subprocess.TimeoutExpired:
            click.echo(f"{one}: more than {given.seconds:g} s")


if __name__ == "__main__":
    main()

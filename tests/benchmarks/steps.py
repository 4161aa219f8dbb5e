"""The training step and its input in one process, without Ray: against `tf.data`, `keras.Model.fit` and `predict`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.pairs import Ratio, compare
from cluster.places import place
from job.config import TrainConfig
from job.model.load_tensorflow import without_chatter

Ask = Callable[[str, int], float]
"""Takes the name of a measure and an amount; returns a rate."""


@contextmanager
def process(dataset: Path, config: TrainConfig) -> Iterator[Ask]:
    """Start a process with TensorFlow. Yield a function that asks it to measure something."""
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    child = spawn.Process(target=_serve, args=(there, dataset, config), daemon=True)
    child.start()
    there.close()

    def ask(name: str, amount: int) -> float:
        here.send((name, amount))
        rate: float = here.recv()
        return rate

    try:
        yield ask
    finally:
        here.close()
        child.join(timeout=60)
        child.kill()


def measure_input(ask: Ask, pairs: int, batches: int) -> Ratio:
    ours, theirs = partial(ask, "input", batches), partial(ask, "input_from_memory", batches)
    return compare("input_vs_memory", 1.0, "crops/s of CPU", ours, theirs, pairs)


def measure_step(ask: Ask, pairs: int, steps: int) -> Ratio:
    return compare("step_vs_fit", 0.98, "crops/s", partial(ask, "loop", steps), partial(ask, "fit", steps), pairs)


def measure_evaluate(ask: Ask, pairs: int, batches: int) -> Ratio:
    ours, theirs = partial(ask, "evaluate", batches), partial(ask, "predict", batches)
    return compare("evaluate_vs_predict", 0.98, "crops/s", ours, theirs, pairs)


def _serve(there: Connection, dataset: Path, config: TrainConfig) -> None:
    with without_chatter():
        import keras

        from job.data.staging import staged
        from job.model.architectures import ARCHITECTURES
        from job.model.inference import Inference
        from job.train.optimizer import FusedAdam
        from job.train.step import Steps, training_form
        from job.train.strategy import configure_tensorflow, make_strategy

        configure_tensorflow(config)
        strategy = make_strategy(1)
    with staged(place(dataset), ["train"]) as data:
        plain = ARCHITECTURES[config.architecture](len(data.class_names))
        model = training_form(plain, config.seed, dropout=True)
        optimizer = FusedAdam(config.learning_rate)
        optimizer.build(model.trainable_variables)
        measures = Measures(config, data.splits["train"], data.class_names)
        measures.steps = Steps(strategy, 1, model, optimizer, config.global_batch_size)
        measures.inference = Inference(model)
        measures.plain = plain
        measures.plain.compile(
            keras.optimizers.Adam(config.learning_rate),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=False,
        )
        while True:
            try:
                name, amount = there.recv()
            except EOFError:
                return
            there.send(getattr(measures, name)(amount))


class Measures:
    """Each method runs `amount` batches, and returns crops per second."""

    steps: Any
    inference: Any
    plain: Any

    def __init__(self, config: TrainConfig, crops: Any, class_names: list[str]) -> None:
        from job.data.order import permutation

        self.size, self.crops, self.class_names = config.global_batch_size, crops, class_names
        self.images, self.labels = crops.images[:], crops.labels[:]  # in memory
        self.permutation = partial(permutation, len(crops), config.seed, 1)
        self.order = self.permutation()

    def _batches(self, amount: int) -> Iterator[tuple[Any, Any]]:
        """Yield batches, gathered as `Training.rows_of` does for a single worker."""
        for step in range(amount):
            rows = self.order[step * self.size : (step + 1) * self.size]
            yield self.crops.images[rows], self.crops.labels[rows]

    def input(self, amount: int) -> float:
        begin = time.process_time()
        self.order = self.permutation()
        for _ in self._batches(amount):
            pass
        return amount * self.size / (time.process_time() - begin)

    def input_from_memory(self, amount: int) -> float:
        import tensorflow as tf

        options = tf.data.Options()
        options.threading.private_threadpool_size = 1
        options.autotune.enabled = False
        begin = time.process_time()
        batches = tf.data.Dataset.from_tensor_slices((self.images, self.labels)).shuffle(len(self.labels))
        for _ in batches.batch(self.size, drop_remainder=True).with_options(options).take(amount):
            pass
        return amount * self.size / (time.process_time() - begin)

    def loop(self, amount: int) -> float:
        begin = time.perf_counter()
        for images, labels in self._batches(amount):
            sums = self.steps.train(images, labels, 0)
        sums.numpy()
        return amount * self.size / (time.perf_counter() - begin)

    def fit(self, amount: int) -> float:
        import keras

        class Clock(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
            """Measures from the first batch to the last, without what `fit` does before."""

            def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
                self.begin = time.perf_counter() if batch == 0 else self.begin

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                self.end = time.perf_counter()

        clock, rows = Clock(), slice(amount * self.size)
        self.plain.fit(self.images[rows], self.labels[rows], self.size, verbose=0, callbacks=[clock])
        return amount * self.size / (clock.end - clock.begin)

    def evaluate(self, amount: int) -> float:
        from job.metrics import metrics

        rows = slice(amount * self.size)
        begin = time.perf_counter()
        predictions = self.inference.predict(self.crops.images[rows], self.crops.labels[rows])
        metrics(predictions, self.crops.labels[rows], self.class_names)
        return amount * self.size / (time.perf_counter() - begin)

    def predict(self, amount: int) -> float:
        images = self.images[: amount * self.size]
        begin = time.perf_counter()
        self.plain.predict(images, batch_size=self.size, verbose=0)
        return amount * self.size / (time.perf_counter() - begin)

"""Reading of pages: `predict` on all cores, against decoding, cutting and the model in as many processes."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.pages import Page, Source, cut
from benchmarks.pairs import Rate, Ratio, compare
from cluster.manifest import read_manifest
from cluster.models import ModelManifest
from cluster.places import place
from job.predict.predict import predict
from job.predict.readings import BATCH, TOP

CLASSES = 514  # those of Kaggle's pages with the default coverage


def measure(source: Source, times: int, pairs: int, folder: Path) -> Ratio:
    """Measure `predict_vs_parts` in the Ray that this process is connected to.

    Start-up does not count: the time to read a third of the pages is subtracted.
    """
    cores, model = os.cpu_count() or 1, write_any_model(folder / "models")
    few, many = source.repeated(times // 3, folder / "few-read"), source.repeated(times, folder / "many-read")
    out, count = folder / "read", len(source.pages())

    def seconds(of: Source) -> float:
        shutil.rmtree(out, ignore_errors=True)
        begin = time.perf_counter()
        predict(place(model), place(of.images), place(of.labels), place(out))
        return time.perf_counter() - begin

    def whole() -> float:
        return (times - times // 3) * count / (-seconds(few) + seconds(many))

    with parts(model, source.pages(), cores, max(1, times // cores)) as rate:
        return compare("predict_vs_parts", 0.85, "pages/s", whole, rate, pairs)


def write_any_model(models: Path) -> Path:
    """Write a `resnet` with random weights, which takes as much time as a trained one. Return its folder."""
    process = get_context("spawn").Process(target=_write, args=(models / "resnet" / "bench",))
    process.start()
    process.join()
    assert process.exitcode == 0
    return models / "resnet" / "bench"


def _write(folder: Path) -> None:
    import keras

    from job.model.architectures import ARCHITECTURES
    from job.model.folder import write_model

    keras.utils.set_random_seed(1)
    labels = "".join(f"U+{0x4E00 + i:04X}\n" for i in range(CLASSES - 1)) + "rare\n"
    model = ARCHITECTURES["resnet"](CLASSES)
    write_model(place(folder), model, {"labels.txt": labels, "config.json": "{}"}, "0" * 64)


@contextmanager
def parts(model: Path, pages: Sequence[Page], processes: int, rounds: int) -> Iterator[Rate]:
    """Start one-thread processes that only decode and cut pages and run the model. Yield their total pages/s."""
    spawn = get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(processes)]
    children = [spawn.Process(target=_serve, args=(there, model, pages), daemon=True) for _, there in pipes]
    for child, (_, there) in zip(children, pipes, strict=True):
        child.start()
        there.close()
    ends = [here for here, _ in pipes]

    def rate() -> float:
        for end in ends:
            end.send(rounds)
        return sum(end.recv() for end in ends)

    try:
        yield rate
    finally:
        for end in ends:
            end.close()
        for child in children:
            child.join(timeout=60)
            child.kill()


def _serve(there: Connection, model: Path, pages: Sequence[Page]) -> None:
    import cv2

    from job.predict.read_group import _load

    cv2.setNumThreads(1)
    inference, _ = _load(str(model), read_manifest(place(model), ModelManifest).sha256, False)
    while True:
        try:
            rounds = there.recv()
        except EOFError:
            return
        begin = time.perf_counter()
        crops: list[np.ndarray] = []
        for _ in range(rounds):
            for page in pages:
                crops += cut(page)
                while len(crops) >= BATCH:
                    inference.top(np.stack(crops[:BATCH])[..., None], TOP)
                    del crops[:BATCH]
        if crops:
            inference.top(np.stack(crops)[..., None], TOP)
        there.send(rounds * len(pages) / (time.perf_counter() - begin))

"""`pull` of a model folder from a bucket over real HTTP, against one plain download of the same bytes."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.pairs import Ratio, compare

# About those of a `baseline`.
FILES = {"model.keras": 152_000_000, "per_class.csv": 30_000, "misclassified.csv": 300_000, "history.jsonl": 2_000}
BUCKET = "demo"


@contextmanager
def bucket() -> Iterator[dict[str, str]]:
    """A strict bucket in a process of its own, so that it takes no time of ours; its environment."""
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=_serve, args=(there,), daemon=False)
    server.start()
    there.close()
    try:
        yield here.recv()
    finally:
        here.close()
        server.join()


def _serve(there: Connection) -> None:
    from fake_cloud.bucket import StrictBucket

    with StrictBucket() as strict:
        strict.create(BUCKET)
        there.send(dict(strict.environment))
        try:
            there.recv()
        except EOFError:
            return


def measure(folder: Path, pairs: int, scale: float) -> Ratio:
    """The bucket is named by this process's environment from then on. scale: of the files' sizes."""
    with bucket() as environment:
        os.environ.update(environment)
        sizes = {name: int(size * scale) for name, size in FILES.items()}
        return _compare(folder, sizes, pairs)


def _compare(folder: Path, sizes: dict[str, int], pairs: int) -> Ratio:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    from cluster.manifest import seal, write_listed
    from cluster.models import ModelManifest, point_to_latest
    from cluster.pull import pull
    from cluster.storage import place

    models, rng = place(f"gs://{BUCKET}/models"), np.random.default_rng(0)
    run = models / "baseline" / "one"
    entries = [write_listed(run / name, rng.bytes(size)) for name, size in sizes.items()]
    manifest = ModelManifest(files=entries, dataset_manifest_sha256="0" * 64, finished_at=datetime.now(UTC))
    seal(run, manifest)
    point_to_latest(run, manifest)
    plain = Client(project=BUCKET, credentials=AnonymousCredentials()).bucket(BUCKET)

    def pulled() -> float:
        shutil.rmtree(folder / "pulled", ignore_errors=True)
        begin = time.perf_counter()
        pull(models, place(folder / "pulled"))
        return sum(sizes.values()) / (time.perf_counter() - begin)

    def downloaded() -> float:
        shutil.rmtree(folder / "downloaded", ignore_errors=True)
        (folder / "downloaded").mkdir()
        begin = time.perf_counter()
        for name in sizes:
            plain.blob(f"models/baseline/one/{name}").download_to_filename(folder / "downloaded" / name)
        return sum(sizes.values()) / (time.perf_counter() - begin)

    return compare("pull_vs_copy", 0.9, "bytes/s", pulled, downloaded, pairs)

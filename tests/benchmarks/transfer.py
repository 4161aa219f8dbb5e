"""`pull` of a model folder from a bucket over real HTTP, against one plain download of the same bytes."""

import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.bucket import BUCKET
from benchmarks.pairs import Ratio, compare

# About the sizes of a `baseline`.
FILES = {"model.keras": 152_000_000, "per_class.csv": 30_000, "misclassified.csv": 300_000, "history.jsonl": 2_000}


def measure(folder: Path, pairs: int, scale: float) -> Ratio:
    """Measure `pull_vs_copy`; `bucket()` must be running. scale: factor of the files' sizes."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    from cluster.manifest import seal, write_listed
    from cluster.models import ModelManifest, point_to_latest
    from cluster.places import place
    from cluster.pull import pull

    sizes = {name: int(size * scale) for name, size in FILES.items()}
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

"""`verify`: check a folder of any kind against its manifest."""

from upath import UPath

from cluster import manifest
from cluster.manifest import Manifest
from cluster.models import ModelManifest
from job.predict.folder import PredictionsManifest
from preprocessing.dataset import DatasetManifest

KINDS = (DatasetManifest, ModelManifest, PredictionsManifest)


def verify(folder: UPath) -> tuple[Manifest, list[str], list[str]]:
    """Check a folder of any kind that the project writes, see `cluster.manifest.verify`.

    Returns:
        The manifest, the faults (one line per file), and the names of files that the manifest does not list.
    """
    return manifest.verify(folder, KINDS)

"""`verify`: a folder of any kind, checked against its manifest."""

from upath import UPath

from cluster import manifest
from cluster.manifest import Manifest
from cluster.models import ModelManifest
from job.predict.folder import PredictionsManifest
from preprocessing.dataset import DatasetManifest

KINDS = (DatasetManifest, ModelManifest, PredictionsManifest)


def verify(folder: UPath) -> tuple[Manifest, list[str], list[str]]:
    """As `cluster.manifest.verify`, for every kind of folder that the project writes."""
    return manifest.verify(folder, KINDS)

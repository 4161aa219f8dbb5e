"""The global batch size and the partitions that a dataset allows, checked before anything starts."""

import logging

from cluster.errors import InputError, OptionError
from job.config import RECIPES, TrainConfig
from job.data.partitions import Partitions
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest

log = logging.getLogger("kuzushiji")


def fit_to_dataset(manifest: DatasetManifest, config: TrainConfig) -> TrainConfig:
    """Return the config with a global batch size of at most the number of training crops. Log what changes.

    Raises:
        InputError: a split has no crops.
        OptionError: a batch has fewer crops than there are replicas, the number of partitions does not divide the batch
            size, or there are too many partitions.
    """
    crops_by_split = {split: sum(shard.examples for shard in manifest.shards_of(split)) for split in SPLITS}
    if not all(crops_by_split.values()):
        raise InputError(f"--dataset must have crops in every split. Received: {crops_by_split}")
    size = _batch_size(manifest, config, crops_by_split["train"])
    replicas = config.workers * max(1, config.gpus_per_worker)
    if replicas > size:
        raise OptionError(
            f"each worker (and GPU) must get a crop of each batch. Received: {replicas} for a batch of {size}. "
            "Raise --global-batch-size, or lower --workers or --gpus-per-worker"
        )
    default = RECIPES[config.architecture].global_batch_size
    if size != default:
        log.info(
            "%s: global batch size %d, its default is %d; the learning rate stays %g, it is not scaled",
            config.architecture,
            size,
            default,
            config.learning_rate,
        )
    return config.model_copy(update={"global_batch_size": size})


def _batch_size(manifest: DatasetManifest, config: TrainConfig, crops: int) -> int:
    """Return the global batch size, lowered if there are fewer crops. Each partition gives an equal part of a batch.

    Raises:
        OptionError: the number of partitions does not divide the batch size, or a partition has no training crops.
    """
    wanted, parts = config.global_batch_size, config.partitions
    if wanted % parts:
        raise OptionError(f"--partitions must divide --global-batch-size. Received: {parts} and {wanted}")
    smallest = min(Partitions.of(manifest, parts, wanted, config.seed).sizes("train"))
    if not smallest:
        shards = sum(shard.examples > 0 for shard in manifest.shards_of("train"))
        raise OptionError(
            f"--partitions must be at most the number of training shards, {shards}. Received: {parts}. Lower it"
        )
    size = min(wanted, parts * smallest)
    if size < wanted:
        most = "the number of training crops" if parts == 1 else f"{parts} times the crops of the smallest partition"
        log.warning("%s: --global-batch-size %d is lowered to %d, %s", config.architecture, wanted, size, most)
    if parts > 1 and parts % config.workers:
        log.warning(
            "%s: --partitions %d is not a multiple of --workers %d: some parts are staged by several workers",
            config.architecture,
            parts,
            config.workers,
        )
    if parts > 1:
        taken = smallest // (size // parts) * size
        log.info("%s: %d partitions, %d of %d training crops in an epoch", config.architecture, parts, taken, crops)
    return size

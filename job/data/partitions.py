"""Partitions: which shards of a dataset a worker holds, and which of their crops it trains on and evaluates.

The shards of each split are dealt to C partitions. A global batch has B / C crops of each partition, one partition
after the other, so a worker needs only the partitions of its own rows. With one partition, each worker holds the whole
dataset.

The rows of a split are its crops, partition by partition, and within a partition shard by shard. The rows that a worker
holds are consecutive. The crops of a global batch depend on seed, epoch and C, and not on the workers, as with the
canonical nodes of MosaicML's Streaming (docs.mosaicml.com/projects/streaming).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, zip_longest
from typing import Self

import numpy as np
from numpy.typing import NDArray

from job.data.order import balanced_order, permutation, share
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest, Shard


def deal(shards: Sequence[Shard], partitions: int, seed: int) -> list[list[Shard]]:
    """Deal shards to partitions, so that these have nearly equal numbers of crops.

    Shards are dealt by descending size, each to the partition with the fewest crops so far, and those of equal size in
    random order. Within a partition, shards keep their order.
    """
    shuffled = np.random.default_rng(seed).permutation(len(shards)).tolist()
    dealt: list[list[int]] = [[] for _ in range(partitions)]
    crops = [0] * partitions
    for number in sorted(shuffled, key=lambda number: -shards[number].examples):
        fewest = crops.index(min(crops))
        dealt[fewest].append(number)
        crops[fewest] += shards[number].examples
    return [[shards[number] for number in sorted(numbers)] for numbers in dealt]


@dataclass(frozen=True)
class Partitions:
    """The partitions of a training, for one of its workers. B, the global batch size, is a multiple of C."""

    shards: Mapping[str, Sequence[Sequence[Shard]]]
    """Split to the shards of each of the C partitions."""
    global_batch_size: int
    seed: int
    rank: int = 0
    workers: int = 1

    @classmethod
    def of(
        cls,
        manifest: DatasetManifest,
        partitions: int,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        workers: int = 1,
    ) -> Self:
        """Deal the shards of each split."""
        shards = {split: deal(manifest.shards_of(split), partitions, seed) for split in SPLITS}
        return cls(shards, global_batch_size, seed, rank, workers)

    @property
    def steps(self) -> int:
        """Steps per epoch: as many as the crops of the smallest partition allow."""
        return min(self.sizes("train")) // self._rows_of_each

    @property
    def _rows_of_each(self) -> int:
        """Rows of each partition in a global batch, B / C."""
        return self.global_batch_size // len(self.shards["train"])

    @cached_property
    def _starts(self) -> dict[str, list[int]]:
        """Split to the first row of each partition, followed by the number of rows of the split."""
        return {
            split: [0, *accumulate(sum(shard.examples for shard in shards) for shards in partitions)]
            for split, partitions in self.shards.items()
        }

    def sizes(self, split: str) -> list[int]:
        """Return the number of crops in each partition."""
        return [end - start for start, end in pairwise(self._starts[split])]

    def crops(self, split: str) -> int:
        """Return the number of crops of a split."""
        return self._starts[split][-1]

    def held_by(self, worker: int) -> range:
        """Return the partitions that a worker holds: those with a row among its rows of a global batch."""
        first, end = share(self.global_batch_size, worker, self.workers)
        return range(first // self._rows_of_each, (end - 1) // self._rows_of_each + 1)

    def held_shards(self, split: str) -> list[Shard]:
        """Return the shards that this worker holds."""
        return [shard for number in self.held_by(self.rank) for shard in self.shards[split][number]]

    def held_rows(self, split: str) -> slice:
        """Return the rows of a split that this worker holds."""
        return self._rows_in(split, self.held_by(self.rank))

    def own_rows(self, split: str) -> slice:
        """Return the rows that this worker holds and no worker of a lower rank does. Each row is one worker's own."""
        begin = self.held_by(self.rank - 1).stop if self.rank else 0
        return self._rows_in(split, range(begin, self.held_by(self.rank).stop))

    def _rows_in(self, split: str, numbers: range) -> slice:
        """Return the rows of a split in consecutive partitions."""
        starts = self._starts[split]
        return slice(starts[numbers.start], starts[numbers.stop])

    def local(self, split: str, rows: slice) -> slice:
        """Return the positions of rows of a split among the rows that this worker holds."""
        first = self.held_rows(split).start
        return slice(rows.start - first, rows.stop - first)

    def batches(self, epoch: int, labels: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the rows of this worker in each global batch of an epoch, (steps, n) int64.

        They are positions among the training crops that the worker holds.

        labels: (held,) of these crops, so that each class of a partition appears equally often. None: each crop appears
        at most once.
        """
        first, end = share(self.global_batch_size, self.rank, self.workers)
        sizes, each, parts, start = self.sizes("train"), self._rows_of_each, [], 0
        for number in self.held_by(self.rank):
            if labels is None:
                order = permutation(sizes[number], self.seed, epoch, number)
            else:
                order = balanced_order(labels[start : start + sizes[number]], self.seed, epoch, number)
            of_worker = slice(max(0, first - number * each), min(each, end - number * each))
            parts.append(start + order[: self.steps * each].reshape(self.steps, each)[:, of_worker])
            start += sizes[number]
        return np.concatenate(parts, axis=1)

    def evaluated(self, split: str, most: int) -> Iterator[tuple[slice, ...]]:
        """For each step of an evaluation, yield the rows of the split that each worker reads, at most `most`.

        The workers that hold a partition share its rows. All workers take each step together; one that has no rows
        left gets an empty slice.
        """
        of_worker: list[list[slice]] = [[] for _ in range(self.workers)]
        start = 0
        for number, size in enumerate(self.sizes(split)):
            holders = [worker for worker in range(self.workers) if number in self.held_by(worker)]
            for begin in range(start, start + size, len(holders) * most):
                rows = min(len(holders) * most, start + size - begin)
                for place, worker in enumerate(holders):
                    first, end = share(rows, place, len(holders))
                    of_worker[worker].append(slice(begin + first, begin + end))
            start += size
        yield from zip_longest(*of_worker, fillvalue=slice(start, start))

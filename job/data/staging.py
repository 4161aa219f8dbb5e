"""Staging: verify shards of a dataset and unpack them into flat arrays on this machine's disk, for memory-mapping.

Gathering rows from a memory-mapped array is faster than parsing records (325,000 crops/s on one core; TensorFlow:
97,000), and allows any order. A staged dataset exists as long as a process uses it: each user holds a shared lock in
its folder, and removes unlocked folders when it starts and when it ends, so the remains of a crash are removed soon.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import DamageError, InputError, KuzushijiError, OptionError
from cluster.local import lock as lock_file
from cluster.manifest import fault_of, read_manifest
from cluster.progress import progress
from cluster.storage import check_writable, fetch, list_files, local_file, writing_in
from job.data.unpacking import PAGES_FILE, SplitWriter, check_room, check_sizes, unpack
from preprocessing.books import volume_of
from preprocessing.classes import CLASSES_FILE, read_class_names
from preprocessing.dataset import VOLUMES, DatasetManifest, Shard
from preprocessing.parquet import PAGES_TABLE, books_of_table

log = logging.getLogger("kuzushiji")

SECONDS_BETWEEN_TRIES = 0.1  # to get the lock while another process stages
SECONDS_UNTIL_SAID = 2.0  # that it waits for the lock
SECONDS_TO_REMOVE = 10.0  # limit of the wait for the lock at the end
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # man7.org/linux/man-pages/man4/random.4.html
LOCK_FILE = "in-use"
ARRAYS = ("images", "labels", "code_points", "boxes")  # of `Crops`

Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""A function like `cluster.progress.progress`."""


@dataclass(frozen=True)
class Crops:
    """N crops of a split, memory-mapped, in the order of the shards."""

    images: NDArray[np.uint8]  # (N, 80, 80, 1)
    labels: NDArray[np.int64]  # (N,)
    code_points: NDArray[np.int32]  # (N,) of the box itself, also if the label is `rare`
    boxes: NDArray[np.int32]  # (N, 4) x, y, width, height
    pages_file: Path
    """Has one line per staged crop of the split: the id of its page."""
    first: int = 0
    """Line of the first crop."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Crops":
        """Return consecutive crops."""
        first, end, _ = rows.indices(len(self))
        arrays = {name: getattr(self, name)[first:end] for name in ARRAYS}
        return replace(self, **arrays, first=self.first + first)

    def page_ids(self) -> Iterator[str]:
        """Yield the id of the page of each crop, read from the disk: a list would take 75 bytes per crop."""
        with self.pages_file.open(encoding="utf-8", newline="\n") as lines:
            for line in islice(lines, self.first, self.first + len(self)):
                yield line.removesuffix("\n")


@dataclass(frozen=True)
class StagedDataset:
    """A verified dataset on this machine's disk."""

    manifest: DatasetManifest
    class_names: list[str]
    """Labels are indices into this list."""
    splits: dict[str, Crops]
    """The staged crops: all crops of a split, or those of some of its shards."""
    folder: Path
    """Folder on this machine's disk, removed with the staged dataset. Users may keep temporary files in it."""

    def books(self) -> dict[str, str]:
        """Return page id to book, or to volume if the dataset is of an earlier release.

        Raises:
            DamageError: the table of pages is not one that `prepare` writes, or lacks a page.
        """
        page_ids = {page_id for crops in self.splits.values() for page_id in crops.page_ids()}
        if self.manifest.book_rule == VOLUMES:
            return {page_id: volume_of(page_id) for page_id in page_ids}
        books = books_of_table(UPath(self.folder / PAGES_TABLE))
        if page_ids - books.keys():
            raise DamageError(
                f"{PAGES_TABLE} must have a row of each page. Received: none of {min(page_ids - books.keys())}"
            )
        return books


@contextmanager
def staged(dataset: UPath, splits: Sequence[str]) -> Iterator[StagedDataset]:
    """Stage splits of a dataset. Raises: as `staged_shards`; InputError: the folder is not sealed or not a dataset."""
    manifest = read_manifest(dataset, DatasetManifest)
    with staged_shards(dataset, manifest, {split: manifest.shards_of(split) for split in splits}) as data:
        yield data


@contextmanager
def staged_shards(
    dataset: UPath,
    manifest: DatasetManifest,
    shards: Mapping[str, Sequence[Shard]],
    shown: Progress = progress,
    check: Callable[[], None] = lambda: None,
    say: Callable[[str], object] = log.info,
) -> Iterator[StagedDataset]:
    """Stage shards of a dataset, or share them with another process of this machine. The last user removes them.

    Args:
        dataset: the dataset folder.
        manifest: its manifest.
        shards: split to the shards to stage.
        shown: shows the progress.
        check: called repeatedly while this process stages, or waits for another one that stages; may raise to end it.
        say: called with a line for the log, if it waits.

    Raises:
        InputError: a split of the dataset has no crops.
        OptionError: the disk of this machine has too little room, or the folder can't be written to.
        DamageError: a file does not match the manifest.
        KuzushijiError: the disk is full.
    """
    names = {split: [shard.name for shard in shards[split]] for split in sorted(shards)}
    # Of this boot of this host: of arrays that were written before a power failure, or on another host with the same
    # disk, parts may read as zeros.
    key = hashlib.sha256(f"{BOOT_ID.read_text()}{dataset}\n{manifest.sha256}\n{names}".encode()).hexdigest()[:32]
    root = _created_root()
    folder = root / key
    with writing_in(root), _locked(root, check, say):
        _remove_unused(root, keep=key)
        if not folder.exists():
            try:
                _stage(dataset, manifest, shards, folder, shown, check)
            finally:
                _remove_unused(root, keep=key)  # what other processes left meanwhile
        in_use = open(folder / LOCK_FILE)  # noqa: SIM115 - kept open: the file holds the lock
        fcntl.flock(in_use, fcntl.LOCK_SH)
    try:
        class_names = read_class_names(UPath(folder / CLASSES_FILE), dataset / CLASSES_FILE)
        yield StagedDataset(manifest, class_names, {split: _map(folder / split) for split in shards}, folder)
    finally:
        in_use.close()
        until = time.monotonic() + SECONDS_TO_REMOVE

        def give_up() -> None:
            if time.monotonic() > until:
                raise TimeoutError

        # A process that holds the lock for so long is staging, and removes the folder afterwards. Other errors: the
        # folder of all staged datasets was removed, or can't be written to any more. The crops have been used.
        with suppress(OSError), _locked(root, give_up):
            _remove_unused(root)


def _created_root() -> Path:
    """Return the folder of all staged datasets, which is created if it is missing.

    A full disk is no error here: unused folders are removed before anything is written.

    Raises:
        OptionError: it can't be written to. After a plain KuzushijiError, Ray Train would restart the workers.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kuzushiji" / "staged"
    try:
        with writing_in(root):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_writable(UPath(root))
    except KuzushijiError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise OptionError(str(error)) from error
    return root


@contextmanager
def _locked(root: Path, check: Callable[[], None], say: Callable[[str], object] = log.info) -> Iterator[None]:
    """Hold the exclusive lock for staging datasets, for locking them as a user, and for removing them.

    check, say: see `staged_shards`.
    """
    began, said = time.monotonic(), False
    with open(root / "lock", "w") as lock:
        while True:
            check()
            try:
                lock_file(lock, root)
                break
            except BlockingIOError:
                if not said and time.monotonic() - began > SECONDS_UNTIL_SAID:
                    say(f"waiting for another process of this machine, which writes to {root}")
                    said = True
                time.sleep(SECONDS_BETWEEN_TRIES)
        yield


def _remove_unused(root: Path, keep: str = "") -> None:
    """Remove all folders without a user, except the one named `keep`."""
    for folder in root.iterdir():
        if folder.is_dir() and folder.name != keep and not _is_used(folder):
            # Rename first: a process that is killed halfway then leaves nothing that looks like a staged dataset.
            removed = folder.rename(root / uuid.uuid4().hex)
            shutil.rmtree(removed, ignore_errors=True)  # Ray may be removing an uploaded checkpoint in it


def _is_used(folder: Path) -> bool:
    try:
        with open(folder / LOCK_FILE, "r+") as in_use:  # NFS grants exclusive locks only on files open for writing
            fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # the process was killed while staging
        return False
    except BlockingIOError:
        return True
    return False


def _stage(
    dataset: UPath,
    manifest: DatasetManifest,
    shards_by_split: Mapping[str, Sequence[Shard]],
    folder: Path,
    shown: Progress,
    check: Callable[[], None],
) -> None:
    """Verify the files against the manifest, and unpack the shards. The folder gets its name when it is complete."""
    temporary = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        sizes = list_files(dataset)
        entries = check_sizes(dataset, manifest, sizes)
        check_room(dataset, shards_by_split, folder.parent)
        for entry in entries:
            fetch(dataset / entry.name, temporary / entry.name)
            if fault := fault_of(UPath(temporary), entry, list_files(UPath(temporary))):
                raise DamageError(f"{dataset}: {fault}. Run `prepare` again, or copy the folder again")
        classes = len(read_class_names(UPath(temporary / CLASSES_FILE), dataset / CLASSES_FILE))
        total = sum(shard.examples for shards in shards_by_split.values() for shard in shards)
        with shown("crops staged", total, "crops") as advance:
            for split, shards in shards_by_split.items():
                if not any(shard.examples for shard in manifest.shards_of(split)):
                    raise InputError(f"{dataset}: a split must have crops. Received: {split} with none")
                examples = sum(shard.examples for shard in shards)
                with closing(SplitWriter(temporary / split, examples, classes)) as writer:
                    for shard in shards:
                        check()
                        with local_file(dataset / shard.name, temporary) as local:
                            unpack(dataset, shard, UPath(local), writer)
                        advance(shard.examples)
        (temporary / LOCK_FILE).touch()
        temporary.rename(folder)
    except FileNotFoundError as error:
        raise DamageError(
            f"{dataset} must not change while it is staged. Received: {' '.join(str(error).split())}. "
            "Run `prepare` again, or copy the folder again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _map(folder: Path) -> Crops:
    return Crops(
        **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}, pages_file=folder / PAGES_FILE
    )

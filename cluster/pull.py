"""Download trained models: verify each file, resume interrupted downloads, and seal only complete folders."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from upath import UPath

from cluster.errors import DamageError, InputError, KuzushijiError, OptionError
from cluster.local import is_at, lock
from cluster.manifest import MANIFEST_FILE, FileEntry, fault_of, faults_of, read_manifest
from cluster.models import LATEST_FILE, ModelManifest, latest_runs, point_to_latest, read_latest
from cluster.places import is_local, plain_option
from cluster.progress import progress
from cluster.storage import list_files, read_chunks, remove_file, write_bytes, writing_in

FLUSHED_BYTES = 16 << 20  # flushed to the disk while the download continues, instead of everything at the end


@dataclass(frozen=True)
class Pulled:
    """A model that was pulled, or was up to date already."""

    name: str
    """Architecture."""
    run: str
    folder: str
    new_bytes: int
    """Bytes downloaded; 0 if the folder was complete."""


def pull(models: UPath, to: UPath, wanted: Sequence[str] = ()) -> list[Pulled]:
    """Download models. Files that exist with the right content are not downloaded again.

    Args:
        models: folder or bucket of the models.
        to: folder to write, which gets the same layout.
        wanted: `NAME` for the latest run of an architecture, or `NAME/RUN`. Empty: the latest run of each architecture.

    Raises:
        OptionError: a name is not `NAME` or `NAME/RUN`, `to` is `models` itself, or it has another model of that name.
        InputError: there is no model of that name.
        DamageError: a file is missing or does not match its manifest.
        KuzushijiError: `to` is full, read-only or removed, or another pull is writing to it.
    """
    if is_local(models) and os.path.realpath(models.path) == os.path.realpath(to.path):
        raise OptionError(f"--to must be another folder than --models. Received: {to} for both")
    chosen = [_resolve(models, name) for name in wanted] or [*latest_runs(models).items()]
    manifests = [read_manifest(models / name / run, ModelManifest) for name, run in chosen]
    total = sum(entry.bytes for manifest in manifests for entry in manifest.entries)
    for (name, run), manifest in zip(chosen, manifests, strict=True):
        _refuse_another(to / name / run, manifest)
    pulled = []
    with progress("bytes pulled", total, "bytes") as advance:
        for (name, run), manifest in zip(chosen, manifests, strict=True):
            target = to / name / run
            with writing_in(target):
                new_bytes = _pull_folder(models / name / run, target, manifest, advance)
            pulled.append(Pulled(name, run, str(target), new_bytes))
    return pulled


def _resolve(models: UPath, wanted: str) -> tuple[str, str]:
    """Return the architecture and the run of `NAME` or `NAME/RUN`."""
    name, slash, run = wanted.partition("/")
    plain_option(name, "the name of a model")
    if slash:
        return name, plain_option(run, "a run")
    latest = read_latest(models / name)
    if latest is None:
        raise InputError(
            f"{models} must hold {name}/{LATEST_FILE}. Received: no such file. Name an existing model, or NAME/RUN"
        )
    return name, latest.run


def _refuse_another(target: UPath, manifest: ModelManifest) -> None:
    """Raise OptionError if a folder has a finished, undamaged model with another manifest."""
    try:
        there = read_manifest(target, ModelManifest)
    except (InputError, DamageError):  # none, or one that is repaired
        return
    if there.raw != manifest.raw and not faults_of(target, there, list_files(target)):
        raise OptionError(
            f"--to must not have another model of the same name. Received: {target}, finished at "
            f"{there.finished_at:%Y-%m-%d %H:%M} and not the one to pull. Remove it, or name another --to"
        )


def _pull_folder(source: UPath, target: UPath, manifest: ModelManifest, advance: Callable[[int], None]) -> int:
    os.makedirs(target.path, exist_ok=True)
    new_bytes = 0
    for entry in manifest.entries:
        if fault_of(target, entry, list_files(target)) is None:
            advance(entry.bytes)
        else:
            remove_file(target / MANIFEST_FILE)  # an incomplete folder is not sealed
            new_bytes += _fetch(source, Path(target.path), entry, advance)
    if not {entry.name for entry in manifest.entries} <= set(list_files(target)):
        raise KuzushijiError(
            f"a folder must not be changed while a pull writes to it. Received: {target}, with files removed. "
            "Run the same command again"
        )
    write_bytes(target / MANIFEST_FILE, manifest.raw)
    point_to_latest(target, manifest)
    return new_bytes


def _fetch(source: UPath, target: Path, entry: FileEntry, advance: Callable[[int], None]) -> int:
    """Download one file to `.NAME.part`, resuming an earlier attempt, and rename it once its SHA-256 matches.

    Returns the number of bytes downloaded.
    """
    part = target / f".{entry.name}.part"
    fetched = 0
    flushed: list[Future[None]] = []
    with open(part, "ab") as out, ThreadPoolExecutor(1) as disk:
        try:
            lock(out, target)
            os.stat(target)  # raises FileNotFoundError if the folder was removed meanwhile
            if not is_at(out.fileno(), part):
                raise BlockingIOError  # another pull renamed the part between `open` and `flock`
        except BlockingIOError as error:
            raise KuzushijiError(
                f"only one pull at a time may write a folder. Received: {target}, which another pull is writing. "
                "Wait for it to end"
            ) from error
        # Try again from byte 0, in case the part belongs to another file.
        for begin in dict.fromkeys([min(out.tell(), entry.bytes), 0]):
            out.truncate(begin)
            out.seek(begin)
            digest = hashlib.sha256()
            for chunk in read_chunks(UPath(part), 0, begin):
                digest.update(chunk)
            advance(begin)
            try:
                for chunk in read_chunks(source / entry.name, begin, entry.bytes):
                    out.write(chunk)
                    digest.update(chunk)
                    fetched += len(chunk)
                    advance(len(chunk))
                    if fetched // FLUSHED_BYTES > len(flushed):
                        flushed.append(disk.submit(os.fdatasync, out.fileno()))
            except FileNotFoundError as error:
                raise DamageError(
                    f"{source}: {entry.name} is missing or was just replaced. Ask the owner of the models"
                ) from error
            out.flush()
            for flush in flushed:
                flush.result()  # the kernel reports a write error to one fdatasync only
            if out.tell() == entry.bytes and digest.hexdigest() == entry.sha256:
                os.fsync(out.fileno())
                os.replace(part, target / entry.name)
                return fetched
            advance(-out.tell())
    part.unlink()
    raise DamageError(
        f"{source}: {entry.name} was changed: its SHA-256 is not the manifest's. Ask the owner of the models. "
        "See docs/faq.md"
    )

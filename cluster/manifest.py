"""`manifest.json` seals a folder: it is written last. A folder without a manifest is not finished.

    {"format": 1, "kind": "dataset" | "model" | "predictions", "files": [{"name", "bytes", "sha256"}], ...}

Each kind of folder has a subclass of `Manifest`.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from upath import UPath

from cluster.errors import DamageError, InputError
from cluster.places import is_local, plain_name
from cluster.progress import progress
from cluster.storage import (
    change_bytes,
    is_file,
    list_files,
    list_folders,
    read_small,
    sha256_of,
    write_bytes,
    writing_in,
)

MANIFEST_FILE = "manifest.json"
# A manifest that exceeds these limits is rejected before parsing. Within them, parsing takes at most 2 GB of memory.
# If a tenth of Kaggle's boxes were lost, the manifest would have 14 MB and 700,000 values.
MAX_MANIFEST_BYTES = 1 << 27
MAX_MANIFEST_VALUES = 10_000_000

Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class FileEntry(BaseModel):
    """A file directly in the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(max_length=255)
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _stays_in_folder(cls, name: str) -> str:
        if name == MANIFEST_FILE:
            raise ValueError("a manifest must not list itself")
        return plain_name(name, "a file name in a manifest")


class Manifest(BaseModel):
    """The fields that all manifests share. Other fields belong to a subclass, or are kept as extra fields."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: Literal[1] = 1
    kind: Literal["dataset", "model", "predictions"]
    files: Annotated[list[FileEntry], FailFast()]

    _raw: bytes = PrivateAttr(b"")

    @property
    def raw(self) -> bytes:
        """The bytes that the manifest was read from; empty if it was not read from a file."""
        return self._raw

    @property
    def sha256(self) -> str:
        """SHA-256 of `raw`: identifies a dataset or model."""
        return hashlib.sha256(self._raw).hexdigest()

    @property
    def entries(self) -> list[FileEntry]:
        """All files that the manifest lists."""
        return self.files

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if len({entry.name for entry in self.entries}) != len(self.entries):
            raise ValueError("a file must be listed once")
        return self


ManifestT = TypeVar("ManifestT", bound=Manifest)


def write_listed(path: UPath, data: bytes, within: UPath | None = None) -> FileEntry:
    """Write a file and return its manifest entry. `within` and Raises: as `cluster.storage.new_file`.

    The entry describes `data`, not what is read back: if the storage corrupts the file, `verify` reports it.
    """
    write_bytes(path, data, within)
    return FileEntry(name=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def seal(folder: UPath, manifest: Manifest) -> None:
    """Write the manifest, which marks the folder as finished.

    Raises:
        InputError: the manifest would exceed the limits for reading one.
        DamageError: another job sealed the folder with a different manifest in the meantime.
        KuzushijiError: the folder, on this machine, is full, read-only or missing.
    """
    new = encoded(manifest)

    def refuse_other_content(old: bytes | None) -> bytes | None:
        if old not in (None, new):
            raise DamageError(
                f"only one job at a time may write a folder. Received: {folder}, sealed by another job in the "
                "meantime. Run `kuzushiji verify` on it, or name another folder"
            )
        return new

    if is_local(folder):
        with writing_in(Path(folder.path)):
            os.stat(folder.path)  # `change_bytes` would make a removed folder anew, and seal it without its files
    change_bytes(folder / MANIFEST_FILE, refuse_other_content)


def encoded(manifest: Manifest) -> bytes:
    """Return the content of a manifest's file.

    Raises:
        InputError: it would exceed the limits for reading one.
    """
    content = (manifest.model_dump_json(indent=1) + "\n").encode()
    if _is_too_large(content):
        entries = {name: len(value) for name, value in manifest if isinstance(value, list)}
        longest = max(entries, key=lambda name: entries[name])
        raise InputError(
            f"a manifest must have at most {MAX_MANIFEST_BYTES} bytes and {MAX_MANIFEST_VALUES} values. Received: "
            f"{len(content)} bytes, the longest list: {entries[longest]} {longest}. Fix the input, or split it into "
            "several parts"
        )
    return content


def _is_too_large(raw: bytes) -> bool:
    # In JSON, one of these precedes each value but the outermost: an upper bound that needs no parsing.
    values = sum(raw.count(mark) for mark in (b"{", b"[", b","))
    return len(raw) > MAX_MANIFEST_BYTES or values > MAX_MANIFEST_VALUES


def is_sealed(folder: UPath) -> bool:
    return is_file(folder / MANIFEST_FILE)


def read_any_manifest(folder: UPath, kinds: Sequence[type[Manifest]]) -> Manifest:
    """Read the manifest of a folder that may be of any of `kinds`. A manifest without `kind` is read as the first kind.

    Raises:
        InputError: the folder has no manifest.
        DamageError: the file is not a manifest of format 1 and of one of the kinds, or lists files outside the folder.
    """
    raw, content = _read(folder)
    of_kind = {kind.model_fields["kind"].default: kind for kind in kinds}
    return _parse(folder, raw, content, of_kind.get(str(content.get("kind")), kinds[0]))


def read_manifest(folder: UPath, form: type[ManifestT]) -> ManifestT:
    """Read the manifest of a folder of one kind.

    Raises:
        InputError: the folder has no manifest, or one of another kind.
        DamageError: the file is not a manifest of format 1, or lists files outside the folder.
    """
    raw, content = _read(folder)
    kind = form.model_fields["kind"].default
    if content.get("kind", kind) != kind:
        raise InputError(f"this must be a {kind} folder. Received: {folder}, a {str(content['kind'])[:20]!r} folder")
    return _parse(folder, raw, content, form)


def _read(folder: UPath) -> tuple[bytes, dict[str, Any]]:
    path = folder / MANIFEST_FILE
    raw = read_small(path, MAX_MANIFEST_BYTES)
    if raw is None:
        what = "without one" if list_files(folder) or list_folders(folder) else "which is missing, empty or a file"
        raise InputError(f"a finished folder must hold {MANIFEST_FILE}. Received: {folder}, {what}. See docs/faq.md")
    if len(raw) > MAX_MANIFEST_BYTES:
        raise DamageError(f"{path} must be at most {MAX_MANIFEST_BYTES} bytes")
    if _is_too_large(raw):
        raise DamageError(f"{path} must hold at most {MAX_MANIFEST_VALUES} values")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path} must be JSON. Received: {error}") from error
    if not isinstance(content, dict):
        raise DamageError(f"{path} must be a JSON object. Received: {type(content).__name__}")
    return raw, content


def _parse(folder: UPath, raw: bytes, content: dict[str, Any], form: type[ManifestT]) -> ManifestT:
    try:
        manifest = form.model_validate(content)
    except ValidationError as error:
        raise DamageError(f"{folder / MANIFEST_FILE} must be a manifest of format 1. {complaint(error)}") from error
    manifest._raw = raw
    return manifest


def complaint(error: ValidationError) -> str:
    """Describe the first validation error of a JSON file in one line: where, and which rule it breaks."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"Received at {where[:80]!r}: {first['msg'].removeprefix('Value error, ')}"


def size_fault_of(entry: FileEntry, sizes: dict[str, int]) -> str | None:
    """Check that a listed file exists with the listed size, without reading it. Return the fault, or None.

    Args:
        entry: the listed file.
        sizes: name to bytes of the folder's files, as from `list_files`.
    """
    if entry.name not in sizes:
        return f"{entry.name} is missing"
    if sizes[entry.name] != entry.bytes:
        return f"{entry.name} has {sizes[entry.name]} bytes instead of {entry.bytes}"
    return None


def fault_of(folder: UPath, entry: FileEntry, sizes: dict[str, int]) -> str | None:
    """Check size and SHA-256 of a listed file. Return the fault, or None. `sizes`: as for `size_fault_of`."""
    if fault := size_fault_of(entry, sizes):
        return fault
    if sha256_of(folder / entry.name) != entry.sha256:
        return f"{entry.name} was changed: its SHA-256 is not the manifest's"
    return None


def faults_of(folder: UPath, manifest: Manifest, sizes: dict[str, int]) -> list[str]:
    """Check size and SHA-256 of all listed files, and show the progress. Return the faults, one line per file.

    sizes: as for `size_fault_of`.
    """
    faults = []
    with progress("bytes checked", sum(entry.bytes for entry in manifest.entries), "bytes") as advance:
        for entry in manifest.entries:
            if fault := fault_of(folder, entry, sizes):
                faults.append(fault)
            advance(entry.bytes)
    return faults


def verify(folder: UPath, kinds: Sequence[type[Manifest]]) -> tuple[Manifest, list[str], list[str]]:
    """Check each file of a sealed folder of one of `kinds` against the manifest.

    Returns:
        The manifest, the faults (one line per file), and the names of files that the manifest does not list.

    Raises:
        InputError, DamageError: as `read_any_manifest`.
    """
    manifest = read_any_manifest(folder, kinds)
    sizes = list_files(folder)
    faults = faults_of(folder, manifest, sizes)
    listed = {entry.name for entry in manifest.entries} | {MANIFEST_FILE}
    return manifest, faults, sorted(set(sizes) - listed)

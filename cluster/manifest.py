"""`manifest.json`: written last, it seals a folder. A folder without a manifest is not finished.

    {"format": 1, "kind": "dataset" | "model" | "predictions", "files": [{"name", "bytes", "sha256"}], ...}

Each kind of folder has a subclass of `Manifest`, which stands in the module that writes the folder.
"""

import hashlib
import json
from collections.abc import Sequence
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
from cluster.progress import progress
from cluster.storage import change_bytes, is_file, list_files, plain_name, read_bytes, sha256_of, size_of, write_bytes

MANIFEST_FILE = "manifest.json"
# A manifest past these bounds is refused before it is parsed, which takes 2 GB of memory at most within them. Were a
# tenth of Kaggle's boxes lost, it would have 14 MB and 700,000 values.
MAX_MANIFEST_BYTES = 1 << 27
MAX_MANIFEST_VALUES = 10_000_000

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
# Without FailFast a complaint of each of a million entries is made, of which one is told.
Lines = Annotated[list[dict[str, Any]], FailFast()]


class FileEntry(BaseModel):
    """A file that stands directly in the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(max_length=255)
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _stays_in_folder(cls, name: str) -> str:
        if name == MANIFEST_FILE:
            raise ValueError("a manifest can't list itself")
        return plain_name(name, "a file name in a manifest")


class Manifest(BaseModel):
    """What every manifest has; what else a folder says of itself is in the extra fields, or in those of a subclass."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: Literal[1] = 1
    kind: Literal["dataset", "model", "predictions"]
    files: Annotated[list[FileEntry], FailFast()]

    _raw: bytes = PrivateAttr(b"")

    @property
    def raw(self) -> bytes:
        """The bytes that it was read from."""
        return self._raw

    @property
    def sha256(self) -> str:
        """Of the bytes that it was read from: tells one dataset from another."""
        return hashlib.sha256(self._raw).hexdigest()

    @property
    def entries(self) -> list[FileEntry]:
        """Every file that the manifest answers for."""
        return self.files

    @model_validator(mode="after")
    def _lists_a_file_once(self) -> Self:
        if len({entry.name for entry in self.entries}) != len(self.entries):
            raise ValueError("a file must be listed once")
        return self


ManifestT = TypeVar("ManifestT", bound=Manifest)


def write_listed(path: UPath, data: bytes) -> FileEntry:
    """Write a file that the manifest is to list; its entry is of the bytes meant, whatever a place makes of them."""
    write_bytes(path, data)
    return FileEntry(name=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def seal(folder: UPath, manifest: Manifest) -> None:
    """Write the manifest; from now on the folder is there.

    Raises:
        InputError: nobody could read so large a manifest.
        DamageError: somebody else sealed the folder meanwhile, with another content.
    """
    new = (manifest.model_dump_json(indent=1) + "\n").encode()
    if _is_too_large(new):
        raise InputError(
            f"a manifest must have at most {MAX_MANIFEST_BYTES} bytes and {MAX_MANIFEST_VALUES} values. Received: "
            f"{len(new)} bytes, most of them losses and clipped boxes. Mend the input, or make several datasets of it"
        )

    def first(old: bytes | None) -> bytes | None:
        if old not in (None, new):
            raise DamageError(
                f"one job at a time may write a folder. Received: {folder}, which another one sealed meanwhile. "
                "Run `kuzushiji verify` on it, or name another folder"
            )
        return new

    change_bytes(folder / MANIFEST_FILE, first)


def _is_too_large(raw: bytes) -> bool:
    values = sum(raw.count(mark) for mark in (b"{", b"[", b","))
    return len(raw) > MAX_MANIFEST_BYTES or values > MAX_MANIFEST_VALUES


def is_sealed(folder: UPath) -> bool:
    return is_file(folder / MANIFEST_FILE)


def read_any_manifest(folder: UPath, kinds: Sequence[type[Manifest]]) -> Manifest:
    """The manifest of a folder, of whichever of the `kinds` it is. One that names no kind is of the first.

    Raises:
        InputError: the folder has no manifest.
        DamageError: it is not a manifest of this format and of one of the kinds, or names files outside its folder.
    """
    raw, content = _read(folder)
    of_kind = {kind.model_fields["kind"].default: kind for kind in kinds}
    return _parse(folder, raw, content, of_kind.get(str(content.get("kind")), kinds[0]))


def read_manifest(folder: UPath, form: type[ManifestT]) -> ManifestT:
    """The manifest of a folder of one kind.

    Raises:
        InputError: the folder has none, so it is no finished dataset or model; or it is of the other kind.
        DamageError: it is not a manifest of this format, or names files outside its folder.
    """
    raw, content = _read(folder)
    wanted = form.model_fields["kind"].default
    if content.get("kind", wanted) != wanted:
        raise InputError(f"this must be a {wanted} folder. Received: {folder}, a {str(content['kind'])[:20]!r}")
    return _parse(folder, raw, content, form)


def _read(folder: UPath) -> tuple[bytes, dict[str, Any]]:
    path = folder / MANIFEST_FILE
    if not is_sealed(folder):
        raise InputError(f"a finished dataset or model folder must hold {MANIFEST_FILE}. Received: {folder}, without")
    if size_of(path) > MAX_MANIFEST_BYTES:
        raise DamageError(f"{path} must be at most {MAX_MANIFEST_BYTES} bytes")
    raw = read_bytes(path)
    if _is_too_large(raw):
        raise DamageError(f"{path} must hold at most {MAX_MANIFEST_VALUES} values")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path} must be JSON. Received: {error}") from None
    if not isinstance(content, dict):
        raise DamageError(f"{path} must be a JSON object. Received: {type(content).__name__}")
    return raw, content


def _parse(folder: UPath, raw: bytes, content: dict[str, Any], form: type[ManifestT]) -> ManifestT:
    try:
        manifest = form.model_validate(content)
    except ValidationError as error:
        raise DamageError(f"{folder / MANIFEST_FILE} is no manifest of format 1. {complaint(error)}") from None
    except InputError as error:
        raise DamageError(f"{folder / MANIFEST_FILE} is no manifest of format 1: {error}") from None
    manifest._raw = raw
    return manifest


def complaint(error: ValidationError) -> str:
    """The first of what is wrong with JSON that others wrote, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"Received at {where[:80]!r}: {first['msg']}"


def size_fault_of(entry: FileEntry, there: dict[str, int]) -> str | None:
    """What can be seen to be wrong with a listed file without reading it, or None."""
    if entry.name not in there:
        return f"{entry.name} is missing"
    if there[entry.name] != entry.bytes:
        return f"{entry.name} has {there[entry.name]} bytes instead of {entry.bytes}"
    return None


def fault_of(folder: UPath, entry: FileEntry, there: dict[str, int]) -> str | None:
    """What is wrong with a listed file, or None. `there`: the sizes of the folder's files."""
    if fault := size_fault_of(entry, there):
        return fault
    if sha256_of(folder / entry.name) != entry.sha256:
        return f"{entry.name} was changed: its SHA-256 is not the manifest's"
    return None


def verify(folder: UPath, kinds: Sequence[type[Manifest]]) -> tuple[Manifest, list[str], list[str]]:
    """Check every file of a sealed folder of one of the `kinds`.

    Returns its manifest, the faults (one line a file), and the names of files that the manifest does not list.
    """
    manifest = read_any_manifest(folder, kinds)
    there = list_files(folder)
    faults = []
    with progress("bytes checked", sum(entry.bytes for entry in manifest.entries), "bytes") as advance:
        for entry in manifest.entries:
            if fault := fault_of(folder, entry, there):
                faults.append(fault)
            advance(entry.bytes)
    listed = {entry.name for entry in manifest.entries} | {MANIFEST_FILE}
    return manifest, faults, sorted(set(there) - listed)

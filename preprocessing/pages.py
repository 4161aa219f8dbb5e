"""List and read page scans: the files of a folder and its sub-folders, or of a zip archive as Kaggle provides it."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial

from upath import UPath

from cluster.ahead import ahead
from cluster.errors import DamageError, InputError
from cluster.places import is_local
from cluster.storage import list_tree, read_at_most
from preprocessing.archive import list_members, member_reader
from preprocessing.crop import MAX_PAGE_BYTES, PageFault
from preprocessing.matching import Files, Matcher
from preprocessing.scan import SUFFIXES, scan_size

# Folders whose files are not pages: CODH's single characters, which its archives have next to the pages, and the
# attributes that macOS adds to an archive.
OTHER_FOLDERS = ("characters", "__MACOSX")
MAX_KINDS, MAX_SUFFIX_CHARS = 100, 16
OTHERS, HIDDEN = "other files", "hidden files"
# Files that are read ahead from a bucket at once, and their bytes in all.
READS_AT_ONCE = 4
AHEAD_BYTES = 32 << 20
HEADER_BYTES = 1 << 16  # first bytes of a page, which nearly always state its size
# The first bytes of PNG, WebP and TIFF, where the orientation may come after the image.
ORIENTATION_MAY_COME_LATER = (b"\x89PNG", b"RIFF", b"II", b"MM")


ReadPage = Callable[[str], bytes]
"""Returns the bytes of a page file. See `page_reader`."""


@dataclass(frozen=True)
class Listing:
    """The files of a folder or archive."""

    scans: dict[str, int]
    """Path below the folder, or name in the archive, to size in bytes; sorted."""
    ignored: dict[str, int]
    """Number of files that are not scans, by kind (`.db`, `characters/`)."""
    where: str
    """The folder or archive, for error messages."""

    def files_of(self, page_ids: Iterable[str]) -> Files:
        """Return the file of each page, and the other files. Raises: InputError: as `Matcher`."""
        return Matcher(self.scans, self.where).match(page_ids)


def list_pages(pages: UPath) -> Listing:
    """List the scans in a folder and its sub-folders, or in an archive. Scans are recognized by suffix, in any case.

    Raises:
        InputError: the folder or archive does not exist, the archive is broken, or there are no scans.
        DamageError: two reads of a remote archive's directory gave different lists.
    """
    if is_archive(pages):
        members = list_members(pages)
        # Read the directory of a remote archive twice: unlike the pages, it has no checksum.
        if not is_local(pages) and members != list_members(pages):
            raise DamageError(
                f"{pages} must arrive unchanged. Received: two different lists of files. Run the same command again"
            )
    else:
        members = list_tree(pages)
    scans: dict[str, int] = {}
    ignored: list[str] = []
    for name, size in sorted(members):
        kind = _ignored_as(name)
        if kind:
            ignored.append(kind)
        elif name in scans:
            raise InputError(f"{pages} must hold one file per page. Received: {name!r} twice")
        else:
            scans[name] = size
    if not scans:
        raise InputError(
            f"--pages must be a folder or .zip of scans ({' '.join(SUFFIXES)}). Received: {pages}, without any. "
            "See docs/data.md#scans"
        )
    return Listing(scans, count_kinds(ignored), str(pages))


def count_kinds(kinds: Iterable[str]) -> dict[str, int]:
    """Count files by kind. Once there are `MAX_KINDS` kinds, further ones count as `OTHERS`."""
    counts: Counter[str] = Counter()
    for kind in kinds:
        counts[kind if kind in counts or len(counts) < MAX_KINDS else OTHERS] += 1
    return dict(sorted(counts.items()))


def ignored_line(ignored: Mapping[str, int]) -> str:
    """Return counts of files by kind as text: `3 .db, 120 characters/`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in ignored.items())


def _ignored_as(name: str) -> str:
    """Return the kind of a file that is not a scan; empty for a scan."""
    *folders, base = name.split("/")
    for folder in OTHER_FOLDERS:
        if folder in folders:
            return f"{folder}/"
    if base.startswith("."):  # macOS writes `._page.jpg` next to `page.jpg`
        return HIDDEN
    kind = kind_of(base)
    return "" if kind in SUFFIXES else kind


def kind_of(name: str) -> str:
    """Return the kind of a file: its suffix in lower case, or `OTHERS`."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix.isprintable() and 1 < len(suffix) <= MAX_SUFFIX_CHARS else OTHERS


def fingerprint(labels_sha256: str, files: Files) -> str:
    """Return a hex digest of the labels' SHA-256, and of the ids and file sizes of the pages, which are not read."""
    digest = hashlib.sha256(labels_sha256.encode())
    for page_id, (_, size) in sorted(files.items()):
        digest.update(f"\n{page_id} {size}".encode(errors="surrogateescape"))
    return digest.hexdigest()


@contextmanager
def page_reader(pages: UPath, option: str = "--pages", expected: Sequence[tuple[str, int]] = ()) -> Iterator[ReadPage]:
    """Yield a function that takes a file name from `list_pages` and returns the first `MAX_PAGE_BYTES` + 1 bytes.

    Args:
        pages: the folder or archive.
        option: the option that error messages name.
        expected: names and sizes in bytes of the files that will be read, each once and in this order; empty: not
            known. While one is used, the next ones are read if the folder or archive is not on this machine.

    The function raises PageFault if the page can't be read from the archive, and FileNotFoundError if the file no
    longer exists.
    """
    with ExitStack() as stack:
        if is_archive(pages):
            yield stack.enter_context(member_reader(pages, option, [name for name, _ in expected]))
        elif is_local(pages) or not expected:
            yield lambda name: read_at_most(pages / name, MAX_PAGE_BYTES + 1)
        else:
            reads = [(size, partial(read_at_most, pages / name, MAX_PAGE_BYTES + 1)) for name, size in expected]
            answers = stack.enter_context(ahead(reads, READS_AT_ONCE, AHEAD_BYTES))
            names = iter(expected)

            def read(name: str) -> bytes:
                assert name == next(names)[0], "pages are read in the order that was expected"
                return next(answers).result()

            yield read


@contextmanager
def size_reader(pages: UPath, listed: Callable[[], Listing]) -> Iterator[Callable[[str], tuple[int, int] | None]]:
    """Yield a function that takes a page id and returns the page's width and height in pixels, without decoding it.

    The function returns None for a page without a file or with one that can't be read.

    Args:
        pages: the folder or archive.
        listed: returns the listing of `pages`; called when the first size is requested.
    """
    with ExitStack() as stack:
        read = cache(lambda: stack.enter_context(page_reader(pages)))
        matcher = cache(lambda: Matcher(listed().scans, listed().where))

        def size_of(page_id: str) -> tuple[int, int] | None:
            path = matcher().path_of(page_id)
            if path is None:
                return None
            name = matcher().paths[path]
            if not is_archive(pages):
                with suppress(PageFault, FileNotFoundError):
                    head = read_at_most(pages / name, HEADER_BYTES)
                    if len(head) < HEADER_BYTES or not head.startswith(ORIENTATION_MAY_COME_LATER):
                        return scan_size(head)
            with suppress(PageFault, FileNotFoundError):
                return scan_size(read()(name))  # in JPEG, after long metadata, such as a thumbnail
            return None

        yield size_of


def is_archive(pages: UPath) -> bool:
    """Return whether `pages` is a zip archive: it has this suffix, in any case, and is not a local folder."""
    return pages.suffix.lower() == ".zip" and not (is_local(pages) and os.path.isdir(pages.path))

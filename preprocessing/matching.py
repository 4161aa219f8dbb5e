"""Find the file of each page that the labels name.

An id in the labels is the path of a file below `--pages` without its suffix, or only the file name where it is unique.
Both are compared in Unicode form NFC, since macOS writes file names in another form.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

from cluster.errors import InputError

# Page id to the name of its file in the folder or archive and the size in bytes. Pages that the labels do not name have
# the path of their file as id, without its suffix and without the folders that all files share.
Files = dict[str, tuple[str, int]]


class Matcher:
    """Finds the files of page ids."""

    def __init__(self, listing: Mapping[str, int], pages: str) -> None:
        """Index the files.

        Args:
            listing: path of each scan below `pages` to its size in bytes, with `/` between folders.
            pages: the folder or archive, for error messages.

        Raises:
            InputError: two files have paths that differ only in their suffixes.
        """
        self.listing, self.pages = listing, pages
        self.paths = _paths(listing, pages)
        self.common = _common_folder(self.paths)
        self.short = {path.removeprefix(self.common): path for path in self.paths}
        self.by_name: defaultdict[str, list[str]] = defaultdict(list)
        for path in self.paths:
            self.by_name[path.rpartition("/")[2]].append(path)

    def path_of(self, page_id: str) -> str | None:
        """Return the path of the file of a page, without its suffix, in NFC; None if there is none.

        Args:
            page_id: the id, in NFC.

        Raises:
            InputError: several files have this name.
        """
        if page_id in self.paths:
            return page_id
        if page_id in self.short:
            return self.short[page_id]
        found = self.by_name.get(page_id, [])
        if len(found) > 1:
            raise InputError(
                f"an image_id must have one file in {self.pages}. Received: {page_id!r}, which matches "
                f"{self.paths[found[0]]!r} and {self.paths[found[1]]!r}. Name the folder in the image_id. "
                "See docs/data.md#page-ids"
            )
        return found[0] if found else None

    def match(self, page_ids: Iterable[str]) -> Files:
        """Return the file of each page that has one, and the other files under ids of their own.

        Args:
            page_ids: the ids in the labels, in NFC.

        Raises:
            InputError: an id has several files, or two ids have the same file.
        """
        id_of: dict[str, str] = {}
        for page_id in page_ids:
            path = self.path_of(page_id)
            if path in id_of:
                received = f"{id_of[path]!r} and {page_id!r} for {self.paths[path]!r}"
                raise InputError(f"a page must have one image_id. Received: {received}")
            if path is not None:
                id_of[path] = page_id
        matched = {page_id: path for path, page_id in id_of.items()}
        for path in self.paths:
            if path not in id_of:
                own_id = path.removeprefix(self.common)
                matched[own_id if own_id not in matched else path] = path
        return {page_id: (self.paths[path], self.listing[self.paths[path]]) for page_id, path in matched.items()}


def _paths(listing: Mapping[str, int], pages: str) -> dict[str, str]:
    """Return a mapping of path without suffix, in NFC, to the listed path."""
    paths: dict[str, str] = {}
    for name in sorted(listing):
        path = unicodedata.normalize("NFC", os.path.splitext(name)[0])
        if path in paths:
            raise InputError(f"{pages} must hold one file per page. Received: {paths[path]!r} and {name!r}")
        paths[path] = name
    return paths


def _common_folder(paths: Iterable[str]) -> str:
    """Return the folders, with `/` at the end, that all paths begin with."""
    folders = {path.rpartition("/")[0] for path in paths}
    common = os.path.commonpath(folders) if folders and all(not f.startswith("/") for f in folders) else ""
    return f"{common}/" if common else ""

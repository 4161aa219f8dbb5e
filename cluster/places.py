"""Places: paths of this machine, and addresses of buckets and other file systems."""

import os
import re
from pathlib import Path
from typing import Any

from fsspec import get_filesystem_class
from upath import UPath

from cluster import bucket
from cluster.bucket import Bucket
from cluster.errors import OptionError
from cluster.fsspec_storage import Fsspec
from cluster.google_client import gcsfs_options
from cluster.local import Local
from cluster.storage_interface import Store

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

_LOCAL: Store = Local()
_BUCKET: Store = Bucket()
_FSSPEC: Store = Fsspec()
_STORES = {"": _LOCAL, "file": _LOCAL, "local": _LOCAL, "gs": _BUCKET, "gcs": _BUCKET}


def store_of(path: UPath) -> Store:
    """Return the implementation of `cluster.storage` for a path. Only this function chooses by protocol."""
    return _STORES.get(path.protocol, _FSSPEC)


def place(text: str | os.PathLike[str]) -> UPath:
    """Return a path or address as a UPath. A local path becomes absolute, since workers run in other folders.

    Raises:
        OptionError: the text is empty, has control characters, begins with `~/`, has a protocol that fsspec does not
            know or can't import, has an invalid bucket name, is an address with one slash after its protocol or with
            `::`, or one, not of http, with empty parts, `.` or `..`.
        KuzushijiError: the file that GOOGLE_APPLICATION_CREDENTIALS names can't be used.
    """
    if not str(text):
        raise OptionError("a place must be a path or an address. Received: an empty one")
    if re.search(r"[\x00-\x1f\x7f]", str(text)):
        raise OptionError(f"a place must not have control characters. Received: {str(text)!r}. Are line ends CRLF?")
    if re.match("~(/|$)", str(text)):
        raise OptionError(f"a place must not begin with ~, which only a shell replaces. Received: {text}. Use $HOME")
    if re.match("(gs|gcs|s3|hdfs|https?):/[^/]", str(text)):
        raise OptionError(f"an address must have two slashes after its protocol, as gs://. Received: {text}")
    try:
        path: UPath = UPath(text)
        store = store_of(path)
        if store is _FSSPEC:
            get_filesystem_class(path.protocol)  # imports the package of the protocol
    except (ValueError, ImportError) as error:
        raise OptionError(f"a place must be a path or an address. Received: {text}: {error}") from error
    if store is _LOCAL:
        return UPath(os.path.abspath(path.path))
    # Libraries read such addresses in different ways, and fsspec cuts off what follows `::`.
    parts = str(text).partition("://")[2].strip("/").split("/")[1:]
    is_web = path.protocol in ("http", "https")  # the parts may be those of a query
    if "::" in str(text) or (not is_web and {"", ".", ".."} & set(parts)):
        raise OptionError(f"an address must not have //, /./, /../ or :: in its path. Received: {text}")
    if store is _BUCKET:
        if not bucket.has_valid_name(path):
            raise OptionError(
                f"an address of Google Cloud Storage must be gs://BUCKET/..., in lower case. Received: {text}"
            )
        path = UPath(str(text).rstrip("/"), **gcsfs_options())
    return path


def reachable_place(text: str | os.PathLike[str]) -> UPath:
    """Return `place(text)`. If it is in a bucket, first check with one request that the bucket can be listed.

    Raises:
        OptionError: as `place`.
        KuzushijiError: the bucket does not exist, may not be listed, or does not answer.
    """
    path = place(text)
    if store_of(path) is _BUCKET:
        bucket.reach(path.path.partition("/")[0])
    return path


def is_local(path: UPath) -> bool:
    """Return whether a path is on a file system of this machine, which may be a network mount."""
    return store_of(path) is _LOCAL


def is_inside(path: UPath, folder: UPath) -> bool:
    """Return whether a path is the folder itself or below it. Links of this machine are followed."""
    if store_of(path) is not store_of(folder) or (store_of(path) is _FSSPEC and path.protocol != folder.protocol):
        return False
    inner, outer = (os.path.realpath(one.path) if is_local(one) else one.path for one in (path, folder))
    return f"{inner}/".startswith(f"{outer.rstrip('/')}/")


def local_path(text: str, option: str) -> Path:
    """Return the local path that a command line option names.

    Raises:
        OptionError: `text` is an address.
    """
    path = place(text)
    if not is_local(path):
        raise OptionError(f"{option} must be a path on this machine. Received: {text}")
    return Path(path.path)


def plain_name(name: str, what: str) -> str:
    """Return `name` if it is safe as the name of a file or folder: joined to a folder, it can't leave the folder.

    Raises:
        ValueError: the name is empty, contains a character other than ASCII letters, digits, `.`, `_` and `-`, or
            starts with `.` or `-`.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"{what} must be letters, digits, '.', '_' or '-' and not start with '.' or '-'. Received: {name!r}"
        )
    return name


def plain_option(name: str, option: str) -> str:
    """Return `name`, which an option gives, as `plain_name` does.

    Raises:
        OptionError: as the ValueError of `plain_name`.
    """
    try:
        return plain_name(name, option)
    except ValueError as error:
        raise OptionError(str(error)) from error


def arrow_filesystem(path: UPath) -> Any:
    """Return the pyarrow file system of a path, for Ray Train's `storage_filesystem`; None for a local path.

    Only this function uses gcsfs, since Ray Train can't use Google's client.
    """
    if is_local(path):
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(path.fs))

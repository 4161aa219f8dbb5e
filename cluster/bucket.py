"""Objects in Google Cloud Storage, through Google's own client, which can do what fsspec can't.

The client checks the CRC32C of each upload and of each whole download, reads several ranges of one generation at once,
and writes an object only if nobody changed it in between. Its listings raise when a request fails.
"""

import base64
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
from upath import UPath

from cluster.ahead import ahead
from cluster.bucket_errors import explaining
from cluster.errors import DamageError, InputError
from cluster.google_client import client, paying_project
from cluster.local import temporary_file
from cluster.ranged_file import RangedFile
from cluster.storage_interface import Store

if TYPE_CHECKING:
    from google.cloud.storage import Blob
    from google.cloud.storage import Bucket as GoogleBucket

RANGE_BYTES = 8 << 20
RANGES_AT_ONCE = 8
DELETED_AT_ONCE = 100  # the most that a batch may hold: https://cloud.google.com/storage/docs/batch
ROUNDS_OF_BATCHES = 2
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")  # https://cloud.google.com/storage/docs/buckets#naming


class Bucket(Store):
    """The store of `gs://` addresses.

    Each method raises KuzushijiError for missing credentials, a missing permission, a missing bucket, and a server that
    does not answer.
    """

    def is_file(self, path: UPath) -> bool:
        # Not gcsfs' `isfile`, which returns False for every failure.
        blob = _blob(path)
        with explaining():
            return bool(blob.name and blob.exists())  # no name: the bucket itself

    def size_of(self, path: UPath) -> int:
        blob = _blob(path)
        with explaining():
            blob.reload()
        return int(blob.size)

    def list_files(self, folder: UPath) -> dict[str, int]:
        return self.listing(folder)[0]

    def list_folders(self, folder: UPath) -> list[str]:
        return self.listing(folder)[1]

    def listing(self, folder: UPath) -> tuple[dict[str, int], list[str]]:
        bucket, _, name = folder.path.rstrip("/").partition("/")
        prefix = f"{name}/" if name else ""
        with explaining():
            listing = client().list_blobs(_bucket(bucket), prefix=prefix, delimiter="/")
            files = {blob.name.removeprefix(prefix): int(blob.size) for blob in listing}
        files.pop("", None)  # an object that represents the folder itself
        folders = {found.removeprefix(prefix).rstrip("/") for found in listing.prefixes}
        return files, sorted(folders - {""})  # without the folder between two slashes, which no path can name

    def open_read(self, path: UPath) -> RangedFile:
        # The stream reads one generation. No checksum is compared.
        blob = _loaded(path)
        return RangedFile(partial(_range, blob), int(blob.size), RANGE_BYTES)

    def read_bytes(self, path: UPath) -> bytes:
        # One request, so that the bytes are from one generation even if other processes replace the object.
        return _download(_blob(path))

    def read_chunks(self, path: UPath, begin: int, end: int) -> Iterator[bytes]:
        blob = _loaded(path)
        checksum = google_crc32c.Checksum()
        for chunk in _ranges(blob, begin, min(end, blob.size)):
            checksum.update(chunk)
            yield chunk
        if begin == 0 and end >= blob.size:
            _check(checksum, blob, path)

    def read_at_most(self, path: UPath, most: int) -> bytes:
        # One request for most objects: the response has the object's generation and checksum, too.
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        blob = _blob(path)
        try:
            data = _range(blob, 0, min(most, RANGE_BYTES))  # also sets `blob.generation` and `blob.crc32c`
        except RequestRangeNotSatisfiable:  # an empty object
            return b""
        may_have_more = len(data) == RANGE_BYTES < most
        if blob.content_encoding == "gzip":  # unpacked by the client, but the checksum is that of the packed bytes
            return _download(blob)[:most]
        if may_have_more or blob.crc32c is None:
            with explaining():
                blob.reload(if_generation_match=blob.generation)
        if may_have_more:
            data = b"".join((data, *_ranges(blob, RANGE_BYTES, min(most, blob.size))))
        if len(data) < most:
            _check(google_crc32c.Checksum(data), blob, path)
        return data

    @contextmanager
    def new_file(self, target: UPath, within: UPath | None) -> Iterator[Path]:
        # `within` is not needed: an interrupted upload leaves no object.
        from google.cloud.storage.retry import DEFAULT_RETRY

        with temporary_file(Path(tempfile.gettempdir())) as temporary:
            yield temporary
            with explaining(f"gs://{target.path.partition('/')[0]}"):
                _blob(target).upload_from_filename(str(temporary), checksum="crc32c", retry=DEFAULT_RETRY)

    def change_bytes(self, target: UPath, update: Callable[[bytes | None], bytes | None]) -> None:
        from google.api_core.exceptions import PreconditionFailed
        from google.cloud.storage.retry import DEFAULT_RETRY

        while True:  # repeated if another process wrote the object meanwhile
            blob = _blob(target)
            try:
                old = _download(blob)  # also sets `blob.generation`
            except FileNotFoundError:
                old = None
            new = update(old)
            if new is None or new == old:  # equal: a retry of a write whose response was lost
                return
            with suppress(PreconditionFailed), explaining():
                # Generation 0: write only if the object does not exist.
                generation = blob.generation if old is not None else 0
                blob.cache_control = "no-store"  # of a public bucket, Google would answer with copies an hour old
                blob.upload_from_string(new, checksum="crc32c", if_generation_match=generation, retry=DEFAULT_RETRY)
                return

    def remove_file(self, path: UPath) -> None:
        from google.cloud.storage.retry import DEFAULT_RETRY

        # Not found: another process removed the object, or the response to a first attempt was lost.
        with suppress(FileNotFoundError), explaining():
            _blob(path).delete(retry=DEFAULT_RETRY)

    def remove_folder(self, folder: UPath) -> None:
        # Not gcsfs' `rm`, which reads a name with brackets as a pattern: github.com/fsspec/filesystem_spec/issues/838.
        from google.api_core.exceptions import ClientError, NotFound
        from google.cloud.storage.retry import DEFAULT_RETRY

        bucket, _, name = folder.path.rstrip("/").partition("/")
        assert name, "never a whole bucket"

        def delete(blobs: list["Blob"]) -> None:
            with suppress(ClientError), client().batch():  # what was refused is in the next listing
                for blob in blobs:
                    blob.delete()

        with explaining():
            for _ in range(ROUNDS_OF_BATCHES):
                found = list(client().list_blobs(_bucket(bucket), prefix=f"{name}/"))
                for first in range(0, len(found), DELETED_AT_ONCE):
                    DEFAULT_RETRY(delete)(found[first : first + DELETED_AT_ONCE])
                if not found:
                    return
            # The rest, one by one: of the failures in a batch, the client reports only the last, without the bucket.
            for blob in list(client().list_blobs(_bucket(bucket), prefix=f"{name}/")):
                with suppress(NotFound):  # as in `remove_file`
                    blob.delete(retry=DEFAULT_RETRY)


def has_valid_name(path: UPath) -> bool:
    """Return whether Google Cloud Storage allows the bucket's name in a path."""
    return _NAME.fullmatch(path.path.partition("/")[0]) is not None


@cache
def reach(bucket: str) -> None:
    """List one object of a bucket, so that a wrong name or a missing permission is found before any work.

    Raises:
        KuzushijiError: the bucket does not exist or may not be listed, or the credentials are missing or refused.
    """
    with explaining():
        next(iter(client().list_blobs(_bucket(bucket), max_results=1)), None)


def _blob(path: UPath) -> "Blob":
    bucket, _, name = path.path.partition("/")
    return _bucket(bucket).blob(name)


def _loaded(path: UPath) -> "Blob":
    """Return an object with its generation, size and checksum.

    Raises:
        InputError: it is stored compressed, so that its size and parts are not those of the file.
    """
    blob = _blob(path)
    with explaining():
        blob.reload()
    if blob.content_encoding == "gzip":
        raise InputError(
            f"{path} must be stored as it is. Received: Content-Encoding gzip. Upload it again without gcloud's "
            "--gzip-local (-Z, -z)"
        )
    return blob


def _bucket(name: str) -> "GoogleBucket":
    return client().bucket(name, user_project=paying_project())


def _download(blob: "Blob") -> bytes:
    """Return the bytes of an object, and set `blob.generation`.

    Raises:
        FileNotFoundError: the object does not exist.
        DamageError: the CRC32C of the bytes is not the object's.
    """
    with explaining():
        content: bytes = blob.download_as_bytes()
    return content


def _check(checksum: google_crc32c.Checksum, blob: "Blob", path: UPath) -> None:
    """Raise DamageError if the CRC32C of the received bytes is not the object's."""
    if base64.b64encode(checksum.digest()).decode() != blob.crc32c:
        raise DamageError(f"{path} must arrive unchanged. Received: other bytes. Run the same command again")


def _ranges(blob: "Blob", begin: int, end: int) -> Iterator[bytes]:
    """Yield bytes `begin` to `end`, in order. At most `RANGES_AT_ONCE` + 1 ranges are in memory."""
    parts = ((start, min(start + RANGE_BYTES, end)) for start in range(begin, end, RANGE_BYTES))
    requests = [(stop - start, partial(_range, blob, start, stop)) for start, stop in parts]
    with ahead(requests, RANGES_AT_ONCE, sys.maxsize) as answers:
        for answer in answers:
            yield answer.result()


def _range(blob: "Blob", begin: int, end: int) -> bytes:
    """Return bytes `begin` to `end`, fewer if the object is shorter.

    `single_shot_download`: by default the client reads a response in chunks of 8 KiB, which makes many ranges at once
    slower than one (github.com/googleapis/python-storage/issues/1458).
    `checksum`: None, since the CRC32C that the server sends is that of the whole object.
    """
    with explaining():
        content: bytes = blob.download_as_bytes(
            start=begin, end=end - 1, if_generation_match=blob.generation, single_shot_download=True, checksum=None
        )
    return content

"""Google Cloud Storage through its own client, where fsspec can't: uploads checked on arrival, ranges side by side,
writes that go through only where nobody wrote in between, reads of one generation, and listings that fail in words.

Requests are retried by the client, two minutes at most; what fails for good is told by `explained`.
"""

import base64
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c
from upath import UPath

from cluster.errors import DamageError, KuzushijiError

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client

RANGE_BYTES = 8 << 20
RANGES_AT_ONCE = 8
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")  # https://cloud.google.com/storage/docs/buckets#naming

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what fails is raised, and told in one line
# It looks for hierarchical namespaces, which nothing here uses, and waits a minute for a server without them.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def is_bucket(path: UPath) -> bool:
    return path.protocol in ("gs", "gcs")


def has_name(path: UPath) -> bool:
    """Whether the bucket of a path has a name that a bucket can have."""
    return _NAME.fullmatch(path.path.partition("/")[0]) is not None


@cache
def options() -> dict[str, Any]:
    """How gcsfs is to be used: with the credentials that the client uses, and no memory of listings, since others write
    too.
    """
    return {"token": "google_default" if _credentials() else "anon", "use_listings_cache": False}


@cache
def _credentials() -> Any:
    """Application default credentials; None where there are none: public buckets can be read all the same.

    Raises:
        KuzushijiError: the file that is to hold them can't be used.
    """
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    if "STORAGE_EMULATOR_HOST" in os.environ:
        return None
    try:
        return google.auth.default(scopes=[SCOPE])[0]
    except Exception as error:  # of many kinds, where the file is not as it should be
        if file := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise KuzushijiError(
                "GOOGLE_APPLICATION_CREDENTIALS must name a file with credentials. "
                f"Received: {file}: {' '.join(str(error).split())[:200]}. Mend it, or unset the variable"
            ) from None
        if isinstance(error, DefaultCredentialsError):
            return None
        raise


@cache
def _client() -> "Client":
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    return Client(project=None, credentials=_credentials() or AnonymousCredentials())  # type: ignore[no-untyped-call]


def _blob(path: UPath) -> "Blob":
    bucket, _, name = path.path.partition("/")
    return _client().bucket(bucket).blob(name)


@cache
def reach(bucket: str) -> None:
    """Look into a bucket, so that a wrong name or a missing right is found before any work.

    Raises:
        KuzushijiError: it is not there, or may not be listed.
    """
    with explaining():
        next(iter(_client().list_blobs(bucket, max_results=1)), None)


def upload(local: Path, target: UPath) -> None:
    """Make an object of a file; what arrives is held against the file's CRC32C."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    with explaining():
        _blob(target).upload_from_filename(str(local), checksum="crc32c", retry=DEFAULT_RETRY)


def change(target: UPath, content: Callable[[bytes | None], bytes | None]) -> None:
    """Write what `content` makes of an object's bytes (None: there is none; or, as a result, leave it), if nobody wrote
    in between; else once more with what is there then.
    """
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud.storage.retry import DEFAULT_RETRY

    while True:  # each turn but the last is somebody else's write that went through
        blob = _blob(target)
        try:
            old = _download(blob)  # which also tells the generation
        except FileNotFoundError:
            old = None
        new = content(old)
        if new is None or new == old:
            return
        with suppress(PreconditionFailed), explaining():
            # Generation 0 is that of an object that is not there.
            generation = blob.generation if old is not None else 0
            blob.upload_from_string(new, checksum="crc32c", if_generation_match=generation, retry=DEFAULT_RETRY)
            return


def has(path: UPath) -> bool:
    """Whether there is such an object. gcsfs' own answer takes every failure for a no (fsspec's `isfile`)."""
    with explaining():
        return bool(_blob(path).exists())


def read_bytes(path: UPath) -> bytes:
    """An object, in one request, so that it is whole also while others replace it; held against its CRC32C.

    Raises:
        FileNotFoundError: there is no such object.
        DamageError: it did not arrive as it is there.
    """
    return _download(_blob(path))


def open_read(path: UPath) -> BinaryIO:
    """Open one generation of an object for reading here and there. Nothing is held against a checksum; reads fail with
    the client's errors, for `explaining`.

    Raises:
        FileNotFoundError: there is no such object.
    """
    blob = _blob(path)
    with explaining():
        blob.reload()
        stream: BinaryIO = blob.open("rb", chunk_size=RANGE_BYTES, if_generation_match=blob.generation)
    return stream


def read_chunks(path: UPath, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin` to `end` of one generation of an object, in order, fewer if it is shorter; several ranges are under
    way at once. What is read whole is held against its CRC32C.

    Raises:
        FileNotFoundError: there is no such object, or it was replaced meanwhile.
        DamageError: it did not arrive as it is there.
    """
    blob = _blob(path)
    with explaining():
        blob.reload()
        checksum = google_crc32c.Checksum()
        for chunk in _ranges(blob, begin, min(end, blob.size)):
            checksum.update(chunk)
            yield chunk
        if begin == 0 and end >= blob.size and base64.b64encode(checksum.digest()).decode() != blob.crc32c:
            raise DamageError(f"{path} must arrive as it is there. Received: other bytes. Run the same command again")


def list_folder(folder: UPath) -> tuple[dict[str, int], list[str]]:
    """Name to size in bytes of the objects directly in a folder, and the names of the folders in it, sorted."""
    bucket, _, name = folder.path.rstrip("/").partition("/")
    prefix = f"{name}/" if name else ""
    with explaining():
        listing = _client().list_blobs(bucket, prefix=prefix, delimiter="/")
        files = {blob.name.removeprefix(prefix): int(blob.size) for blob in listing}
    files.pop("", None)  # an object that stands for the folder itself
    return files, sorted(found.removeprefix(prefix).rstrip("/") for found in listing.prefixes)


def remove_folder(folder: UPath) -> None:
    """Remove all objects under a name that is not empty. To gcsfs such a name is a pattern."""
    from google.api_core.exceptions import NotFound
    from google.cloud.storage.retry import DEFAULT_RETRY

    bucket, _, name = folder.path.rstrip("/").partition("/")
    assert name, "never a whole bucket"
    with explaining():
        for blob in list(_client().list_blobs(bucket, prefix=f"{name}/")):
            with suppress(NotFound):  # somebody else's doing, or an answer that was lost
                blob.delete(retry=DEFAULT_RETRY)


def _download(blob: "Blob") -> bytes:
    with explaining():
        content: bytes = blob.download_as_bytes()
    return content


def _ranges(blob: "Blob", begin: int, end: int) -> Iterator[bytes]:
    """In order, with a bounded number in memory."""
    coming: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(RANGES_AT_ONCE)
    try:
        for start in range(begin, end, RANGE_BYTES):
            last = min(start + RANGE_BYTES, end) - 1  # the client counts it in
            coming.append(pool.submit(_range, blob, start, last))
            if len(coming) > RANGES_AT_ONCE:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:  # after a failure the others are not waited for: each may take the client's two minutes
        pool.shutdown(wait=False, cancel_futures=True)


def _range(blob: "Blob", start: int, last: int) -> bytes:
    """In one piece: read in pieces of 8 KiB, as the client does otherwise, many ranges at once are slower than one.

    The client could not check it: what an object's checksum is of, is the whole.
    """
    content: bytes = blob.download_as_bytes(
        start=start, end=last, if_generation_match=blob.generation, single_shot_download=True, checksum=None
    )
    return content


@contextmanager
def explaining() -> Iterator[None]:
    """Failures of the client come out as ours; an object that is not there (any more) as FileNotFoundError."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    try:
        yield
    except PreconditionFailed as error:
        if error.response is not None and error.response.request.method == "GET":  # replaced since it was looked at
            raise FileNotFoundError(" ".join(str(error).split())) from None
        raise
    except Exception as error:
        told = explained(error)
        if told is None and isinstance(error, NotFound):
            raise FileNotFoundError(" ".join(str(error).split())) from None
        if told is None:
            raise
        raise told from None


def explained(error: BaseException) -> KuzushijiError | None:
    """What a failure of Google's client or of gcsfs means, in one line with its mend; None for other failures."""
    if "google.auth" not in sys.modules:
        return None
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from google.cloud.storage.exceptions import DataCorruption
    from requests import RequestException

    cause = error.cause if isinstance(error, RetryError) and error.cause else error
    text = " ".join(str(cause).split())
    code = cause.code if isinstance(cause, GoogleAPICallError) else getattr(cause, "code", None)
    if isinstance(cause, OSError) and text.startswith("Forbidden: "):  # so gcsfs
        code = 403
    if isinstance(cause, DefaultCredentialsError) or code == 401:
        return KuzushijiError(
            f"Google Cloud must know who asks. Received: {text[:200]}. Run `gcloud auth application-default login`, "
            "or let GOOGLE_APPLICATION_CREDENTIALS name a key file"
        )
    if isinstance(cause, GoogleAuthError) and not isinstance(cause, TransportError):
        return KuzushijiError(
            f"Google Cloud must accept the credentials. Received: {text[:200]}. "
            "Run `gcloud auth application-default login`"
        )
    bucket = _bucket_in(text)
    if isinstance(cause, DataCorruption):
        return DamageError(f"what {bucket} sends must arrive as it is there. Received: {text[:200]}. Run it again")
    if code == 403:
        return KuzushijiError(
            f"{bucket} must let you in. Received: {text[:300]}. Whoever owns it runs `gcloud storage buckets "
            f"add-iam-policy-binding {bucket} --member=user:YOU --role=roles/storage.objectUser`"
        )
    if code == 404 and "specified bucket" in text:
        return KuzushijiError(
            f"{bucket} must be there. Received: {text[:200]}. Run `gcloud storage buckets create {bucket}`"
        )
    unreached = RetryError | TransportError | RequestException
    if isinstance(error, unreached) or (isinstance(code, int) and (code == 429 or code >= 500)):
        return KuzushijiError(
            f"{bucket} must answer. Received, after retries: {text[:300]}. Run the same command again"
        )
    return None


def _bucket_in(text: str) -> str:
    """The bucket that a failed request was of, from its address."""
    found = re.search(r"\bb/([a-z0-9][a-z0-9._-]+)", text) or re.search(r"Forbidden: ([a-z0-9._-]+)", text)
    return f"gs://{found[1]}" if found else "the bucket"

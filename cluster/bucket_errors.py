"""Failures of Google's client, and of gcsfs, as one line that says what to run.

They are what remains after the client's retries (two minutes at most).
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import DamageError, KuzushijiError, without_secrets


@contextmanager
def explaining(bucket: str = "") -> Iterator[None]:
    """Replace a failure of the client with the exception that `explained` returns for it.

    bucket: as in `explained`.

    Raises:
        FileNotFoundError: the object does not exist, or was replaced while it was read.
        KuzushijiError: as `explained`. Other exceptions are re-raised unchanged.
    """
    from google.api_core.exceptions import NotFound, PreconditionFailed

    try:
        yield
    except PreconditionFailed as error:
        # Only a GET: the caller of a conditional write handles its own 412.
        if error.response is not None and error.response.request.method == "GET":
            raise FileNotFoundError(" ".join(str(error).split())) from error
        raise
    except Exception as error:
        explanation = explained(error, bucket)
        if explanation is None and isinstance(error, NotFound):
            raise FileNotFoundError(" ".join(str(error).split())) from error
        if explanation is None:
            raise
        raise explanation from error


def explained(error: BaseException, bucket: str = "") -> KuzushijiError | None:
    """Return an exception of Google's client or of gcsfs as one line that says what to run; None for all others.

    bucket: address of the bucket, for a failure whose text does not name it.
    """
    if "google.auth" not in sys.modules:  # neither of them has run in this process
        return None
    from google.api_core.exceptions import RetryError
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    from requests import RequestException

    cause = error.cause if isinstance(error, RetryError) and error.cause else error
    text = " ".join(str(cause).split())
    text = re.sub(r'\{ ?"error": ?\{.*?"message": ?"(.*?)".*', r"\1", text).rstrip(".")  # of JSON, only the message
    text = without_secrets(text)
    code = getattr(cause, "code", None)
    if isinstance(cause, InvalidResponse):  # of an upload in parts
        code, text = cause.response.status_code, f"HTTP {cause.response.status_code}"
    if isinstance(cause, OSError) and text.startswith("Forbidden: "):  # gcsfs, for a 403
        code = 403
    if isinstance(cause, DefaultCredentialsError) or code == 401:
        return KuzushijiError(
            f"Google Cloud needs credentials. Received: {text[:200]}. Run `gcloud auth application-default login`, "
            "or let GOOGLE_APPLICATION_CREDENTIALS name a key file"
        )
    if isinstance(cause, GoogleAuthError) and not isinstance(cause, TransportError):
        return KuzushijiError(
            f"Google Cloud must accept the credentials. Received: {text[:200]}. "
            "Run `gcloud auth application-default login`"
        )
    bucket = _bucket_in(text, bucket)
    if isinstance(cause, DataCorruption):
        return DamageError(
            f"data from {bucket} must arrive unchanged. Received: {text[:200]}. Run the same command again"
        )
    if code == 403:
        return KuzushijiError(_refused(bucket, text))
    if code == 400 and "user project" in text.lower():  # none, or an invalid one
        return KuzushijiError(
            f"requests to {bucket} must name a project that pays for them. Received: {text[:300]}. Set "
            "GOOGLE_CLOUD_QUOTA_PROJECT to a project of yours with billing, here and on the machines of a cluster"
        )
    if code == 404 and "specified bucket" in text:
        return KuzushijiError(
            f"{bucket} must exist. Received: {text[:200]}. Run `gcloud storage buckets create {bucket}`"
        )
    unreached = RetryError | TransportError | RequestException
    if isinstance(error, unreached) or (isinstance(code, int) and (code == 429 or code >= 500)):
        return KuzushijiError(
            f"{bucket} must answer. Received, after retries: {text[:300]}. Run the same command again"
        )
    return None


def _refused(bucket: str, text: str) -> str:
    """Return the message for a 403."""
    if "cannot be deleted" in text:  # retention policies and holds
        return (
            f"{bucket} must allow objects to be replaced and deleted. Received: {text[:400]}. Use a bucket without "
            f"holds or a retention policy, or run `gcloud storage buckets update {bucket} --clear-retention-period`. "
            "See docs/faq.md"
        )
    missing = re.search(r"storage\.objects\.\w+|serviceusage\.services\.use", text)
    if not missing:  # billing, an organization's policy, ...: no role helps
        return f"{bucket} must grant you access. Received: {text[:400]}. Ask its owner to fix that. See docs/faq.md"
    grant, role = f"storage buckets add-iam-policy-binding {bucket}", "storage.objectUser"
    if missing[0] in ("storage.objects.get", "storage.objects.list"):
        role = "storage.objectViewer"
    elif missing[0].startswith("serviceusage"):  # on the project of GOOGLE_CLOUD_QUOTA_PROJECT
        grant, role = "projects add-iam-policy-binding PROJECT", "serviceusage.serviceUsageConsumer"
    return (
        f"{bucket} must grant you access. Received: {text[:400]}. To grant {missing[0]}, its owner runs "
        f"`gcloud {grant} --member=user:YOU --role=roles/{role}`. See docs/faq.md"
    )


def _bucket_in(text: str, known: str) -> str:
    """Return the `gs://` address of the bucket that the text of a failure names, or else `known` or `the bucket`."""
    found = re.search(r"\bb/([a-z0-9][a-z0-9._-]+)", text) or re.search(r"Forbidden: ([a-z0-9._-]+)", text)
    return f"gs://{found[1]}" if found else known or "the bucket"

"""The client of Google Cloud Storage and its credentials, and the configuration of gcsfs.

This package reads and writes a bucket with Google's own client. Only Ray Train needs an fsspec file system, which is
gcsfs: see `cluster.places.arrow_filesystem`.
"""

import logging
import os
from functools import cache
from typing import TYPE_CHECKING, Any

from cluster.errors import KuzushijiError, squeezed

if TYPE_CHECKING:
    from google.cloud.storage import Client

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


@cache
def credentials() -> Any:
    """Return the application default credentials. None: there are none, which is enough to read public buckets.

    Raises:
        KuzushijiError: the file that GOOGLE_APPLICATION_CREDENTIALS names can't be used.
    """
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    if "STORAGE_EMULATOR_HOST" in os.environ:
        return None
    try:
        return google.auth.default(scopes=[SCOPE])[0]
    except Exception as error:  # google.auth raises many types for a malformed file
        if file := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise KuzushijiError(
                "GOOGLE_APPLICATION_CREDENTIALS must name a file with credentials. "
                f"Received: {file}: {squeezed(error, 200)}. Fix the file, or unset the variable"
            ) from error
        if isinstance(error, DefaultCredentialsError):
            return None
        raise


@cache
def client() -> "Client":
    """Return the client of this process. It retries a request for at most two minutes.

    Raises:
        KuzushijiError: as `credentials`.
    """
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    return Client(project=None, credentials=credentials() or AnonymousCredentials())  # type: ignore[no-untyped-call]


def paying_project() -> str | None:
    """Return the project that pays for requests to buckets with "requester pays".

    The variable is Google's own: its credentials, too, send this project as the one whose quota is used.
    """
    return os.environ.get("GOOGLE_CLOUD_QUOTA_PROJECT") or None


@cache
def gcsfs_options() -> dict[str, Any]:
    """Configure gcsfs for this process, before its first import, and return its storage options.

    The options select the credentials of `client`, and turn off the cache of listings, since other processes write too.

    Raises:
        KuzushijiError: as `credentials`.
    """
    # gcsfs logs each failed request; its caller gets the exception, which the command line prints in one line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # gcsfs reads this variable when it is imported. By default it asks a gRPC service for the type of each bucket, and
    # waits a minute per request for a server without that service, such as an emulator:
    # github.com/apache/iceberg-python/pull/3580. This package uses no hierarchical namespaces.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    return {
        "token": "google_default" if credentials() else "anon",
        "use_listings_cache": False,
        "requester_pays": paying_project() or False,
    }

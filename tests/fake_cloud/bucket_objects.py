"""Google's rules about objects that the emulator ignores: generations, preconditions, names, listings."""

import base64
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fake_cloud.bucket_emulator import Emulator

Resource = dict[str, Any]
Query = Mapping[str, str]


@dataclass
class Response:
    """An HTTP response."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Resource, status: int = 200) -> "Response":
        """Return a response with JSON content."""
        return cls(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=UTF-8"})


class RefusedError(Exception):
    """A request is answered with an error, in Google's JSON form."""

    def __init__(self, status: int, reason: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{status} {message}")
        self.status, self.reason, self.message, self.headers = status, reason, message, dict(headers or {})

    def response(self) -> Response:
        if self.status == 304:  # without a body
            return Response(304)
        error = {"message": self.message, "domain": "global", "reason": self.reason}
        answer = Response.of({"error": {"code": self.status, "message": self.message, "errors": [error]}}, self.status)
        answer.headers.update(self.headers)
        return answer


class Version(NamedTuple):
    """The version of an object. Both numbers are 0 if there is no object."""

    generation: int
    metageneration: int


def number(query: Query, name: str) -> int | None:
    """Return an integer parameter of the query, or None if it is missing.

    Raises:
        RefusedError: it is not an integer.
    """
    if name not in query:
        return None
    try:
        return int(query[name])
    except ValueError:
        raise RefusedError(400, "invalidParameter", f"Invalid value for {name}: {query[name]}") from None


def check(version: Version, query: Query, prefix: str = "if", unchanged: int = 412) -> None:
    """Check `ifGenerationMatch` and similar preconditions against a version.

    unchanged: the status if a NotMatch precondition fails.

    Raises:
        RefusedError: a precondition fails.
    """
    for kind, current in (("Generation", version.generation), ("Metageneration", version.metageneration)):
        wanted, unwanted = number(query, f"{prefix}{kind}Match"), number(query, f"{prefix}{kind}NotMatch")
        if wanted is not None and wanted != current:
            raise RefusedError(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")
        if unwanted is not None and unwanted == current:
            raise RefusedError(
                unchanged, "conditionNotMet", "At least one of the pre-conditions you specified did not hold."
            )


class Objects:
    """The objects of all buckets. The emulator stores bytes and metadata; versions are stored here.

    Hold `lock` from the check of a version until the action that depends on it. There is one lock for all objects,
    because the emulator serves one request at a time anyway.
    """

    def __init__(self, emulator: Emulator) -> None:
        self.lock = threading.RLock()
        self._emulator = emulator
        self._versions: dict[str, dict[str, Version]] = {}
        self._last_generation = 0

    def create_bucket(self, bucket: str) -> None:
        with self.lock:
            self._emulator.create_bucket(bucket)
            self._versions[bucket] = {}

    def bucket(self, bucket: str) -> Resource:
        with self.lock:
            self.names(bucket)
            return self._emulator.bucket(bucket)

    def buckets(self) -> list[str]:
        with self.lock:
            return sorted(self._versions)

    def names(self, bucket: str) -> list[str]:
        """Return the names of objects in the order of code points, which is that of UTF-8 bytes.

        Raises:
            RefusedError: there is no such bucket.
        """
        with self.lock:
            if bucket not in self._versions:
                raise RefusedError(404, "notFound", "The specified bucket does not exist.")
            return sorted(self._versions[bucket])

    def version(self, bucket: str, name: str) -> Version:
        with self.lock:
            if bucket not in self._versions:
                raise RefusedError(404, "notFound", "The specified bucket does not exist.")
            return self._versions[bucket].get(name, Version(0, 0))

    def existing(self, bucket: str, name: str, query: Query, unchanged: int = 412) -> Version:
        """Return the version of an object.

        Raises:
            RefusedError: the object does not exist, has another generation than the query asks for, or does not meet
                the preconditions.
        """
        version = self.version(bucket, name)
        if not version.generation or number(query, "generation") not in (None, version.generation):
            raise RefusedError(404, "notFound", f"No such object: {bucket}/{name}")
        check(version, query, unchanged=unchanged)
        return version

    def put(self, bucket: str, name: str, data: bytes, metadata: Resource, query: Query) -> Resource:
        """Write a new generation if the preconditions hold."""
        if name in ("", ".", "..") or len(name.encode()) > 1024 or "\r" in name or "\n" in name:
            raise RefusedError(400, "invalid", f"Invalid object name: {name!r}")
        with self.lock:
            check(self.version(bucket, name), query)
            self._emulator.put(bucket, name, data, metadata)
            # Microseconds, like Google's. Each value is used once.
            self._last_generation = max(time.time_ns() // 1000, self._last_generation + 1)
            self._versions[bucket][name] = Version(self._last_generation, 1)
            return self.resource(bucket, name)

    def patch(self, bucket: str, name: str, metadata: Resource, query: Query) -> Resource:
        with self.lock:
            version = self.existing(bucket, name, query)
            old = self._emulator.resource(bucket, name).get("metadata", {})
            if "metadata" in metadata:
                merged = {**old, **(metadata["metadata"] or {})}
                metadata = {**metadata, "metadata": {key: value for key, value in merged.items() if value is not None}}
            self._emulator.patch(bucket, name, metadata)
            self._versions[bucket][name] = version._replace(metageneration=version.metageneration + 1)
            return self.resource(bucket, name)

    def delete(self, bucket: str, name: str, query: Query) -> None:
        with self.lock:
            self.existing(bucket, name, query)
            self._emulator.delete(bucket, name)
            del self._versions[bucket][name]

    def data(self, bucket: str, name: str) -> bytes:
        with self.lock:
            return self._emulator.data(bucket, name)

    def resource(self, bucket: str, name: str) -> Resource:
        with self.lock:
            return self._stamped(bucket, name, self._emulator.resource(bucket, name))

    def resources(self, bucket: str) -> dict[str, Resource]:
        """Return all objects of a bucket by name, in the order of listings."""
        with self.lock:
            names = self.names(bucket)
            stored = self._emulator.resources(bucket)
            return {name: self._stamped(bucket, name, stored[name]) for name in names}

    def _stamped(self, bucket: str, name: str, resource: Resource) -> Resource:
        """Return the emulator's resource with Google's form of name and version."""
        generation, metageneration = self._versions[bucket][name]
        etag = base64.b64encode(f"{generation}/{metageneration}".encode()).decode()
        ours = {
            "name": name,
            "id": f"{bucket}/{name}/{generation}",
            "generation": str(generation),
            "metageneration": str(metageneration),
            "etag": etag,
            "size": str(resource["size"]),
        }
        return {key: value for key, value in resource.items() if key != "acl"} | ours


def page(resources: Mapping[str, Resource], query: Query, page_size: int) -> Resource:
    """Return one page of a listing, in the form of `objects.list`."""
    for name in ("matchGlob", "softDeleted", "versions", "includeTrailingDelimiter"):
        if query.get(name, "false") != "false":
            raise RefusedError(400, "notImplemented", f"The strict bucket does not list by {name}.")
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    entries: dict[str, Resource | None] = {}  # None: a prefix, in place of all names that begin with it
    for name, resource in resources.items():
        if not name.startswith(prefix) or name < query.get("startOffset", ""):
            continue
        if query.get("endOffset") and name >= query["endOffset"]:
            continue
        end = name.find(delimiter, len(prefix)) if delimiter else -1
        if end < 0:
            entries[name] = resource
        else:
            entries[name[: end + len(delimiter)]] = None
    after = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
    rest = [name for name in sorted(entries) if name > after]
    size = min(number(query, "maxResults") or page_size, page_size)
    shown = rest[:size]
    answer: Resource = {"kind": "storage#objects"}
    if items := [entries[name] for name in shown if entries[name] is not None]:
        answer["items"] = items
    if prefixes := [name for name in shown if entries[name] is None]:
        answer["prefixes"] = prefixes
    if len(rest) > size:
        answer["nextPageToken"] = base64.urlsafe_b64encode(shown[-1].encode()).decode()
    return answer

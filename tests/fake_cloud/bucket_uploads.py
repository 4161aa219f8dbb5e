"""Uploads in the three ways of the JSON API (media, multipart, resumable). Declared checksums are verified."""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

import google_crc32c

from fake_cloud.bucket_objects import Objects, Query, RefusedError, Resource, Response, check

_KEPT = 256 * 1024  # of an unfinished upload, Google keeps multiples of this size
_WAYS = ("media", "multipart", "resumable")


def _split_multipart(content_type: str, body: bytes) -> tuple[Resource, str, bytes]:
    """Return metadata, content type and bytes of a `multipart/related` body. `email` would change line breaks."""
    if not (match := re.search(r'boundary="?([^";]+)"?', content_type)):
        raise RefusedError(400, "badContent", "Missing multipart boundary.")
    boundary = b"--" + match[1].encode()
    opening, start = body.find(boundary), body.find(b"\n") + 1
    # gcsfs ends lines with LF only. Only the line break before the closing boundary does not belong to the object.
    newline = b"\r\n" if body[:start].endswith(b"\r\n") else b"\n"
    middle = body.find(newline + boundary + newline, start)
    end = body.find(newline + boundary + b"--", middle + 1)
    if opening != 0 or middle < 0 or end < 0:
        raise RefusedError(400, "badContent", "Malformed multipart body.")
    metadata = body[start:middle].partition(newline * 2)[2]
    head, _, data = body[middle + len(newline + boundary + newline) : end].partition(newline * 2)
    kind = re.search(rb"(?i)^content-type:\s*([^\r\n]+)", head, re.MULTILINE)
    return json.loads(metadata), kind[1].decode() if kind else "application/octet-stream", data


def check_hashes(data: bytes, metadata: Resource, headers: Mapping[str, str]) -> None:
    """Check data against the hashes declared in the metadata or in `X-Goog-Hash`.

    Raises:
        RefusedError: a hash differs.
    """
    md5 = hashlib.md5(data, usedforsecurity=False).digest()
    right = {"crc32c": google_crc32c.Checksum(data).digest(), "md5": md5}
    declared = [("crc32c", metadata.get("crc32c")), ("md5", metadata.get("md5Hash"))]
    declared += [part.strip().split("=", 1) for part in headers.get("X-Goog-Hash", "").split(",") if "=" in part]
    for kind, value in declared:
        found = base64.b64encode(right[kind]).decode()
        if value not in (None, found):
            message = f'Provided {kind.upper()} hash "{value}" doesn\'t match calculated {kind.upper()} hash "{found}".'
            raise RefusedError(400, "invalid", message)


@dataclass
class _Session:
    bucket: str
    name: str
    metadata: Resource
    query: Query  # of the first request: its preconditions are checked again at the end
    received: bytearray = field(default_factory=bytearray)
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: Resource | None = None


class Uploads:
    """Accepts uploads, and remembers the resumable ones."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._sessions: dict[str, _Session] = {}

    def begin(self, bucket: str, query: Query, headers: Mapping[str, str], body: bytes) -> Resource | str:
        """Write an object and return its resource. For a resumable upload, return its session's path and query."""
        way = query.get("uploadType")
        if way not in _WAYS:
            raise RefusedError(400, "invalid", f"uploadType is none of {', '.join(_WAYS)}: {way}")
        kind = headers.get("Content-Type", "application/octet-stream")
        metadata: Resource = {}
        data = body
        if way == "multipart":
            metadata, kind, data = _split_multipart(kind, body)
        elif way == "resumable":
            kind = headers.get("X-Upload-Content-Type", "application/octet-stream")
            metadata = json.loads(body or b"{}")
        name = query.get("name") or metadata.get("name", "")
        metadata = {"contentType": kind} | {key: value for key, value in metadata.items() if value is not None}
        if way == "resumable":
            return self._start(_Session(bucket, name, metadata, query))
        check_hashes(data, metadata, headers)
        return self._objects.put(bucket, name, data, metadata, query)

    def _start(self, session: _Session) -> str:
        check(self._objects.version(session.bucket, session.name), session.query)
        key = secrets.token_urlsafe(24)
        self._sessions[key] = session
        bucket, name = quote(session.bucket, safe=""), quote(session.name, safe="")
        return f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable&name={name}&upload_id={key}"

    def _session(self, query: Query) -> _Session:
        if query["upload_id"] not in self._sessions:
            raise RefusedError(404, "notFound", "No such upload session.")
        return self._sessions[query["upload_id"]]

    def cancel(self, query: Query) -> Response:
        self._session(query)
        del self._sessions[query["upload_id"]]
        return Response(499)

    def resume(self, query: Query, headers: Mapping[str, str], body: bytes, whole: bool = True) -> Response:
        """Accept the next bytes of a resumable upload, or return how many there are. whole: False if some are lost."""
        session = self._session(query)
        with session.lock:
            if session.done is None:
                total = self._receive(session, headers, body, whole)
                if whole and total == len(session.received):
                    return Response.of(self._finish(query, session, headers))
                del session.received[len(session.received) // _KEPT * _KEPT :]
                kept = {"Range": f"bytes=0-{len(session.received) - 1}"} if session.received else {}
                return Response(308, b"", kept)
            return Response.of(session.done)

    def _receive(self, session: _Session, headers: Mapping[str, str], body: bytes, whole: bool) -> int | None:
        """Append the new bytes. Return the total size of the upload, or None if it was not declared."""
        spec = headers.get("Content-Range")
        if spec is None:
            session.received[:] = body
            return len(body)
        match = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\d+|\*)", spec.strip())
        if not match or (match[1] and whole and int(match[2]) - int(match[1]) + 1 != len(body)):
            raise RefusedError(400, "invalid", f"Failed to parse Content-Range header: {spec}")
        if match[1] is not None:
            start, have = int(match[1]), len(session.received)
            if start > have:
                message = (
                    f"the upload offset is {start} byte(s), which exceeds already uploaded size of {have} byte(s)."
                )
                raise RefusedError(400, "invalid", f"Invalid request. According to the Content-Range header, {message}")
            session.received += body[have - start :]  # Google ignores bytes that it already has
        return None if match[3] == "*" else int(match[3])

    def _finish(self, query: Query, session: _Session, headers: Mapping[str, str]) -> Resource:
        data = bytes(session.received)
        try:
            check_hashes(data, session.metadata, headers)
            session.done = self._objects.put(session.bucket, session.name, data, session.metadata, session.query)
        except RefusedError:
            self._sessions.pop(query["upload_id"], None)
            raise
        session.received.clear()
        return session.done

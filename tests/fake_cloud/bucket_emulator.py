"""gcp-storage-emulator, in memory and in a process of its own, and the requests that the strict bucket makes to it.

The emulator ignores preconditions, paging and generations, loses bytes of multipart uploads that end in line breaks,
and stores `a//b` and `a/b` in one place. So it only stores bytes and metadata, under quoted names. The rest is ours.
"""

import http.client
import json
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

# The process ends with its standard input, so that it never outlives the tests, however they end.
_PROGRAM = """
import os, sys, threading
from gcp_storage_emulator.__main__ import main
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
main(sys.argv[1:])
"""
_START_SECONDS = 300


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _key(name: str) -> str:
    return quote(name, safe="")


class Emulator:
    """The running emulator. It serves one request at a time: only one thread may use it."""

    def __init__(self) -> None:
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._last = "", "", b""  # bucket, name and bytes of the object that was read last

    def __enter__(self) -> Self:
        self._port = _free_port()
        options = ["start", "--in-memory", "--quiet", "--host", "127.0.0.1", "--port", str(self._port)]
        self._process = subprocess.Popen([sys.executable, "-c", _PROGRAM, *options], stdin=subprocess.PIPE)
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"gcp-storage-emulator did not start (exit code {self._process.poll()})")

    def _stop(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.kill()  # all its data is in memory
        self._process.wait()
        self._process.stdin.close()

    def _ask(
        self, method: str, target: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[Any, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request(method, target, body, {"Content-Type": kind})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise RuntimeError(f"gcp-storage-emulator answered {answer.status} to {method} {target}: {data[:300]!r}")
        return answer.headers, data

    def create_bucket(self, bucket: str) -> None:
        self._ask("POST", "/storage/v1/b", json.dumps({"name": bucket}).encode())
        # Otherwise the emulator would keep every deleted object for a week.
        hard = {"softDeletePolicy": {"retentionDurationSeconds": "0"}}
        self._ask("PATCH", f"/storage/v1/b/{bucket}", json.dumps(hard).encode())

    def bucket(self, bucket: str) -> dict[str, Any]:
        return dict(json.loads(self._ask("GET", f"/storage/v1/b/{bucket}")[1]))

    def _target(self, bucket: str, name: str) -> str:
        return f"/storage/v1/b/{bucket}/o/{quote(_key(name), safe='')}"

    def put(self, bucket: str, name: str, data: bytes, metadata: dict[str, Any]) -> dict[str, Any]:
        """Store an object. Return its resource.

        Raises:
            RuntimeError: a declared checksum is wrong.
        """
        self._last = "", "", b""
        # Resumable: the only one of its three ways that keeps all bytes, whatever the content type.
        start = f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable&name={quote(_key(name), safe='')}"
        headers, _ = self._ask("POST", start, json.dumps(metadata).encode())
        session = urlsplit(headers["Location"])
        _, answer = self._ask("PUT", f"{session.path}?{session.query}", data, "application/octet-stream")
        return dict(json.loads(answer))

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        return dict(json.loads(self._ask("GET", self._target(bucket, name))[1]))

    def data(self, bucket: str, name: str) -> bytes:
        """Return the bytes of an object.

        They are kept until the next write: clients that read in ranges send one request for each, and the emulator
        always returns the whole object.
        """
        if self._last[:2] != (bucket, name):
            self._last = bucket, name, self._ask("GET", self._target(bucket, name) + "?alt=media")[1]
        return self._last[2]

    def patch(self, bucket: str, name: str, metadata: dict[str, Any]) -> None:
        self._ask("PATCH", self._target(bucket, name), json.dumps(metadata).encode())

    def delete(self, bucket: str, name: str) -> None:
        self._last = "", "", b""
        self._ask("DELETE", self._target(bucket, name))

    def resources(self, bucket: str) -> dict[str, dict[str, Any]]:
        """Return all objects of a bucket by name."""
        listing = json.loads(self._ask("GET", f"/storage/v1/b/{bucket}/o")[1])
        return {unquote(item["name"]): item for item in listing["items"]}

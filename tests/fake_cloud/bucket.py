"""A strict bucket for tests: gcp-storage-emulator behind a proxy that is as strict as Google, over real HTTP.

    with StrictBucket() as bucket:
        bucket.create("demo")
        subprocess.run([...], env=os.environ | bucket.environment)

Its rules are in `bucket_objects` and `bucket_uploads`, the supported part of the JSON API is in `bucket_routes`.
"""

import contextlib
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from fake_cloud.bucket_emulator import Emulator
from fake_cloud.bucket_faults import ANSWER_FAULTS, DOWNLOAD_FAULTS, REFUSALS, UPLOAD_FAULTS, Faults
from fake_cloud.bucket_objects import Objects, RefusedError, Response
from fake_cloud.bucket_routes import Request, Routes, reason

_SLOW_PIECES = 20
_SLOW_PAUSE = 0.02
_REFUSALS = {
    "429": (429, "rateLimitExceeded", "The object exceeded the rate limit for object mutation operations."),
    "503": (503, "backendError", "We encountered an internal error. Please try again."),
    "401": (401, "authError", "Invalid Credentials"),
    "403": (
        403,
        "forbidden",
        "someone@example.com does not have {permission} access to the Google Cloud Storage object. "
        "Permission '{permission}' denied on resource (or it may not exist).",
    ),
    "retained": (
        403,
        "retentionPolicyNotMet",
        "Object 'demo/x' is subject to bucket's retention policy or object retention and cannot be deleted or "
        "overwritten until 2031-09-20T12:18:15.93713-07:00",
    ),
    "unpaid": (400, "required", "Bucket is a requester pays bucket but no user project provided."),
    "abroad": (
        403,
        "forbidden",
        "Request is prohibited by organization's policy. vpcServiceControlsUniqueIdentifier: 4",
    ),
}
_PERMISSIONS = {"GET": "get", "DELETE": "delete"}


def _refusal(kind: str, method: str, path: str) -> RefusedError:
    status, why, message = _REFUSALS[kind]
    action = "list" if method == "GET" and path.endswith("/o") else _PERMISSIONS.get(method, "create")
    return RefusedError(status, why, message.format(permission=f"storage.objects.{action}"))


@dataclass(frozen=True)
class Logged:
    """A request. `status` is None if the connection was closed without an answer."""

    method: str
    path: str  # with the query
    status: int | None


class _Server(ThreadingHTTPServer):
    """Knows its connections, so that it can close those that clients keep open."""

    daemon_threads = False  # so that server_close() waits for them
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], routes: Routes, faults: Faults, requests: list[Logged]) -> None:
        super().__init__(address, _Handler)
        self.routes, self.faults, self.requests = routes, faults, requests
        self.stopping = threading.Event()
        self.latency = 0.0
        self._open: set[Any] = set()
        self._open_lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hung up."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """Stop the server and all connections, also those with unfinished answers."""
        self.stopping.set()
        self.shutdown()
        with self._open_lock:
            for connection in self._open:
                with contextlib.suppress(OSError):  # the client has closed it
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, applies faults, writes answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the log is `StrictBucket.requests`."""

    def _body(self, broken: bool) -> tuple[bytes, bool]:
        """Return the request's body, and whether it is complete. broken: read only half of it, or its first chunk."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length // 2 if broken else length)
            return body, len(body) == length
        body = b""
        while True:
            line = self.rfile.readline()
            size = int(line.partition(b";")[0] or b"0", 16)
            piece = self.rfile.read(size)
            body += piece
            if broken or not line or len(piece) < size:
                return body, False
            if size == 0:
                break
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return body, True

    def _answer(self) -> None:
        faults, method, target = self.server.faults, self.command, self.path
        has_body = "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
        fault = faults.take(REFUSALS + (UPLOAD_FAULTS if has_body else ()), method, target)
        body, whole = self._body(broken=fault in UPLOAD_FAULTS)
        base = f"{self.headers.get('X-Forwarded-Proto', 'http')}://{self.headers['Host']}"
        request = Request(method, target, self.headers, body, base, whole)
        if not whole:  # a fault, or a client that died
            if "upload_id" in request.query:
                self.server.routes.answer(request)
            self._log(None)
            self.close_connection = True
            return
        if fault:
            answer = _refusal(fault, method, target.partition("?")[0]).response()
        else:
            try:
                answer = self.server.routes.answer(request)
            except Exception as error:
                # A bug of the strict bucket. Not 500, on which clients would retry for minutes.
                traceback.print_exc()
                answer = RefusedError(400, "internalError", f"The strict bucket broke: {error!r}").response()
            download = "X-Goog-Hash" in answer.headers
            if answer.body:
                fault = faults.take(ANSWER_FAULTS + (DOWNLOAD_FAULTS if download else ()), method, target)
        self._log(answer.status)
        self._send(answer, fault)

    def _log(self, status: int | None) -> None:
        self.server.requests.append(Logged(self.command, self.path, status))

    def _send(self, answer: Response, fault: str | None) -> None:
        time.sleep(self.server.latency)
        body = answer.body
        if fault == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.send_response(answer.status, reason(answer.status))
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "slow":
            size = -(-len(body) // _SLOW_PIECES)
            for start in range(0, len(body), size):
                self.wfile.write(body[start : start + size])
                self.server.stopping.wait(_SLOW_PAUSE)
        elif fault == "hold":
            half = len(body) // 2
            self.wfile.write(body[:half])
            while not self.server.faults.cleared.wait(0.05) and not self.server.stopping.is_set():
                pass
            self.wfile.write(body[half:])
        else:
            self.wfile.write(body)


for _method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
    setattr(_Handler, f"do_{_method}", _Handler._answer)


class StrictBucket:
    """A server with buckets that are as strict as Google's. All content is lost at the end."""

    def __init__(self, *, page_size: int = 1000) -> None:
        self._page_size = page_size
        self.faults = Faults()
        self.requests: list[Logged] = []

    def __enter__(self) -> Self:
        self._emulator = Emulator().__enter__()
        try:
            self._objects = Objects(self._emulator)
            routes = Routes(self._objects, self._page_size, self._refusal_in_a_batch)
            self._server = _Server(("127.0.0.1", 0), routes, self.faults, self.requests)
        except BaseException:
            self._emulator.__exit__(None, None, None)
            raise
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="strict-bucket")
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def _refusal_in_a_batch(self, method: str, target: str) -> RefusedError | None:
        fault = self.faults.take(REFUSALS, method, target)
        return _refusal(fault, method, target.partition("?")[0]) if fault else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._server.stop()
            self._thread.join()
        finally:
            self._emulator.__exit__(kind, error, trace)

    def delay(self, seconds: float) -> None:
        """Delay the start of each following answer, like a longer distance. Answers do not wait for each other."""
        self._server.latency = seconds

    @property
    def environment(self) -> dict[str, str]:
        """The environment with which google-cloud-storage and gcsfs use this bucket: no credentials, no delay."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # otherwise gcsfs tries a gRPC service of Google for a minute
            "FSSPEC_GS_TOKEN": "anon",  # read when fsspec is imported
            "NO_GCE_CHECK": "true",  # read on use; without it, gcsfs first waits for a metadata server
        }

    def create(self, bucket: str) -> None:
        """Create a bucket."""
        self._objects.create_bucket(bucket)

    def read(self, bucket: str, name: str) -> bytes | None:
        """Return an object's bytes, bypassing all faults; None if there is no such object."""
        with self._objects.lock:
            return self._objects.data(bucket, name) if self._objects.version(bucket, name).generation else None

    def write(self, bucket: str, name: str, data: bytes) -> None:
        """Write a new generation of an object, bypassing all faults."""
        self._objects.put(bucket, name, data, {"contentType": "application/octet-stream"}, {})

    def names(self, bucket: str) -> list[str]:
        """Return the names of a bucket's objects, in the order of listings."""
        return self._objects.names(bucket)

"""Google's addresses inside the hosts' network: HTTPS for the APIs and the storage, HTTP for the metadata."""

import contextlib
import http.client
import json
import logging
import re
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import trustme

from fake_cloud.answers import Refusal, forbidden, not_implemented
from fake_cloud.compute import Compute
from fake_cloud.identity import Identity
from fake_cloud.metadata import Metadata
from fake_cloud.room import GATEWAY, METADATA_ADDRESS

NAMES = [f"{name}.googleapis.com" for name in ("cloudresourcemanager", "compute", "iam", "oauth2", "storage")]
PIECE = 1 << 16
SECONDS_FOR_STORAGE = 120.0

log = logging.getLogger("fake_cloud")


@dataclass(frozen=True)
class LoggedRequest:
    """A request: the machine that sent it, the account of its token, and the status of the answer (None: cut off)."""

    machine: str
    account: str | None
    method: str
    host: str
    path: str
    status: int | None


class Google:
    """The endpoints: threads of this process, with sockets in the hosts' network, so that they end with the process."""

    def __init__(self, compute: Compute, identity: Identity, storage: str, buckets: set[str]) -> None:
        self.compute, self.identity, self.buckets = compute, identity, buckets
        self.metadata = Metadata(identity)
        self.storage = urlsplit(storage).netloc
        self.authority = trustme.CA()
        self.requests: list[LoggedRequest] = []
        self.names: dict[str, str] = {}  # name by address, for hosts that are not instances

    def __enter__(self) -> Self:
        certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*NAMES).configure_cert(certificate)

        def listen() -> list[_Server]:
            return [_Server((GATEWAY, 443), self, certificate), _Server((METADATA_ADDRESS, 80), self, None)]

        self._servers = self.compute.machines.room.listen(listen)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for server in self._servers:
            server.stop()

    def machine(self, address: str) -> str:
        instance = self.compute.machines.at(address)
        return instance.name if instance else self.names.get(address, address)

    def api(self, handler: "_Handler", path: str, query: dict[str, str], raw: bytes) -> dict[str, Any]:
        """Return the answer of Google's APIs.

        Raises:
            Refusal: Google would refuse the request, or the fake does not support it.
        """
        host, method = handler.asked_host, handler.command
        if host == "oauth2.googleapis.com" and (method, path) == ("POST", "/token"):
            return self.identity.exchange(raw)
        service = "compute" if host == "compute.googleapis.com" else "project"
        caller = self.identity.caller(handler.headers["Authorization"], service)
        handler.account = caller.email
        try:
            body = json.loads(raw) if raw else {}
        except ValueError as error:
            raise Refusal(400, "Parse Error", "parseError") from error
        match host:
            case "compute.googleapis.com" if path.startswith("/compute/v1/"):
                return self.compute.answer(method, path.removeprefix("/compute/v1"), query, body, caller)
            case "cloudresourcemanager.googleapis.com":
                return self.identity.projects(method, path, body, caller)
            case "iam.googleapis.com":
                return self.identity.service_accounts(method, path, body, caller)
        raise not_implemented(f"{method} {host}{path}")

    def admit_to_storage(self, handler: "_Handler", path: str, batch: bytes) -> None:
        """Check that the caller may access each bucket of the request.

        An account with access to the objects of a bucket may list them, but not get the bucket itself
        (storage.buckets.get).

        Raises:
            Refusal: it may not.
        """
        caller = self.identity.caller(handler.headers["Authorization"], "storage")
        handler.account = caller.email
        of_bucket = r"/(?:(?:upload|download|resumable/upload)/)?storage/v1/b/([^/? ]+)(/o\b)?"
        where = [path] if not batch else re.findall(r"^[A-Z]+ (?:https://[^/ ]+)?(/\S*)", batch.decode(), re.M)
        for one in where:
            found = re.match(of_bucket, one)
            if not found:
                raise not_implemented(f"{handler.command} storage {one}")
            bucket, right = unquote(found[1]), "objects" if found[2] else "buckets"
            # For a bucket that does not exist, no permission is needed: the storage answers that there is none.
            if bucket in self.buckets and not self.identity.may(caller.email, right, bucket):
                message = f"{caller.email} does not have storage.{right} access to the Google Cloud Storage bucket"
                raise forbidden(f"{message} {bucket}. Permission denied on resource (or it may not exist).")


class _Server(ThreadingHTTPServer):
    """Tracks its connections, so that those that clients keep open end with it."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], google: Google, certificate: ssl.SSLContext | None) -> None:
        super().__init__(address, _Handler)
        self.google, self.tls = google, certificate is not None
        self._open: set[socket.socket] = set()
        if certificate:  # the connection's own thread does the handshake, so that a slow one delays no other
            self.socket = certificate.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # nothing about clients that hung up
            log.exception("an error of the fake cloud itself")

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # the client has closed it
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written separately
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        google = self.server.google
        self.account: str | None = None
        self.asked_host = (self.headers["Host"] or "").partition(":")[0]
        parts = urlsplit(self.path)
        query, path = dict(parse_qsl(parts.query)), unquote(parts.path)
        status: int | None = None
        try:
            if "Transfer-Encoding" in self.headers:
                self.close_connection = True  # the body has not been read
                raise not_implemented("bodies in chunks")
            if not self.server.tls:
                status = self.answer_metadata(path, query)
            elif self.asked_host == "storage.googleapis.com":
                status = self.answer_storage(parts.path)
            else:
                form = google.api(self, path, query, b"".join(self.body()))
                status = self.send(200, json.dumps(form), "application/json; charset=UTF-8")
        except Refusal as refusal:
            if refusal.status == 501:
                log.warning("%s", refusal.message)
            status = self.send(refusal.status, json.dumps(refusal.form()), "application/json; charset=UTF-8")
        finally:
            machine = google.machine(self.client_address[0])
            request = LoggedRequest(machine, self.account, self.command, self.asked_host, self.path, status)
            google.requests.append(request)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815  (names of the base class)

    def send(self, status: int, text: str, kind: str, **headers: str) -> int:
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        return status

    def body(self) -> Iterator[bytes]:
        """Yield the request's body in pieces."""
        left = int(self.headers.get("Content-Length") or 0)
        while left and (piece := self.rfile.read(min(left, PIECE))):
            left -= len(piece)
            yield piece

    def answer_metadata(self, path: str, query: dict[str, str]) -> int:
        google = self.server.google
        asker = google.compute.machines.at(self.client_address[0])
        text = google.metadata.answer(asker, path, query, self.headers["Metadata-Flavor"])
        kind = "application/json" if text[:1] == "{" else "application/text"
        return self.send(200, text, kind, Metadata_Flavor="Google")

    def answer_storage(self, path: str) -> int | None:
        """Forward the request to the strict bucket and its answer to the client, piece by piece, including faults."""
        batch = b"".join(self.body()) if path.startswith("/batch/") else b""
        try:
            self.server.google.admit_to_storage(self, path, batch)
        except Refusal:
            for _ in () if batch else self.body():
                pass  # a client that is still sending would not receive the answer
            raise
        upstream = http.client.HTTPConnection(self.server.google.storage, timeout=SECONDS_FOR_STORAGE)
        with contextlib.closing(upstream):
            try:
                self._hand_on(upstream, batch)
                answer = upstream.getresponse()
            except (OSError, http.client.HTTPException):
                self.close_connection = True  # the bucket cut the connection
                return None
            return self._hand_back(answer)

    def _hand_on(self, upstream: http.client.HTTPConnection, batch: bytes) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("authorization", "connection", "expect"):
                upstream.putheader(name, value)
        upstream.putheader("X-Forwarded-Proto", "https")
        upstream.endheaders()
        for piece in [batch] if batch else self.body():
            upstream.send(piece)

    def _hand_back(self, answer: http.client.HTTPResponse) -> int | None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        left = answer.length or 0
        while left and (piece := answer.read1(PIECE)):
            left -= len(piece)
            self.wfile.write(piece)
        self.close_connection |= left > 0  # the bucket cut the connection
        return None if left else answer.status

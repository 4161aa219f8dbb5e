"""The requests of Google's JSON API that the strict bucket supports."""

import http
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from fake_cloud.bucket_objects import Objects, Query, RefusedError, Resource, Response, check, page
from fake_cloud.bucket_uploads import Uploads

_OBJECT = r"/storage/v1/b/([^/]+)/o/([^/]+)"
_BATCH_MOST = 100


@dataclass(frozen=True)
class Request:
    """A request, with its body as far as it was received."""

    method: str
    target: str  # path and query, as sent
    headers: Message
    body: bytes
    base: str = ""  # scheme and host as the client knows them
    whole: bool = True  # False: the connection broke within the body

    @property
    def query(self) -> Query:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    def json(self) -> Resource:
        try:
            return dict(json.loads(self.body or b"{}"))
        except ValueError:
            raise RefusedError(400, "parseError", "Parse Error") from None


Handler = Callable[..., Response]


class Routes:
    """Answers requests. Thread-safe."""

    def __init__(
        self, objects: Objects, page_size: int, refusal: Callable[[str, str], RefusedError | None] = lambda *_: None
    ) -> None:
        """Set up the routes. refusal: from method and address of a call in a batch, its error answer, or None."""
        self._objects, self._refusal = objects, refusal
        self._uploads = Uploads(objects)
        self._page_size = page_size
        table: list[tuple[str, dict[str, Handler]]] = [
            (r"/storage/v1/b/([^/]+)", {"GET": self._get_bucket}),
            (r"/storage/v1/b/([^/]+)/o", {"GET": self._list}),
            (r"/upload/storage/v1/b/([^/]+)/o", dict.fromkeys(("POST", "PUT", "DELETE"), self._upload)),
            (rf"(?:/download)?{_OBJECT}", {"GET": self._get, "PATCH": self._patch, "DELETE": self._delete}),
            (rf"{_OBJECT}/copyTo/b/([^/]+)/o/([^/]+)", {"POST": self._copy}),
            (rf"{_OBJECT}/rewriteTo/b/([^/]+)/o/([^/]+)", {"POST": self._rewrite}),
            (rf"{_OBJECT}/compose", {"POST": self._compose}),
            (r"/batch/storage/v1", {"POST": self._batch}),
        ]
        self._table = [(re.compile(pattern), handlers) for pattern, handlers in table]

    def answer(self, request: Request) -> Response:
        """Return the answer to a request. Refusals become error answers."""
        path = urlsplit(request.target).path
        try:
            for pattern, handlers in self._table:
                if (match := pattern.fullmatch(path)) and request.method in handlers:
                    return handlers[request.method](request, *map(unquote, match.groups()))
            # Not 501, on which gcsfs would retry again and again.
            raise RefusedError(400, "notImplemented", f"The strict bucket knows no {request.method} {path}")
        except RefusedError as refused:
            return refused.response()

    def _get_bucket(self, request: Request, bucket: str) -> Response:
        return Response.of(self._objects.bucket(bucket))

    def _list(self, request: Request, bucket: str) -> Response:
        listing = page(self._objects.resources(bucket), request.query, self._page_size)
        for item in listing.get("items", []):
            self._link(request, item)
        return Response.of(listing)

    def _link(self, request: Request, resource: Resource) -> Resource:
        """Set the addresses of a resource to ones that the client can use. Return the resource."""
        path = f"/storage/v1/b/{quote(resource['bucket'], safe='')}/o/{quote(resource['name'], safe='')}"
        resource["selfLink"] = request.base + path
        resource["mediaLink"] = f"{request.base}/download{path}?generation={resource['generation']}&alt=media"
        return resource

    def _upload(self, request: Request, bucket: str) -> Response:
        self._objects.bucket(bucket)
        if "upload_id" in request.query:
            if request.method == "DELETE":
                return self._uploads.cancel(request.query)
            answer = self._uploads.resume(request.query, request.headers, request.body, request.whole)
            return Response.of(self._link(request, json.loads(answer.body))) if answer.status == 200 else answer
        written = self._uploads.begin(bucket, request.query, request.headers, request.body)
        if isinstance(written, str):
            return Response(200, b"", {"Location": request.base + written})
        return Response.of(self._link(request, written))

    def _get(self, request: Request, bucket: str, name: str) -> Response:
        with self._objects.lock:
            self._objects.existing(bucket, name, request.query, unchanged=304)
            resource = self._objects.resource(bucket, name)
            if request.query.get("alt") != "media" and not request.target.startswith("/download"):
                return Response.of(self._link(request, resource))
            data = self._objects.data(bucket, name)
        return _media(data, resource, request.headers.get("Range", ""))

    def _patch(self, request: Request, bucket: str, name: str) -> Response:
        return Response.of(self._link(request, self._objects.patch(bucket, name, request.json(), request.query)))

    def _delete(self, request: Request, bucket: str, name: str) -> Response:
        self._objects.delete(bucket, name, request.query)
        return Response(204)

    def _duplicate(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> Resource:
        with self._objects.lock:
            wanted = {"generation": request.query["sourceGeneration"]} if "sourceGeneration" in request.query else {}
            check(self._objects.existing(bucket, name, wanted), request.query, prefix="ifSource")
            metadata = request.json() or self._objects.resource(bucket, name)
            data = self._objects.data(bucket, name)
            return self._link(request, self._objects.put(to_bucket, to_name, data, metadata, request.query))

    def _copy(self, request: Request, *places: str) -> Response:
        return Response.of(self._duplicate(request, *places))

    def _rewrite(self, request: Request, *places: str) -> Response:
        written = self._duplicate(request, *places)
        sizes = {"totalBytesRewritten": written["size"], "objectSize": written["size"]}
        return Response.of({"kind": "storage#rewriteResponse", "done": True, "resource": written, **sizes})

    def _compose(self, request: Request, bucket: str, name: str) -> Response:
        asked = request.json()
        with self._objects.lock:
            parts = []
            for source in asked["sourceObjects"]:
                wanted = {key: str(source[key]) for key in ("generation",) if key in source}
                wanted |= {key: str(value) for key, value in source.get("objectPreconditions", {}).items()}
                self._objects.existing(bucket, source["name"], wanted)
                parts.append(self._objects.data(bucket, source["name"]))
            written = self._objects.put(bucket, name, b"".join(parts), asked.get("destination", {}), request.query)
        return Response.of(self._link(request, written))

    def _batch(self, request: Request) -> Response:
        head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
        calls = BytesParser().parsebytes(head + request.body).get_payload()
        if not isinstance(calls, list) or len(calls) > _BATCH_MOST:
            raise RefusedError(400, "invalid", f"A batch holds one to {_BATCH_MOST} calls.")
        boundary = "batch_of_answers"
        body = b""
        for call in calls:
            line, _, rest = call.get_payload(decode=True).lstrip().partition(b"\n")
            method, address = line.decode().split()[:2]
            inner = BytesParser().parsebytes(rest)
            parts = urlsplit(address)
            target = f"{parts.path}?{parts.query}"
            refused = self._refusal(method, target)
            asked = Request(method, target, inner, inner.get_payload(decode=True) or b"", request.base)
            answer = refused.response() if refused else self.answer(asked)
            body += f"--{boundary}\r\nContent-Type: application/http\r\n".encode()
            body += f"Content-ID: <response-{call.get('Content-ID', '').strip('<>')}>\r\n\r\n".encode()
            body += f"HTTP/1.1 {answer.status} {reason(answer.status)}\r\n".encode()
            body += b"".join(f"{key}: {value}\r\n".encode() for key, value in answer.headers.items())
            body += b"\r\n" + answer.body + b"\r\n"
        return Response(
            200, body + f"--{boundary}--".encode(), {"Content-Type": f"multipart/mixed; boundary={boundary}"}
        )


def reason(status: int) -> str:
    """Return the reason phrase of a status. Some that Google uses are in no standard."""
    return {308: "Resume Incomplete", 499: "Client Closed Request"}.get(status) or http.HTTPStatus(status).phrase


def _media(data: bytes, resource: Resource, wanted: str) -> Response:
    """Return a download of the requested `Range`. The hashes are those of the whole object."""
    headers = {
        "Content-Type": resource.get("contentType", "application/octet-stream"),
        "ETag": resource["etag"],
        "Accept-Ranges": "bytes",
        "X-Goog-Generation": resource["generation"],
        "X-Goog-Metageneration": resource["metageneration"],
        "X-Goog-Hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
        "X-Goog-Stored-Content-Length": str(len(data)),
        "X-Goog-Stored-Content-Encoding": resource.get("contentEncoding", "identity"),
    }
    if "contentEncoding" in resource:
        headers["Content-Encoding"] = resource["contentEncoding"]
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if not match or not (match[1] or match[2]):
        return Response(200, data, headers)
    if match[1]:
        start, end = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
    else:
        start, end = max(len(data) - int(match[2]), 0), len(data)
    if start >= len(data):
        beyond = {"Content-Range": f"bytes */{len(data)}"}
        raise RefusedError(416, "requestedRangeNotSatisfiable", "Request range not satisfiable", beyond)
    return Response(206, data[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

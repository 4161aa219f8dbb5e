"""Faults of the strict bucket, requested by tests. Each is applied to the next matching request, then removed."""

import re
import threading
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import unquote

REFUSALS = ("429", "503", "401", "403", "retained", "unpaid", "abroad")  # instead of an answer
UPLOAD_FAULTS = ("cut-upload",)  # for requests with a body
ANSWER_FAULTS = ("cut", "slow", "hold")  # for answers with a body
DOWNLOAD_FAULTS = ("flip",)  # for the bytes of objects: a flip in JSON would test a parser, not a checksum
KINDS = REFUSALS + UPLOAD_FAULTS + ANSWER_FAULTS + DOWNLOAD_FAULTS
# Requests about objects. google-cloud-storage requests buckets in a thread of its own, at times that no test expects.
_OBJECTS = r"/b/[^/?]+/o(/|\?|$)|^/batch/"


@dataclass
class _Fault:
    kind: str
    times: int
    method: str | None
    matching: re.Pattern[str]

    def fits(self, kinds: Collection[str], method: str, target: str) -> bool:
        if self.kind not in kinds or self.method not in (None, method):
            return False
        # Both spellings, so that a test can write "models/latest.json" for an address with %2F.
        return any(map(self.matching.search, (target, unquote(target))))


class Faults:
    """The faults that are left. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self.cleared = threading.Event()

    def inject(self, kind: str, times: int = 1, method: str | None = None, matching: str | None = None) -> None:
        """Apply a fault to each of the next `times` requests that match.

        Args:
            kind: a status ("429", "503", "401", "403": nothing is done), "retained" (403, of a retention policy),
                "unpaid" (400, of a bucket with requester pays), "abroad" (403, of an organization's policy), "cut" (the
                request is processed, but the connection closes in the middle of the answer's body), "slow" (the
                answer's body comes in pieces), "hold" (its second half comes when the faults are cleared), "flip" (one
                bit of a download is changed) or "cut-upload" (the connection closes after half of the request's body;
                of a resumable upload that half is kept, as Google does).
            times: number of requests.
            method: HTTP method; None: any.
            matching: a regular expression over path and query. None: all requests about objects.

        Raises:
            ValueError: the kind is unknown.
        """
        if kind not in KINDS:
            raise ValueError(f"no fault of kind {kind!r}: there are {', '.join(KINDS)}")
        with self._lock:
            self.cleared.clear()
            self._faults.append(_Fault(kind, times, method, re.compile(matching or _OBJECTS)))

    def take(self, kinds: Collection[str], method: str, target: str) -> str | None:
        """Return the kind of the oldest fault of `kinds` that matches this request, or None. The fault is used up."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.fits(kinds, method, target):
                    fault.times -= 1
                    return fault.kind
        return None

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults.clear()
            self.cleared.set()

    def left(self) -> int:
        """Return how many faults have not been applied yet."""
        with self._lock:
            return sum(fault.times for fault in self._faults)

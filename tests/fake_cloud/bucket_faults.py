"""Faults that a test asks the strict bucket for: each is met by the next request that fits it, and is then gone."""

import re
import threading
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import unquote

REFUSALS = ("429", "503", "401", "403", "retained", "unpaid", "abroad")  # instead of an answer
UPLOAD_FAULTS = ("cut-upload",)  # for requests with a body
ANSWER_FAULTS = ("cut", "slow", "hold")  # for answers with a body
DOWNLOAD_FAULTS = ("flip",)  # for the bytes of objects: flipped JSON would test a parser, not a checksum
KINDS = REFUSALS + UPLOAD_FAULTS + ANSWER_FAULTS + DOWNLOAD_FAULTS
# About objects: google-cloud-storage asks for buckets from a thread of its own, when no test expects it.
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
        # Both spellings, so that a test may say "models/latest.json" where the address has %2F.
        return any(map(self.matching.search, (target, unquote(target))))


class Faults:
    """What is still to go wrong. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self.cleared = threading.Event()

    def inject(self, kind: str, times: int = 1, method: str | None = None, matching: str | None = None) -> None:
        """Let the next `times` requests that fit meet a fault.

        `kind` is a status ("429", "503", "401", "403": nothing is done), "retained" (403, of a retention policy),
        "unpaid" (400, of a bucket whose requesters pay), "abroad" (403, of an organization's policy), "cut" (all is
        done, but the connection closes in the middle of the answer's body), "slow" (the answer's body comes in pieces),
        "hold" (its second half comes when the faults are cleared), "flip" (one byte of a download is changed) or
        "cut-upload" (the connection closes after half of the request's body; of a resumable upload that half is kept,
        as Google does). `matching` is a regular expression over path and query; without one every request about objects
        fits. Raises ValueError for an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"no fault of kind {kind!r}: there are {', '.join(KINDS)}")
        with self._lock:
            self.cleared.clear()
            self._faults.append(_Fault(kind, times, method, re.compile(matching or _OBJECTS)))

    def take(self, kinds: Collection[str], method: str, target: str) -> str | None:
        """The kind of the oldest fault of `kinds` that this request meets; it counts as met."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.fits(kinds, method, target):
                    fault.times -= 1
                    return fault.kind
        return None

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._faults.clear()
            self.cleared.set()

    def left(self) -> int:
        """How many faults were not met yet."""
        with self._lock:
            return sum(fault.times for fault in self._faults)

"""Google's error answers."""

from typing import Any


class Refusal(Exception):  # noqa: N818  (an answer, not a failure)
    """A request that Google would refuse: HTTP status, message, and the short reason of Google's JSON form."""

    def __init__(self, status: int, message: str, reason: str = "invalid") -> None:
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason

    def form(self) -> dict[str, Any]:
        error = {"message": self.message, "domain": "global", "reason": self.reason}
        return {"error": {"code": self.status, "message": self.message, "errors": [error]}}


def forbidden(message: str) -> Refusal:
    return Refusal(403, message, "forbidden")


def not_implemented(what: str) -> Refusal:
    return Refusal(501, f"the fake cloud does not know {what}", "notImplemented")

"""`Problem`: an error answer of the API. Raised by routes and by what stands behind them."""

from __future__ import annotations

from typing import Any

TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    408: "Request timeout",
    409: "Conflict",
    413: "Content too large",
    416: "Range not satisfiable",
    422: "Invalid request",
    429: "Too many requests",
    500: "Internal error",
    503: "Service unavailable",
}


class Problem(Exception):
    """An error answer. `extra` are further members of the document (index, position, limit, given, errors)."""

    def __init__(
        self, status: int, code: str, detail: str, *, retry_after: float | None = None, **extra: Any
    ):
        super().__init__(detail)
        self.status, self.code, self.detail, self.retry_after = status, code, detail, retry_after
        self.extra = {k: v for k, v in extra.items() if v is not None}

    def document(self) -> dict[str, Any]:
        return {
            "type": f"https://bioseq.invalid/problems/{self.code}",
            "title": TITLES.get(self.status, "Error"),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **self.extra,
        }


def too_many_items(given: int, limit: int, what: str = "sequences") -> Problem:
    return Problem(
        413,
        "request.too_many_items",
        f"{given} {what} were given; the limit is {limit}. Send them in several requests.",
        given=given,
        limit=limit,
    )


def too_large(limit: int, given: int | None = None) -> Problem:
    size = f"{given} bytes were announced" if given else "the body is longer"
    return Problem(
        413, "request.too_large", f"{size}; the limit is {limit} bytes. Send several requests.",
        given=given, limit=limit,
    )  # fmt: skip

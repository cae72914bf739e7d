"""Errors on the wire: RFC 9457 problem documents with a stable dotted `code`, or OpenAI's shape on its route.

Nothing of the request's content is ever echoed: a problem names the field, the index and the position.
"""

from __future__ import annotations

import math
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from bioseq.errors import (
    ArtefactError,
    BioseqError,
    InputError,
    NotFoundError,
    SequenceError,
    ServiceError,
    SpecError,
)
from serving.problems import TITLES, Problem, too_many_items

OPENAI_ROUTE = "/v1/embeddings"
CODES = {
    400: "request.bad",
    401: "auth.unauthenticated",
    403: "auth.forbidden",
    404: "not_found",
    405: "request.method_not_allowed",
    406: "response.not_acceptable",
    408: "request.timeout",
    409: "conflict",
    413: "request.too_large",
    422: "request.invalid",
    429: "overloaded",
    500: "internal",
    503: "engine.unavailable",
}


def from_error(error: BioseqError) -> Problem:
    """The problem that an error of the core stands for."""
    text, code = str(error), error.code
    if isinstance(error, SequenceError):
        if code == "sequence.empty":
            code = "request.invalid"
        return Problem(422, code, text, index=error.index, position=error.position)
    if isinstance(error, NotFoundError):
        return Problem(404, code, text)
    if isinstance(error, ServiceError):
        return Problem(error.status or 503, code, text, retry_after=error.retry_after)
    if isinstance(error, SpecError):
        return Problem(422, "request.invalid", text, field=error.field)
    if isinstance(error, InputError):
        return Problem(422, code, text)
    if isinstance(error, ArtefactError):
        return Problem(422, code, text)
    return Problem(500, "internal", text)


def from_validation(error: RequestValidationError) -> Problem:
    """pydantic's findings without the values that it saw."""
    found = error.errors()
    for item in found:
        if item["type"] == "json_invalid":
            where = item["loc"][-1] if isinstance(item["loc"][-1], int) else None
            return Problem(
                400, "request.not_json", "the body is not JSON, or its content type is not application/json.",
                position=where,
            )  # fmt: skip
        context = item.get("ctx", {})
        if item["type"] == "too_long" and item["loc"][:1] == ("body",) and "max_length" in context:
            return too_many_items(
                context.get("actual_length") or 0, context["max_length"], str(item["loc"][-1])
            )
    if any(
        item["loc"] == ("body",) and item["type"] in ("missing", "model_attributes_type") for item in found
    ):
        detail = "the body must be a JSON object."
        return Problem(422, "request.invalid", detail, errors=[{"field": "body", "message": detail}])
    errors = []
    for item in found[:20]:
        loc = item["loc"]
        if item["type"] == "extra_forbidden":  # the field's name is the user's own text: not repeated
            loc = (*loc[:-1], "(unknown)")
        place = ".".join(str(part) for part in loc if part != "body")
        errors.append({"field": place[:200], "message": item["msg"][:300]})
    first = errors[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return Problem(422, "request.invalid", f"{first['field']}: {first['message']}{more}", errors=errors)


def from_http(error: HTTPException) -> Problem:
    status = error.status_code
    return Problem(status, CODES.get(status, "request.bad"), TITLES.get(status, str(error.detail)))


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def openai_document(problem: Problem) -> dict[str, Any]:
    """The error shape of OpenAI's API."""
    field = problem.extra.get("field") or (problem.extra.get("errors") or [{}])[0].get("field")
    if field is None and problem.extra.get("index") is not None:
        field = f"input[{problem.extra['index']}]"
    return {
        "error": {
            "message": problem.detail,
            "type": _OPENAI_TYPES.get(problem.status, "invalid_request_error"),
            "param": field,
            "code": problem.code,
        }
    }


def respond(problem: Problem, path: str) -> Response:
    """The response for a request to `path`."""
    openai = path.rstrip("/") == OPENAI_ROUTE
    headers = {}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        orjson.dumps(openai_document(problem) if openai else problem.document()),
        status_code=problem.status,
        headers=headers,
        media_type="application/json" if openai else "application/problem+json",
    )


def _told(request: Request, problem: Problem) -> Response:
    request.scope["bioseq.code"] = problem.code  # for the access log
    return respond(problem, request.url.path)


async def on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _told(request, error)


async def on_bioseq_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BioseqError)
    return _told(request, from_error(error))


async def on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _told(request, from_validation(error))


async def on_unforeseen(request: Request, error: Exception) -> Response:
    return _told(request, unforeseen())


def unforeseen() -> Problem:
    return Problem(500, "internal", "an internal error. Tell the operator the request id.")


async def on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _told(request, from_http(error))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response

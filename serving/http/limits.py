"""Around the application, plain ASGI: request ids, body limits, time limits, the access log, HTTP metrics.

The caller is known before a byte of the body is read. The body is read here, before any route: so a body that is too
large (413), too slow (408) or broken off never reaches one. Routes that stream their body in (`STREAMED`) read it
themselves, within their own limits.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bioseq.errors import BioseqError
from serving.http.error_responses import from_error, respond, unforeseen
from serving.problems import Problem, too_large
from serving.settings import Settings
from serving.telemetry.logs import line, trouble
from serving.telemetry.metrics import IngressMetrics

STREAMED = ("/v1/files", "/v1/models")
UNLIMITED = ("/v1/files", "/v1/jobs", "/v1/models")  # uploads, downloads and followed logs take their time
QUIET = ("/health/live", "/health/ready", "/metrics")
PAGE = ("/", "/page/app.js", "/page/icon.svg", "/page/licences.txt", "/page/style.css")
OPEN = (*QUIET, *PAGE, "/docs", "/openapi.json")  # without a key; /metrics asks itself
FREE = ("/v1/limits",)  # not counted as a request: clients ask it to pack by it
SMALL = {"/v1/jobs": 4 << 20}  # bytes of a body, where fewer will do than `max_body_bytes`
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gone(Exception):
    """The client went away."""


class RequestLimits:
    """Wraps the application. `draining` turns new requests away while those in flight finish."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: IngressMetrics):
        self.app, self.settings, self.metrics = app, settings, metrics
        self.draining = False
        self.in_flight = 0
        self.held_bytes = 0  # of all requests in flight: their bodies, and pieces of their answers

    @property
    def service(self) -> Any:
        return self.app.state.service  # type: ignore[attr-defined]

    def lifespan(self) -> Any:
        """The application's start and end, for a server that does not run ASGI lifespans."""
        return self.app.router.lifespan_context(self.app)  # type: ignore[attr-defined]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its response."""

    def __init__(self, limits: RequestLimits, scope: Scope, receive: Receive, send: Send):
        self.limits, self.scope, self.receive, self.client_send = limits, scope, receive, send
        self.path: str = scope["path"]
        headers = dict(scope["headers"])
        self.length = headers.get(b"content-length", b"")
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope["bioseq.request_id"] = self.request_id
        scope["bioseq.limits"] = limits
        scope["bioseq.hold"] = self._hold
        self.status = 0
        self.code: str | None = None
        self.sent = 0
        self.held = 0
        self.received = 0

    async def run(self) -> None:
        limits, began = self.limits, time.perf_counter()
        limits.in_flight += 1
        limits.metrics.in_flight.inc()
        try:
            await self._answer()
        except Gone:
            self.status = self.status or 499
        except asyncio.CancelledError:
            self.status = self.status or 499
            raise
        finally:
            limits.held_bytes -= self.held
            limits.in_flight -= 1
            limits.metrics.in_flight.dec()
            self._account(time.perf_counter() - began)

    async def _answer(self) -> None:
        settings, problem = self.limits.settings, None
        try:
            if self.limits.draining and not self.path.startswith("/health"):
                raise Problem(503, "service.draining", "the service is stopping. Ask another.", retry_after=5)
            if self.path not in OPEN:
                caller = await self.limits.service.authorizer.identify(self.scope)
                self.scope["bioseq.caller"], self.scope["bioseq.key"] = caller, caller.id
                if self.path not in FREE:
                    await self.limits.service.authorizer.spend(caller, requests=1)
            streamed = self.path.startswith(STREAMED) and self.scope["method"] not in (
                "GET",
                "HEAD",
                "DELETE",
            )
            receive = self.receive if streamed else await self._read()
            limit = None if self.path.startswith(UNLIMITED) else settings.request_s
            async with asyncio.timeout(limit):
                await self._inner(receive, watch=not streamed)
        except Problem as error:
            problem = error
        except BioseqError as error:
            problem = from_error(error)
        except TimeoutError:
            problem = Problem(
                408, "request.timeout", f"the request took longer than {settings.request_s:g} s.",
                limit=settings.request_s,
            )  # fmt: skip
        except (Gone, asyncio.CancelledError):
            raise
        except Exception as error:
            trouble("request failed", error, request_id=self.request_id)
            problem = unforeseen()
        if problem is not None:
            if self.status:
                # The response has begun: ending it short of its last chunk tells the client that it broke.
                self.code = problem.code
                raise Gone
            await self._refuse(problem)

    async def _inner(self, receive: Receive, *, watch: bool) -> None:
        """The application, cancelled when the client goes away."""
        if not watch or self.limits.settings.behind_serve:  # Serve itself cancels us when the client goes
            await self.limits.app(self.scope, receive, self._send)
            return
        work = asyncio.ensure_future(self.limits.app(self.scope, receive, self._send))
        watcher = asyncio.ensure_future(self._until_gone())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Gone
            await work
        finally:
            for task in (work, watcher):
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    async def _until_gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def _read(self) -> Receive:
        """The whole body, then silence."""
        settings = self.limits.settings
        limit = min(SMALL.get(self.path, settings.max_body_bytes), settings.max_body_bytes)
        if self.length:
            if not self.length.isdigit():
                raise Problem(400, "request.bad", "Content-Length is not a number.")
            if int(self.length) > limit:
                raise too_large(limit, int(self.length))
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(settings.body_s):
                more = True
                while more:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        raise too_large(limit)
                    self._hold(len(part))
                    parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Problem(
                408, "request.timeout", f"the body did not arrive within {settings.body_s:g} s.",
                limit=settings.body_s,
            ) from None  # fmt: skip
        self.received = size
        messages: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        return receive

    def _hold(self, size: int) -> None:
        """Count bytes of a body, or of an answer's pieces, against what all requests may hold together. Raises
        `Problem` 429."""
        limit = self.limits.settings.max_held_bytes
        self.held += size
        self.limits.held_bytes += size
        if self.limits.held_bytes > limit:
            raise Problem(
                429, "overloaded", "too many large requests are in flight. Try again in a moment.",
                limit=limit, retry_after=2,
            )  # fmt: skip

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message["headers"] = list(message.get("headers", []))
            if not self.limits.settings.behind_serve:  # Serve's proxy adds it
                headers.append((b"x-request-id", self.request_id.encode()))
            headers.append((b"x-content-type-options", b"nosniff"))
            headers.append((b"cache-control", b"no-store"))
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        await self.client_send(message)

    async def _refuse(self, problem: Problem) -> None:
        self.code = problem.code
        response = respond(problem, self.path)
        if problem.status in (401, 403, 408, 413, 429):
            response.headers["Connection"] = "close"  # the rest of the body will not be read
        await response(self.scope, self.receive, self._send)

    def _account(self, seconds: float) -> None:
        route = getattr(self.scope.get("route"), "path", None) or "other"
        metrics = self.limits.metrics
        metrics.requests.labels(route, str(self.status)).inc()
        metrics.latency.labels(route).observe(seconds)
        code = self.code or self.scope.get("bioseq.code")
        if code:
            metrics.refused.labels(code).inc()
        if self.path in QUIET and self.status == 200:
            return
        asked: dict[str, Any] = self.scope.get("bioseq.asked", {})
        line(
            "access",
            request_id=self.request_id,
            method=self.scope["method"],
            route=route,
            status=self.status,
            code=code,
            ms=round(seconds * 1000, 2),
            bytes_in=self.received,
            bytes_out=self.sent,
            key=self.scope.get("bioseq.key"),
            **asked,
        )

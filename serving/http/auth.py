"""Who asks: API keys, scopes, limits.

A key is needed as soon as one was ever made (also if it is revoked by now), and always by a caller whose socket is not
on loopback, unless the service was started with --insecure. Otherwise any Authorization header is ignored and the
caller is `anonymous`, with every scope. A looked-up key is remembered for two seconds: that is how long a revoked one
may still work. While the database is away, keys that were seen in the last minute go on working.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import Scope

from serving.database.base import DatabaseUnavailable
from serving.database.keys import ANONYMOUS, KeyInfo, Keys
from serving.problems import Problem
from serving.settings import Settings

REMEMBER_S = 2.0
STALE_S = 60.0  # how long a key is trusted when the database does not answer
_bearer = HTTPBearer(auto_error=False, description="An API key: `bioseq keys create NAME`.")


class Authorizer:
    """Checks keys and counts usage. Keys with limits are counted in the database at once, so that limits hold
    over several ingress replicas; the usage of others is written every few seconds."""

    def __init__(self, keys: Keys, settings: Settings, *, clock: Callable[[], float] = time.time):
        self.keys, self.settings, self._clock = keys, settings, clock
        self._known: dict[str, tuple[float, KeyInfo | None]] = {}
        self._asked: tuple[float, bool] = (0.0, True)
        self._unwritten: dict[tuple[str, int], tuple[int, int]] = {}

    async def required(self, scope: Scope) -> bool:
        """Whether this request needs a key."""
        if not self.settings.insecure and not (self.settings.on_loopback and from_loopback(scope)):
            return True
        until, asked = self._asked
        if time.monotonic() >= until:
            try:
                asked = await asyncio.to_thread(self.keys.any)
            except DatabaseUnavailable:
                if not (until and asked):
                    raise
                return True  # a key that was made stays in the table
            self._asked = (time.monotonic() + REMEMBER_S, asked)
        return asked

    async def identify(self, scope: Scope) -> KeyInfo:
        """The caller's key. Raises `Problem` 401 and 403."""
        headers = Headers(scope=scope)
        if not await self.required(scope):
            if not self.settings.insecure and not own_name(headers.get("host", "")):
                raise Problem(
                    403, "auth.forbidden",
                    "without API keys the service answers under this machine's own name only. "
                    "Ask http://127.0.0.1, or make a key: bioseq keys create NAME.",
                )  # fmt: skip
            return ANONYMOUS
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not credentials:
            raise Problem(401, "auth.unauthenticated", "no API key. Send it as: Authorization: Bearer KEY.")
        until, key = self._known.get(credentials, (0.0, None))
        if time.monotonic() >= until:
            try:
                key = await asyncio.to_thread(self.keys.check, credentials)
            except DatabaseUnavailable:
                if key is None or time.monotonic() > until + STALE_S:
                    raise
                return key
            if len(self._known) > 10_000:
                self._known.clear()
            self._known[credentials] = (time.monotonic() + REMEMBER_S, key)
        if key is None:
            raise Problem(401, "auth.unauthenticated", "the API key is unknown, expired or revoked.")
        return key

    async def spend(self, key: KeyInfo, *, requests: int = 0, tokens: int = 0) -> int:
        """Count what a request takes; the minute that it was counted in. Raises `Problem` 429 quota.exceeded with the
        seconds to the next minute."""
        if key is ANONYMOUS:
            return 0
        now = self._clock()
        minute = int(now // 60)
        asked = ((requests, key.requests_per_minute), (tokens, key.tokens_per_minute))
        if not any(count and limit is not None for count, limit in asked):
            before = self._unwritten.get((key.id, minute), (0, 0))
            self._unwritten[key.id, minute] = (before[0] + requests, before[1] + tokens)
            return minute
        if key.tokens_per_minute is not None and tokens > key.tokens_per_minute:
            raise Problem(
                413, "request.too_large",
                f"the request costs {tokens} tokens; this key may use {key.tokens_per_minute} a minute. "
                "Send smaller requests.",
                given=tokens, limit=key.tokens_per_minute,
            )  # fmt: skip
        passed = await asyncio.to_thread(self.keys.spend, key, minute, tokens, requests)
        if passed is not None:
            limit = key.requests_per_minute if passed == "requests" else key.tokens_per_minute
            raise Problem(
                429, "quota.exceeded",
                f"this key may use {limit} {passed} a minute. Try again in the next minute.",
                limit=limit, retry_after=60 - now % 60,
            )  # fmt: skip
        return minute

    async def refund(self, key: KeyInfo, minute: int, tokens: int) -> None:
        """Give the tokens of a request back that was refused after it was counted."""
        if key is not ANONYMOUS:
            await asyncio.to_thread(self.keys.add_usage, {(key.id, minute): (0, -tokens)})

    def flush(self) -> None:
        """Write what was counted in memory. Blocks on the database."""
        used, self._unwritten = self._unwritten, {}
        try:
            self.keys.add_usage(used)
        except Exception:
            for at, (requests, tokens) in used.items():
                r, t = self._unwritten.get(at, (0, 0))
                self._unwritten[at] = (r + requests, t + tokens)
            raise


def own_name(host: str) -> bool:
    """Whether a Host header may name this machine: an address of loopback, or a name without a dot. A web page whose
    DNS name is pointed at 127.0.0.1 (rebinding) sends its own, dotted name."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if "." not in name or name.endswith(".localhost"):
        return True
    return _loopback(name)


def from_loopback(scope: Scope) -> bool:
    """Whether the other end of the request's socket is on this machine."""
    client = scope.get("client")
    return client is not None and _loopback(client[0])


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


async def current_key(
    request: Request,
    _: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
) -> KeyInfo:
    """FastAPI dependency: the caller's key (id, name, scopes), which `RequestLimits` found before it read the body;
    /metrics asks here. Raises `Problem` 401."""
    scope = request.scope
    if "bioseq.caller" not in scope:
        scope["bioseq.caller"] = await request.app.state.service.authorizer.identify(scope)
        scope["bioseq.key"] = scope["bioseq.caller"].id
    return scope["bioseq.caller"]


def require(scope: str) -> Any:
    """FastAPI dependency: the caller's key, if it has `scope`. Raises `Problem` 401 and 403."""

    async def dependency(key: Annotated[KeyInfo, Depends(current_key)]) -> KeyInfo:
        if not key.allows(scope):
            raise Problem(403, "auth.forbidden", f"this needs a key with the scope {scope!r}.", scope=scope)
        return key

    return Depends(dependency)

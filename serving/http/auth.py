"""Who asks: API keys, scopes, limits.

Keys are asked for as soon as one was ever made (also if it is revoked by now), and always off loopback unless
the service was started with --insecure. Where they are off, any Authorization header is ignored and the
caller is `anonymous`, with every scope. A looked-up key is remembered for two seconds: that is how long a
revoked one may still work.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serving.database.keys import ANONYMOUS, KeyInfo, Keys
from serving.problems import Problem
from serving.settings import Settings

REMEMBER_S = 2.0
_bearer = HTTPBearer(auto_error=False, description="An API key: `bioseq keys create NAME`.")


class Authorizer:
    """Checks keys and counts usage. Keys with limits are counted in the database at once, so that limits hold
    over several ingress replicas; the usage of others is written every few seconds."""

    def __init__(self, keys: Keys, settings: Settings, *, clock: Callable[[], float] = time.time):
        self.keys, self.settings, self._clock = keys, settings, clock
        self._known: dict[str, tuple[float, KeyInfo | None]] = {}
        self._asked: tuple[float, bool] = (0.0, True)
        self._unwritten: dict[tuple[str, int], tuple[int, int]] = {}

    async def required(self) -> bool:
        """Whether keys are asked for now."""
        if not self.settings.on_loopback and not self.settings.insecure:
            return True
        until, asked = self._asked
        if time.monotonic() >= until:
            asked = await asyncio.to_thread(self.keys.any)
            self._asked = (time.monotonic() + REMEMBER_S, asked)
        return asked

    async def identify(self, credentials: str | None) -> KeyInfo:
        """Raises `Problem` 401."""
        if not await self.required():
            return ANONYMOUS
        if not credentials:
            raise Problem(401, "auth.unauthenticated", "no API key. Send it as: Authorization: Bearer KEY.")
        until, key = self._known.get(credentials, (0.0, None))
        if time.monotonic() >= until:
            key = await asyncio.to_thread(self.keys.check, credentials)
            if len(self._known) > 10_000:
                self._known.clear()
            self._known[credentials] = (time.monotonic() + REMEMBER_S, key)
        if key is None:
            raise Problem(401, "auth.unauthenticated", "the API key is unknown, expired or revoked.")
        return key

    async def spend(self, key: KeyInfo, tokens: int) -> None:
        """Count one request. Raises `Problem` 429 quota.exceeded with the seconds to the next minute."""
        if key is ANONYMOUS:
            return
        now = self._clock()
        minute = int(now // 60)
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            requests, before = self._unwritten.get((key.id, minute), (0, 0))
            self._unwritten[key.id, minute] = (requests + 1, before + tokens)
            return
        if key.tokens_per_minute is not None and tokens > key.tokens_per_minute:
            raise Problem(
                413, "request.too_large",
                f"the request costs {tokens} tokens; this key may use {key.tokens_per_minute} a minute. "
                "Send smaller requests.",
                given=tokens, limit=key.tokens_per_minute,
            )  # fmt: skip
        passed = await asyncio.to_thread(self.keys.spend, key, minute, tokens)
        if passed is not None:
            limit = key.requests_per_minute if passed == "requests" else key.tokens_per_minute
            raise Problem(
                429, "quota.exceeded",
                f"this key may use {limit} {passed} a minute. Try again in the next minute.",
                limit=limit, retry_after=60 - now % 60,
            )  # fmt: skip

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
    """Whether a Host header may name this machine: an address, or a name without a dot. A web page whose DNS
    name is pointed at 127.0.0.1 (rebinding) sends its own, dotted name."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def current_key(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
) -> KeyInfo:
    """FastAPI dependency: the caller's key (id, name, scopes). Raises `Problem` 401."""
    authorizer: Authorizer = request.app.state.service.authorizer
    key = await authorizer.identify(credentials.credentials if credentials else None)
    if (
        key is ANONYMOUS
        and not authorizer.settings.insecure
        and not own_name(request.headers.get("host", ""))
    ):
        raise Problem(
            403,
            "auth.forbidden",
            "without API keys the service answers under this machine's own name only. "
            "Ask http://127.0.0.1, or make a key: bioseq keys create NAME.",
        )
    request.scope["bioseq.key"] = key.id
    return key


def require(scope: str) -> Any:
    """FastAPI dependency: the caller's key, if it has `scope`. Raises `Problem` 401 and 403."""

    async def dependency(key: Annotated[KeyInfo, Depends(current_key)]) -> KeyInfo:
        if not key.allows(scope):
            raise Problem(403, "auth.forbidden", f"this needs a key with the scope {scope!r}.", scope=scope)
        return key

    return Depends(dependency)

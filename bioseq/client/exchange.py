"""One exchange with a service: what is sent, when it is tried again, what drives it.

Calls are coroutines over a `Connection`, which is the client itself.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from bioseq.client.answers import error_of, json_of
from bioseq.client.drivers import Awaiting, Blocking
from bioseq.errors import MissingExtraError, SequenceError, ServiceError, SpecError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
RETRIED = (429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Call:
    """One request: a JSON `body` or a `file` as it is, and what of the connection's settings it changes."""

    method: str
    path: str
    body: Any = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    timeout: float | None = None


@dataclass
class Connection:
    """Where the service is. `errors` holds what the last call with `on_error="report"` left out."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    model: str = "default"
    timeout: float = 600.0
    retries: int = 8
    transport: Any = None
    errors: list[SequenceError] = field(default_factory=list, init=False, repr=False)
    driver: Awaiting | Blocking = field(init=False, repr=False)
    _limits: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    _driver: ClassVar[type[Awaiting | Blocking]]

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise SpecError(f"{self.url!r} is not an http or https URL.", field="url")
        try:
            self.driver = self._driver(base_url=self.url, timeout=self.timeout, transport=self.transport)
        except ModuleNotFoundError:
            raise MissingExtraError("httpx", "client") from None


@contextlib.asynccontextmanager
async def _opened(at: Connection, call: Call) -> AsyncIterator[httpx.Response]:
    """The response to one request. Raises the problem that it is, and httpx's errors."""
    key = {"Authorization": f"Bearer {at.api_key}"} if at.api_key else {}
    request = at.driver.http.build_request(
        call.method, call.path, json=call.body, params=call.query or None,
        content=at.driver.blocks(call.file) if call.file else None, headers={**key, **call.headers},
        timeout=call.timeout or at.timeout,
    )  # fmt: skip
    response = await at.driver.send(request)
    try:
        if not response.is_success:
            await at.driver.content(response)
            raise error_of(response)
        yield response
    finally:
        await at.driver.close(response)


def _pause(at: Connection, failed: int, before: int | None, error: ServiceError) -> float | None:
    """Seconds before the next try, or None to give up."""
    if failed >= at.retries or error.code in ("quota.jobs", "quota.campaigns"):
        return None
    if error.status is not None and error.status not in RETRIED:
        return None
    if error.status == before == 500:
        return None  # an internal error that repeats is not an accident
    grown = min(30.0, 0.25 * 2**failed) * (0.5 + random.random() / 2)
    return max(grown, error.retry_after or 0.0)


async def exchange(
    at: Connection, make: Callable[[], Call], read: Callable[[httpx.Response], AsyncIterator[T]]
) -> AsyncGenerator[T, None]:
    """What `read` makes of the response to `make()`: the one loop that tries again. Every request here may be sent
    twice without harm. What `read` gives counts as progress: the tries begin anew after it."""
    import httpx

    failed, before = 0, None
    while True:
        try:
            async with _opened(at, make()) as response:
                async for part in read(response):
                    failed, before = 0, None
                    yield part
            return
        except httpx.TransportError as fault:
            error = ServiceError(
                f"{at.url} cannot be reached or broke off ({type(fault).__name__}).",
                code="service.unreachable",
                hint="Check the URL and that `bioseq serve` runs there.",
            )
        except ServiceError as fault:
            error = fault
        pause = _pause(at, failed, before, error)
        if pause is None:
            raise error
        failed, before = failed + 1, error.status
        await at.driver.sleep(pause)


async def ask(at: Connection, call: Call, decode: Callable[[bytes], T] = json_of) -> T:
    """The decoded answer to one call."""

    async def read(response: httpx.Response) -> AsyncIterator[T]:
        yield decode(await at.driver.content(response))

    (answer,) = [part async for part in exchange(at, lambda: call, read)]
    return answer

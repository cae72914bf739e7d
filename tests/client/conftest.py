"""Both clients over a transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from client_service import URL

import bioseq
from bioseq.client.sync import AsyncClient


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that clients asked for; none is kept."""
    asked: list[float] = []

    async def sleep(seconds: float) -> None:
        asked.append(seconds)

    monkeypatch.setattr("bioseq.client.drivers.time.sleep", asked.append)
    monkeypatch.setattr("bioseq.client.drivers.asyncio.sleep", sleep)
    return asked


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`ask(transport, "embed", seqs, pooling="max")` of either client; `retries` and the like go to the client."""

    def sync(
        transport: Any, method: str, *args: Any, client: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        with bioseq.connect(URL, transport=transport, **(client or {})) as remote:
            answer = getattr(remote, method)(*args, **options)
            return list(answer) if method == "follow" else answer

    async def asynchronous(
        transport: Any, method: str, *args: Any, client: Any = None, **options: Any
    ) -> Any:
        async with AsyncClient(URL, transport=transport, **(client or {})) as remote:
            answer = getattr(remote, method)(*args, **options)
            return [event async for event in answer] if method == "follow" else await answer

    def run(*args: Any, **options: Any) -> Any:
        return asyncio.run(asynchronous(*args, **options))

    return sync if request.param == "sync" else run

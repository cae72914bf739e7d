"""Input and output of the two clients, method by method the same: `Awaiting` waits for it, `Blocking` blocks in it.

A coroutine over `Blocking` never waits, so `run` has its result after one step.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Ask = Callable[[], Coroutine[Any, Any, T]]
PARALLEL = 4  # requests in flight
BLOCK = 1 << 20


class Awaiting:
    def __init__(self, **settings: Any):
        import httpx

        self.http = httpx.AsyncClient(**settings)

    async def send(self, request: httpx.Request) -> httpx.Response:
        """The response, its content not read yet."""
        return await self.http.send(request, stream=True)

    async def content(self, response: httpx.Response) -> bytes:
        return await response.aread()

    def pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The content as it comes, as it was sent."""
        return response.aiter_raw()

    async def close(self, response: httpx.Response) -> None:
        await response.aclose()

    async def close_all(self) -> None:
        await self.http.aclose()

    async def blocks(self, path: Path) -> AsyncIterator[bytes]:
        """A file's content, in the form that httpx sends."""
        with open(path, "rb") as handle:
            while block := await self.work(handle.read, BLOCK):
                yield block

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function that takes a while."""
        return await asyncio.to_thread(function, *args)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def several(self, asks: Iterable[Ask[T]]) -> AsyncGenerator[T, None]:
        """Results in order, `PARALLEL` in flight; `asks` is read as they end."""
        running: deque[asyncio.Task[T]] = deque()
        try:
            for ask in asks:
                running.append(asyncio.create_task(ask()))
                if len(running) == PARALLEL:
                    yield await running[0]
                    running.popleft()
            while running:
                yield await running[0]
                running.popleft()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


class Blocking:
    def __init__(self, **settings: Any):
        import httpx

        self.http = httpx.Client(**settings)

    async def send(self, request: httpx.Request) -> httpx.Response:
        return self.http.send(request, stream=True)

    async def content(self, response: httpx.Response) -> bytes:
        return response.read()

    async def pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for piece in response.iter_raw():
            yield piece

    async def close(self, response: httpx.Response) -> None:
        response.close()

    async def close_all(self) -> None:
        self.http.close()

    def blocks(self, path: Path) -> Iterator[bytes]:
        with open(path, "rb") as handle:
            while block := handle.read(BLOCK):
                yield block

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def several(self, asks: Iterable[Ask[T]]) -> AsyncGenerator[T, None]:
        running: deque[Future[T]] = deque()
        pool = ThreadPoolExecutor(PARALLEL)
        try:
            for ask in asks:
                running.append(pool.submit(run, ask))
                if len(running) > PARALLEL:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def run(ask: Ask[T]) -> T:
    """The result of a coroutine over `Blocking`."""
    try:
        ask().send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a call of the blocking client waited.")

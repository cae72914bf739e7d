"""What the batcher is made of: its errors, the protocols of queries and runners, tickets and queue items."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bioseq.errors import ServiceError


class Overloaded(ServiceError):
    """The queue is full, or the wait would pass the limit. `retry_after` says when to come again."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(
            message,
            status=429,
            code="overloaded",
            retry_after=retry_after,
            hint=f"Try again in {retry_after:.0f} s.",
        )


class EngineDead(ServiceError):
    CODE = "engine.unavailable"

    def __init__(self, message: str = "the engine is not running."):
        super().__init__(message, status=503, code=self.CODE, retry_after=5, hint="Try again later.")


class Runnable(Protocol):
    """One prepared query of a sequence."""

    @property
    def tokens(self) -> int: ...


class Runner(Protocol):
    """What turns queries into results, in order: a `bioseq.inference.predictor.Predictor`."""

    budget: int

    def run(self, queries: Sequence[Any]) -> list[Any]: ...


class Observer(Protocol):
    """Told about every batch; the metrics."""

    def batch(self, runner: Any, items: int, tokens: int, budget: int, seconds: float) -> None: ...
    def waited(self, seconds: float) -> None: ...
    def refused(self) -> None: ...
    def dropped(self, items: int) -> None: ...


class Silent:
    """An observer that keeps nothing."""

    def batch(self, runner: Any, items: int, tokens: int, budget: int, seconds: float) -> None: ...
    def waited(self, seconds: float) -> None: ...
    def refused(self) -> None: ...
    def dropped(self, items: int) -> None: ...


@dataclass(eq=False)
class Ticket:
    """One call of `submit`. `first_tokens` are due on arrival, the others one after another, `spread` seconds a
    token. `queued_tokens` are not in a batch yet. `patience`: seconds that it may wait for its first batch. `caller` is
    whom it is counted to."""

    arrived: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future
    total_tokens: int
    queued_tokens: int
    first_tokens: int
    spread: float
    patience: float
    admitted: bool
    outcomes: list[Any]
    left: int
    caller: str = ""
    done_tokens: int = 0
    begun: bool = False
    cancelled: bool = False

    def due_tokens(self, now: float) -> float:
        """Tokens that are due by `now` and not done."""
        if self.spread <= 0:
            return self.total_tokens - self.done_tokens
        due = min(self.total_tokens, (now - self.arrived) / self.spread + self.first_tokens)
        return max(0.0, due - self.done_tokens)

    def settle(self) -> None:
        if not self.future.done():
            self.future.set_result(self.outcomes)

    def refuse(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(order=True, slots=True)
class Item:
    due: float
    number: int
    ticket: Ticket = field(compare=False)
    place: int = field(compare=False)
    query: Any = field(compare=False)
    tokens: int = field(compare=False)
    runner: Any = field(compare=False)


def fulfil(function: Callable[[], Any], future: concurrent.futures.Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def without_text(error: Exception) -> Exception:
    """An unforeseen error keeps its traceback but not its message, which might quote a sequence."""
    return RuntimeError(f"{type(error).__name__} in the engine").with_traceback(error.__traceback__)

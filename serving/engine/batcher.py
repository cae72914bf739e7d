"""The late-sealing token-budget batcher: one queue, and lanes that each run one batch at a time.

Concept. A batcher that seals a batch as soon as it may freezes small batches while the engine is still busy with the
last one. This one seals only when the engine asks for work: what has come by then, up to the token budget, is the batch.
Under light load a request runs at once and alone; under heavy load batches fill by themselves.

Order. Every item has a *due* time: its request's arrival plus, for later items of a large request, the time that
those before it take at half of the engine's speed. Items run by due time. So a request of ten thousand sequences is
served as if its sequences had come one after another, a short request that comes in the middle runs in the next
batch, and nothing starves: an item can only be overtaken by items that arrived before its due time, of which there
are finitely many. That holds within one caller; callers take turns by tokens (`fair`). A batch begins with the item
whose turn it is, whatever its length, and is filled with the next ones that fit.

A lane knows nothing of Ray or HTTP; a runner is anything with `budget` and `run(queries)`, and queries
are anything with `tokens`. Works of one runner share a batch whatever heads or outputs they ask for.

Lanes. On a CPU a batch runs on one thread, and as many batches at a time as there are lanes: no time is lost at barriers
inside small products, and a result's bytes do not depend on the number of threads. On a GPU there is one lane. A lane that
finds others idle takes only its share of what waits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from bioseq.errors import BioseqError
from serving.engine.fair import FairQueue, over_share, wait_tokens
from serving.engine.queueing import (
    EngineDead,
    Item,
    Observer,
    Overloaded,
    Runnable,
    Runner,
    Silent,
    Ticket,
    fulfil,
    without_text,
)  # fmt: skip
from serving.engine.rates import Rates

_SHARE = 256  # tokens: smaller batches waste more than another lane gains


class Engine:
    """See the module. `max_queue_s` bounds the time from an accepted request's arrival to its answer, `max_queued_tokens`
    what lies in the queue; None for no limit. `lookahead` items are looked at to fill a batch. `on_start` runs in each lane
    before its first batch. `stuck_s`: a batch that runs longer makes `check` fail. `floor_tokens`: a smaller batch takes as
    long, so it says nothing of the speed. `fatal` tells the errors after which this process computes nothing any more: the
    engine dies, its health check fails and others are asked. `on_death` is called once when a lane has died."""

    def __init__(
        self,
        *,
        lanes: int = 1,
        max_queue_s: float | None = 30.0,
        max_queued_tokens: int | None = 4_000_000,
        lookahead: int = 256,
        observer: Observer | None = None,
        on_start: Callable[[], None] | None = None,
        stuck_s: float = 600.0,
        floor_tokens: int = 0,
        fatal: Callable[[BaseException], bool] = lambda error: False,
        on_death: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_queue_s, self.max_queued_tokens, self.lookahead = max_queue_s, max_queued_tokens, lookahead
        self.observer: Observer = observer or Silent()
        self.lanes, self.floor_tokens = lanes, floor_tokens
        self.stuck_s, self._clock, self._on_start = stuck_s, clock, on_start
        self._fatal, self._on_death = fatal, on_death
        self._queue = FairQueue()
        self._tickets: set[Ticket] = set()
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._queued_tokens = 0
        self._running: dict[int, tuple[float, int]] = {}
        self._active = 0
        self._busy_s, self._busy_seen = 0.0, (clock(), 0.0)
        self._exclusive = False  # a lane makes calls: no other may begin a batch
        self._rates = Rates()
        self._stopping = False
        self._calls: deque[tuple[Callable[[], Any], concurrent.futures.Future]] = deque()
        self._threads: list[threading.Thread] = []

    # -- the front -----------------------------------------------------------------------------------------

    def start(self) -> Engine:
        for lane in range(self.lanes):
            thread = threading.Thread(target=self._main, args=(lane,), name=f"engine-{lane}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    async def submit(
        self, runner: Runner, queries: Sequence[Runnable], *, admitted: bool = False, caller: str = ""
    ) -> list[Any]:
        """Answers in order; an item that failed is its exception. Raises `Overloaded` and `EngineDead`. `caller` is whom
        the work is counted to. `admitted` marks a later part of a request that was accepted already: it is never
        refused. Cancelling drops what has not begun."""
        if not queries:
            return []
        loop = asyncio.get_running_loop()
        tokens = [max(1, int(w.tokens)) for w in queries]
        with self._wake:
            self._require_alive()
            now = self._clock()
            total = sum(tokens)
            rate = self._rates.seconds_per_token(runner)
            spread = 2.0 * rate / self.lanes
            first = min(total, max(tokens[0], runner.budget))
            ticket = Ticket(
                arrived=now,
                loop=loop,
                future=loop.create_future(),
                total_tokens=total,
                queued_tokens=total,
                first_tokens=first,
                spread=spread,
                patience=self._patience(first * rate + (total - first) * spread),
                admitted=admitted,
                outcomes=[None] * len(queries),
                left=len(queries),
                caller=caller,
            )
            if not admitted:
                self._admit(ticket, now)
            ahead = 0
            for place, (query, size) in enumerate(zip(queries, tokens)):
                due = now + max(0, ahead + size - first) * spread
                self._queue.push(Item(due, next(self._numbers), ticket, place, query, size, runner))
                ahead += size
            self._tickets.add(ticket)
            self._queued_tokens += total
            self._wake.notify(min(len(queries), self.lanes))
        try:
            return await ticket.future
        finally:
            if not ticket.future.done() or ticket.future.cancelled():
                self._cancel(ticket)

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Run `function` while no batch runs: what changes a model that is in use."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._wake:
            self._require_alive()
            self._calls.append((function, future))
            self._wake.notify_all()
        return future

    def status(self) -> dict[str, Any]:
        with self._wake:
            return {
                "alive": self._alive(),
                "queued_tokens": self._queued_tokens,
                "queued_requests": len(self._tickets),
                "running_tokens": sum(tokens for _, tokens in self._running.values()),
                "wait_s": round(self._wait_s(self._clock()), 4),
                "tokens_per_second": self._rates.tokens_per_second(self.lanes),
            }

    def busy_since(self) -> float:
        """The share of the lanes that ran batches, 0 to 1, since this was last asked."""
        with self._wake:
            now = self._clock()
            total = self._busy_s + sum(now - began for began, _ in self._running.values())
            (before, seen), self._busy_seen = self._busy_seen, (now, total)
            return min(1.0, max(0.0, (total - seen) / self.lanes / (now - before))) if now > before else 0.0

    def check(self) -> None:
        """Raise `EngineDead` if the worker has died or hangs in a batch."""
        with self._wake:
            self._require_alive()
            if any(self._clock() - began > self.stuck_s for began, _ in self._running.values()):
                raise EngineDead(f"the engine has been in one batch for more than {self.stuck_s:.0f} s.")

    def stop(self, *, drain_s: float = 0.0) -> None:
        """End the worker; with `drain_s`, first let it finish what is queued for so long."""
        until = time.monotonic() + drain_s
        while time.monotonic() < until and self._tickets and self._alive():
            time.sleep(0.02)
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=max(5.0, drain_s))
        self._fail_all(EngineDead("the engine was stopped."))

    # -- under the lock ------------------------------------------------------------------------------------

    def _alive(self) -> bool:
        return bool(self._threads) and all(t.is_alive() for t in self._threads) and not self._stopping

    def _require_alive(self) -> None:
        if not self._alive():
            raise EngineDead()

    def _wait_s(self, now: float, ticket: Ticket | None = None) -> float:
        """Seconds until `ticket` begins; without one, until all that is due by now is done."""
        rate = self._rates.overall()
        due = ((t.caller, t.due_tokens(now)) for t in self._tickets)
        waiting = rate * (wait_tokens(due, ticket) if ticket else sum(tokens for _, tokens in due))
        for began, tokens in self._running.values():
            # Running tokens are still counted in their tickets: take off what should be done by now.
            waiting -= min(now - began, tokens * rate)
        return max(0.0, waiting / self.lanes)

    def _patience(self, own: float) -> float:
        """Seconds that a request may wait for its first batch, if its own work takes `own`."""
        if self.max_queue_s is None:
            return math.inf
        # A tenth is kept for what the prediction gets wrong, and for the way to the caller.
        return max(0.9 * self.max_queue_s - own, self.max_queue_s / 2)

    def _admit(self, ticket: Ticket, now: float) -> None:
        limit = math.inf if self.max_queued_tokens is None else self.max_queued_tokens
        # An empty queue takes any request: one that is larger than the queue would never run otherwise.
        full = self._queued_tokens and self._queued_tokens + ticket.total_tokens > limit
        if full and over_share(self._tickets, ticket, limit):
            self.observer.refused()
            wait = max(1.0, self._wait_s(now))
            raise Overloaded(f"the queue holds {self._queued_tokens} tokens; the limit is {limit}.", wait)
        wait = self._wait_s(now, ticket)
        if wait > ticket.patience:
            self.observer.refused()
            raise Overloaded(
                f"the wait would be {wait:.1f} s; the limit for this request is {ticket.patience:.1f} s.",
                max(1.0, wait - ticket.patience / 2),
            )

    def _seal(self) -> list[Item]:
        """The next batch; called only by a lane that is free."""
        batch: list[Item] = []
        passed: list[Item] = []
        room = 0
        now = self._clock()
        share = max(_SHARE, -(-self._queued_tokens // (self.lanes - self._active)))
        while self._queue and len(passed) < self.lookahead:
            item = self._queue.pop()
            ticket = item.ticket
            if ticket.cancelled:
                continue
            if self._too_late(ticket, now):
                self._shed(ticket)
                continue
            if not batch:
                room = min(item.runner.budget, share)
            elif item.runner is not batch[0].runner or item.tokens > room:
                passed.append(item)
                continue
            batch.append(item)
            room -= item.tokens
            ticket.queued_tokens -= item.tokens
            self._queued_tokens -= item.tokens
            if not ticket.begun:
                ticket.begun = True
                self.observer.waited(now - ticket.arrived)
            if room <= 0:
                break
        for item in reversed(passed):
            self._queue.back(item)
        return batch

    def _too_late(self, ticket: Ticket, now: float) -> bool:
        return not ticket.begun and not ticket.admitted and now - ticket.arrived > ticket.patience

    def _shed(self, ticket: Ticket) -> None:
        self._forget(ticket)
        self.observer.refused()
        error = Overloaded(f"the request waited longer than {ticket.patience:.1f} s.", 2.0)
        self._call(ticket, ticket.refuse, error)

    def _forget(self, ticket: Ticket) -> None:
        """Drop what has not begun."""
        ticket.cancelled = True
        if ticket in self._tickets:
            self._tickets.discard(ticket)
            self._queued_tokens -= ticket.queued_tokens  # some of its items may be in the hands of `_seal`
            ticket.queued_tokens = 0
            if dropped := self._queue.drop(ticket):
                self.observer.dropped(dropped)

    def _cancel(self, ticket: Ticket) -> None:
        with self._wake:
            self._forget(ticket)

    @staticmethod
    def _call(ticket: Ticket, function: Callable, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed, so it no longer waits
            ticket.loop.call_soon_threadsafe(function, *args)

    # -- the lanes ----------------------------------------------------------------------------------------

    def _main(self, lane: int) -> None:
        try:
            if self._on_start:
                self._on_start()
            while self._turn(lane):
                pass
        except EngineDead:
            pass
        finally:
            # Also when it dies of what it should not die of: then the whole engine is dead.
            with self._wake:
                asked, self._stopping = self._stopping, True
                self._wake.notify_all()
            self._fail_all(EngineDead())
            if self._on_death is not None and not asked:
                self._on_death()

    def _turn(self, lane: int) -> bool:
        """Wait for something to do, and do it. False when the engine ends."""
        calls: deque[tuple[Callable[[], Any], concurrent.futures.Future]] = deque()
        batch: list[Item] = []
        with self._wake:
            while not batch and not calls:
                if self._stopping:
                    return False
                if self._calls or self._exclusive:
                    # Nothing new is begun until the running batches end and the calls have been made.
                    if self._active == 0:
                        calls, self._calls = self._calls, calls
                        self._exclusive = True
                        continue
                elif self._queue:
                    batch = self._seal()
                    continue
                self._wake.wait()
            self._active += 1
            tokens = sum(item.tokens for item in batch)
            if batch:
                self._running[lane] = (self._clock(), tokens)
        if not batch:
            while calls:
                fulfil(*calls.popleft())
            with self._wake:
                self._active -= 1
                self._exclusive = False
                self._wake.notify_all()
            return True
        self._work(lane, batch, tokens)
        return True

    def _work(self, lane: int, batch: list[Item], tokens: int) -> None:
        runner = batch[0].runner
        began = self._clock()
        outcomes = self._run(runner, [item.query for item in batch])
        seconds = self._clock() - began
        with self._wake:
            self._running.pop(lane, None)
            self._busy_s += seconds
            self._active -= 1
            if self._calls:
                self._wake.notify_all()
            self._rates.add(runner, max(tokens, self.floor_tokens), seconds)
            for item, outcome in zip(batch, outcomes):
                ticket = item.ticket
                ticket.outcomes[item.place] = outcome
                ticket.left -= 1
                ticket.done_tokens += item.tokens
                if ticket.left == 0 and not ticket.cancelled:
                    self._tickets.discard(ticket)
                    self._call(ticket, ticket.settle)
        self.observer.batch(runner, len(batch), tokens, runner.budget, seconds)

    def _run(self, runner: Runner, queries: list[Any]) -> list[Any]:
        """Answers, or the exception of each item at fault: halved until it stands alone."""
        try:
            results = runner.run(queries)
            if len(results) != len(queries):
                raise RuntimeError(f"{len(queries)} queries gave {len(results)} results")
            return list(results)
        except Exception as error:
            if self._fatal(error):
                raise EngineDead("the engine's device failed.") from None
            if len(queries) == 1:
                return [error if isinstance(error, BioseqError) else without_text(error)]
        half = len(queries) // 2
        return self._run(runner, queries[:half]) + self._run(runner, queries[half:])

    def _fail_all(self, error: Exception) -> None:
        with self._wake:
            self._running.clear()
            self._queue.clear()
            self._queued_tokens = 0
            while self._calls:
                self._calls.popleft()[1].set_exception(error)
            for ticket in list(self._tickets):
                ticket.cancelled = True
                self._call(ticket, ticket.refuse, error)
            self._tickets.clear()

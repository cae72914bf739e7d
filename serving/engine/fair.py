"""The queue of an engine: fair between callers by tokens, by due time within one.

Concept (start-time fair queueing). Every caller has a count of the tokens that it was served. The next item is the
earliest due one of the caller with the lowest count. A caller that was away starts at the count of whoever was served
last, so nobody saves up turns. Of n callers that wait, each gets at least an n-th of the engine, whatever the others
send.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable

from serving.engine.queueing import Item, Ticket


class FairQueue:
    """Not thread-safe: the engine holds its lock."""

    def __init__(self) -> None:
        self._items: dict[str, list[Item]] = {}  # of each caller, a heap by due time
        self._served: dict[str, int] = {}
        self._turns: list[tuple[int, int, str]] = []  # a heap; an entry whose count is old is skipped
        self._numbers = itertools.count()
        self._now = 0  # the count of whoever was served last
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: Item) -> None:
        caller = item.ticket.caller
        if caller not in self._items:
            self._items[caller] = []
            self._serve(caller, max(self._served.get(caller, 0), self._now))
        heapq.heappush(self._items[caller], item)
        self._size += 1

    def _serve(self, caller: str, count: int) -> None:
        self._served[caller] = count
        heapq.heappush(self._turns, (count, next(self._numbers), caller))

    def pop(self) -> Item:
        """The next item, counted as served."""
        while True:
            count, _, caller = heapq.heappop(self._turns)
            waiting = self._items.get(caller)
            if waiting and count == self._served[caller]:
                break
        self._now = max(self._now, count)
        item = heapq.heappop(waiting)
        self._size -= 1
        if waiting:
            self._serve(caller, count + item.tokens)
        else:
            self._served[caller] = count + item.tokens
            self._leave(caller)
        return item

    def _leave(self, caller: str) -> None:
        del self._items[caller]
        if len(self._served) > 1000:  # who was served less than the others is like a new caller anyway
            self._served = {c: n for c, n in self._served.items() if c in self._items or n > self._now}

    def back(self, item: Item) -> None:
        """Take an item back that was not served after all."""
        caller = item.ticket.caller
        count = self._served.get(caller, 0) - item.tokens
        if caller not in self._items:
            self._items[caller] = []
        heapq.heappush(self._items[caller], item)
        self._size += 1
        self._serve(caller, max(0, count))

    def drop(self, ticket: Ticket) -> int:
        """Take all items of a ticket out; how many there were."""
        waiting = self._items.get(ticket.caller, [])
        kept = [item for item in waiting if item.ticket is not ticket]
        dropped = len(waiting) - len(kept)
        if dropped:
            self._size -= dropped
            heapq.heapify(kept)
            self._items[ticket.caller] = kept
            if not kept:
                self._leave(ticket.caller)
        return dropped

    def clear(self) -> None:
        self._items.clear()
        self._turns.clear()
        self._size = 0


def wait_tokens(due: Iterable[tuple[str, float]], ticket: Ticket) -> float:
    """Tokens that are served before a new ticket begins: its caller's that are due, and of each other caller as many as
    the caller is served until then at most. `due` are callers and their tokens that are due."""
    by_caller: dict[str, float] = {}
    for caller, tokens in due:
        by_caller[caller] = by_caller.get(caller, 0.0) + tokens
    own = by_caller.pop(ticket.caller, 0.0)
    return own + sum(min(tokens, own + ticket.first_tokens) for tokens in by_caller.values())


def over_share(tickets: Iterable[Ticket], ticket: Ticket, limit: float) -> bool:
    """Whether the caller of a new ticket would hold more than its part of a full queue. Others keep theirs: n callers
    hold at most 1 + 1/2 + ... + 1/n limits together."""
    held = {ticket.caller: ticket.total_tokens}
    for other in tickets:
        held[other.caller] = held.get(other.caller, 0) + other.queued_tokens
    return held[ticket.caller] > limit / len(held)

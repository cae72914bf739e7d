"""Searches for homologs, for the requests that wait for them: what a replica of the search deployment is made of.

The queue is an engine's (`batcher`): while a search runs requests gather, and the next search takes them together, up
to `BUDGET` residues; a request is refused when it would wait too long. One search runs at a time, with all of this
replica's threads. The reference set's index is opened at the start and stays in memory (MMseqs2 maps it).
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.errors import BioseqError, NotFoundError, SearchError, SequenceError, ServiceError
from bioseq.homologs.alignment import most_rows
from bioseq.homologs.search import fresh_protein
from serving.engine.asks import Fault
from serving.engine.batcher import Engine
from serving.engine.queueing import Observer
from serving.telemetry.logs import line, trouble

if TYPE_CHECKING:
    from bioseq.bundles.registry import Registry
    from bioseq.heads.relatives import Relatives
    from bioseq.heads.searching import HeadSearch
    from bioseq.homologs.hits import Hits
    from bioseq.homologs.profile import Profile
    from bioseq.inference.evidence import Found
    from serving.settings import Settings

BUDGET = 200_000  # residues of one search
ROWS, LETTERS = 10, 2000  # of an alignment that are read while one residue is searched
FLOOR = 4_000  # residues below which a search hardly gets shorter


@dataclass(frozen=True, slots=True)
class SearchAsk:
    """Sequences whose homologs in `reference` are wanted, and what homologs say of them to `heads`, exact names;
    `variants` leaves near copies out (see `bioseq.inference.homologs`). `alignment`: the text of the one sequence's, which
    is taken instead of a search. `admitted`: the request's first slice was
    accepted, so this one must be. `hits`: the so many best hits of each sequence are wanted, not what a model reads of
    them."""

    reference: str | None
    sequences: tuple[str, ...] = field(repr=False)
    variants: bool = False
    offset: int = 0
    admitted: bool = False
    timeout_s: float = 600.0
    caller: str = ""
    heads: tuple[str, ...] = ()
    alignment: str | None = field(default=None, repr=False)
    hits: int = 0


@dataclass(frozen=True, slots=True)
class SearchReply:
    """`found` and, by head, `told`: one a sequence; `hits`, one a sequence, in place of `found`; `count` of all hits of each."""

    fault: Fault | None = None
    found: tuple[Found, ...] = ()
    told: dict[str, tuple[Relatives, ...]] = field(default_factory=dict)
    search_s: float = 0.0
    hits: tuple[Hits, ...] = ()
    count: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """One sequence in the queue; its `alignment`, or the `profile` of one, is taken instead of a search."""

    sequence: str
    place: int
    alignment: str | None = None
    profile: Profile | None = None

    @property
    def tokens(self) -> int:
        """Residues that take as long to search."""
        return len(self.sequence) + reading(self.alignment)


def reading(alignment: str | None) -> int:
    """Residues that take as long to search as this alignment takes to read."""
    return 0 if alignment is None else most_rows(alignment) // ROWS + len(alignment) // LETTERS


class Searcher(ABC):
    """What is searched in one way: the engine's runner."""

    budget = BUDGET

    @abstractmethod
    def find(self, queries: Sequence[Wanted]) -> list[Any]:
        """What is found for each, or its error."""

    def run(self, queries: Sequence[Wanted]) -> list[Any]:
        """In order. What is not a sequence's fault is every query's error at once, so that the engine does not look for
        the one at fault. Where a search fails but that of another protein does not, the one at fault is found by
        halving, and the others are answered."""
        try:
            return self.find(queries)
        except SequenceError:
            raise
        except BioseqError as error:
            trouble("homolog search", error, code=error.code)
            if isinstance(error, SearchError) and len(queries) > 1 and self.works():
                half = len(queries) // 2
                return [*self.run(queries[:half]), *self.run(queries[half:])]
            return [unavailable(error)] * len(queries)

    def works(self) -> bool:
        try:
            self.find([Wanted(fresh_protein(), 0)])
        except BioseqError:
            return False
        return True


class Reference(Searcher):
    """One reference set: profiles."""

    def __init__(self, where: str, variants: bool, threads: int | None):
        from bioseq.homologs.door import Homologs
        from bioseq.homologs.settings import SearchSettings
        from bioseq.inference.homologs import NEAR_COPIES

        settings = SearchSettings(exclude_above_identity=NEAR_COPIES if variants else None)
        self.door = Homologs(where, settings=settings, threads=threads, quiet=True)
        self.name = self.door.reference.name

    def find(self, queries: Sequence[Wanted]) -> list[Any]:
        from bioseq.inference.evidence import Found

        return [Found(profile, self.name) for profile in self.door.profiles([q.sequence for q in queries])]


class HitsOf(Reference):
    """One reference set: the hits themselves."""

    def find(self, queries: Sequence[Wanted]) -> list[Any]:
        return list(self.door.search([q.sequence for q in queries]))


class Alignments(Searcher):
    """Alignments that came with the requests."""

    def __init__(self, variants: bool):
        self.variants = variants

    def find(self, queries: Sequence[Wanted]) -> list[Any]:
        from bioseq.inference.homologs import found_in

        found: list[Any] = []
        for q in queries:
            try:
                found.append(found_in((q.alignment or "").encode(), q.sequence, variants=self.variants))
            except BioseqError as error:
                found.append(error)
        return found


class OfHead(Searcher):
    """The training rows of one head, and the shipped reference set where it reads profiles."""

    def __init__(self, search: HeadSearch, threads: int | None):
        self.search, self.threads = search, threads

    def find(self, queries: Sequence[Wanted]) -> list[Any]:
        told: dict[int, Any] = {}
        for given in (False, True):
            some = [i for i, q in enumerate(queries) if (q.profile is not None) == given]
            if some:
                profiles = [q.profile for q in queries if q.profile is not None] if given else None
                texts = [queries[i].sequence for i in some]
                found = self.search.find(texts, profiles, threads=self.threads)
                told |= dict(zip(some, found.each(len(some)), strict=True))
        return [told[i] for i in range(len(queries))]


def unavailable(error: BioseqError) -> ServiceError:
    """The operator's trouble (no MMseqs2, a reference set removed, a full disk) as the caller hears of it."""
    return ServiceError(
        f"homologs cannot be searched now: {error.message}",
        status=503, code=error.code, retry_after=30, hint="Ask again with homologs 'none', or later.",
    )  # fmt: skip


class Searches:
    """`references` maps the names that a request may give to folders (or "default" to the shipped set)."""

    def __init__(
        self, settings: Settings, *, registry: Registry | None = None, observer: Observer | None = None
    ):
        self.settings, self._registry = settings, registry
        self.references = settings.references
        self._opened: dict[tuple[str, bool, type[Reference]], Reference] = {}
        self._heads: OrderedDict[str, OfHead] = OrderedDict()
        self._aligned = {variants: Alignments(variants) for variants in (False, True)}
        self._lock = threading.Lock()  # of what is opened: two first requests open it once
        self.engine = Engine(
            lanes=1,
            max_queue_s=settings.max_queue_s,
            max_queued_tokens=settings.max_queued_residues,
            floor_tokens=FLOOR,
            observer=observer,
        )

    async def start(self) -> None:
        self.engine.start()
        await self.warm()

    async def warm(self) -> None:
        """Build the index beside the queue, which serves heads meanwhile, and search once, so that it is in memory before
        the first request. A set that cannot be searched is reported, and each request for it says why."""
        from bioseq.homologs.database import open_database

        name = self.settings.homologs
        if name == "none":
            return
        try:
            runner = await asyncio.to_thread(self._open, name, True)
            await asyncio.to_thread(open_database, runner.door.reference, quiet=True)
            for _ in range(2):  # the second is measured
                await self.engine.submit(runner, [Wanted(fresh_protein(), 0)], admitted=True)
        except Exception as error:
            line("homologs", state="not ready", error=type(error).__name__, code=getattr(error, "code", None))

    def _open(self, name: str, variants: bool, kind: type[Reference] | None = None) -> Reference:
        """Raises `NotFoundError`, and what opening a reference set raises."""
        kind = kind or Reference
        key = (name, variants, kind)
        with self._lock:
            if key not in self._opened:
                if name not in self.references:
                    known = ", ".join(sorted(self.references)) or "none"
                    raise NotFoundError(
                        "there is no reference set of that name.", code="homologs.not_found",
                        hint=f"This server has: {known}.",
                    )  # fmt: skip
                self._opened[key] = kind(self.references[name], variants, self.settings.search_threads)
            return self._opened[key]

    def _head(self, exact: str) -> OfHead:
        """Raises `NotFoundError`, and what opening a bundle raises."""
        from bioseq.bundles.registry import Registry
        from bioseq.heads.searching import HeadSearch

        with self._lock:
            known = self._heads.get(exact)
            if known is None:
                self._registry = self._registry or Registry(self.settings.registry)
                try:
                    bundle = self._registry.resolve(exact, paths=False)
                except NotFoundError as error:
                    raise NotFoundError(error.message, code="head.not_found", hint=error.hint) from None
                known = OfHead(HeadSearch.read(bundle), self.settings.search_threads)
            self._heads[exact] = known
            self._heads.move_to_end(exact)
            while len(self._heads) > self.settings.max_heads:
                self._heads.popitem(last=False)
        return known

    async def status(self) -> dict[str, Any]:
        """`tokens_per_second` are residues."""
        return self.engine.status()

    @staticmethod
    def preparing() -> SearchReply:
        """The reply while the index is being built."""
        error = ServiceError(
            "the reference set is being prepared for searches; this happens once on each machine.",
            status=503, code="homologs.preparing", retry_after=10, hint="Ask again soon, or with homologs 'none'.",
        )  # fmt: skip
        return SearchReply(Fault.of(error))

    async def find(self, ask: SearchAsk) -> SearchReply:
        """Never raises but when cancelled."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(ask.timeout_s):
                found: list[Any] = []
                wanted = [Wanted(s, i, ask.alignment) for i, s in enumerate(ask.sequences)]
                if ask.alignment is not None:
                    found = await self._all(ask, wanted, self._aligned.__getitem__, ask.variants)
                    wanted = [Wanted(ask.sequences[0], 0, profile=found[0].profile)]
                elif ask.hits and ask.reference is not None:
                    all_hits = await self._all(ask, wanted, self._open, ask.reference, ask.variants, HitsOf)
                    best = tuple(h.select(np.arange(min(len(h), ask.hits))) for h in all_hits)
                    took = time.perf_counter() - began
                    return SearchReply(hits=best, count=tuple(map(len, all_hits)), search_s=took)
                elif ask.reference is not None:
                    found = await self._all(ask, wanted, self._open, ask.reference, ask.variants)
                told = {head: tuple(await self._all(ask, wanted, self._head, head)) for head in ask.heads}
        except TimeoutError:
            fault = Fault("ServiceError", "the request's time ran out.", "request.timeout", status=408)
            return SearchReply(fault)
        except BioseqError as error:
            return SearchReply(Fault.of(error, offset=ask.offset))
        except Exception as error:
            trouble("search failed", error)
            return SearchReply(Fault.of(error))
        return SearchReply(None, tuple(found), told, time.perf_counter() - began)

    async def _all(
        self, ask: SearchAsk, wanted: list[Wanted], opener: Callable[..., Searcher], *what: Any
    ) -> list[Any]:
        """What one searcher finds for each sequence. Raises the first sequence's error."""
        try:
            runner = await asyncio.to_thread(opener, *what)
        except NotFoundError:
            raise
        except BioseqError as error:
            raise unavailable(error) from error
        found = await self.engine.submit(runner, wanted, admitted=ask.admitted, caller=ask.caller)
        for place, one in enumerate(found):
            if isinstance(one, SequenceError):
                raise one.at(index=place)
            if isinstance(one, BaseException):
                raise one
        return found

"""From a checked body to a response, in one walk: names, cost, limits, engines, bytes.

A route describes what it wants as an `Order` and calls `answer` once.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from bioseq.errors import SequenceError, ServiceError, SpecError
from bioseq.heads.features import kept
from bioseq.homologs.alignment import most_rows
from serving.database.keys import KeyInfo
from serving.engine.asks import Ask, Reply
from serving.engine.searches import SearchAsk, SearchReply, reading
from serving.http.checks import Checked, checked, slices
from serving.http.coding import Coding
from serving.http.formats import Writer
from serving.http.service import Service, service_of
from serving.http.targets import Target, find, own_set
from serving.problems import Problem, too_many_items

MAX_ROWS = 100_000  # of an alignment: a row takes as long to read as 300 letters


@dataclass(kw_only=True)
class Order(ABC):
    """What one request asks for. The methods are called in this order, once each, with its models resolved."""

    model: str
    sequences: Sequence[str]
    heads: Sequence[str] = ()
    long_sequences: str = "error"
    homologs: str = "auto"  # none, a reference set, or auto
    alignment: str | None = None  # the text of one, in place of a search
    coding: Coding | None = None  # the sequences are proteins that were translated
    mixes: ClassVar[bool] = False  # homologs stand beside a backbone that does not read them

    def auto(self, service: Service) -> str:
        """The reference set that auto stands for, beside what a backbone or head reads itself."""
        return "none"

    def check(self, target: Target, service: Service) -> None:
        """Raise what is wrong with it for this model."""
        if self.coding is not None and target.shape.alphabet.name != "protein":
            raise SpecError(
                f"{target.model.name} reads {target.shape.alphabet.name}, not proteins.",
                field="translate",
                hint="Leave translate out: it reads the sequences as they are.",
            )
        limit = service.settings.max_items
        if len(self.sequences) > limit:
            raise too_many_items(len(self.sequences), limit)

    def cost(self, target: Target, plain: Checked) -> Checked:
        """Its cost, given that of one pass over each sequence."""
        return Checked(plain.residues, [t * target.routes for t in plain.tokens])

    def items(self) -> int:
        return len(self.sequences)

    @abstractmethod
    def ask(self, target: Target) -> Ask:
        """The ask of the engines, whole."""

    def answer_bytes(self, target: Target) -> tuple[int, int]:
        """About what the answer takes: bytes a sequence, and bytes a residue."""
        return 64, 0

    @abstractmethod
    def writer(self, target: Target, cost: Checked) -> Writer:
        """What makes bytes of the replies."""


def embedding_bytes(target: Target, layers: int, per_residue: bool) -> tuple[int, int]:
    """Of embeddings, as `Order.answer_bytes` says it."""
    vector = 4 * target.shape.d_model * layers
    return 64 + vector, vector if per_residue else 0


async def answer(request: Request, key: KeyInfo, order: Order) -> Response:
    """Raises `NotFoundError`, `SequenceError`, `Problem` 413 and 429, and what the engine raises for the first
    slice. If a later slice fails, the response breaks off, which every client notices."""
    service = service_of(request)
    target = await find(service, order.model, order.heads)
    order.check(target, service)
    try:
        plain = await checked(target.shape, order.sequences, order.long_sequences)
    except SequenceError as error:
        raise error if order.coding is None else order.coding.blamed(error) from None
    cost = order.cost(target, plain)
    a_sequence, a_residue = order.answer_bytes(target)
    settings = service.settings
    sizes = [a_sequence + a_residue * n for n in cost.residues]
    for what, size, limit in (
        ("the answer for one sequence", max(sizes), settings.max_item_bytes),
        ("the answer", sum(sizes), settings.max_answer_bytes),
    ):
        if size > limit:
            raise Problem(
                413, "request.too_large",
                f"{what} would have {size} bytes; the limit is {limit}. Ask for fewer layers or sequences, or pooled.",
                given=size, limit=limit,
            )  # fmt: skip
    if order.alignment is not None:
        _check_alignment(order, target)
    tokens = sum(cost.tokens) + reading(order.alignment) + (order.coding.tokens if order.coding else 0)
    cuts = slices(cost.tokens, sizes, settings.chunk_tokens, settings.chunk_bytes)
    # What a reader who stalls leaves lying here: the piece that is sent, and those that are asked for meanwhile. Pieces of
    # one large item each are asked for one after another.
    pieces = sorted((sum(sizes[cut]) for cut in cuts), reverse=True)
    ahead = settings.parallel_chunks if pieces[0] <= settings.chunk_bytes else 0
    request.scope["bioseq.hold"](sum(pieces[: ahead + 1]))
    minute = await charge(request, key, target, order.items(), tokens)
    ask = replace(
        order.ask(target), timeout_s=settings.request_s, caller=key.id, searching=target.searching,
        reference=await _reference(order, target, service), reads=target.reads_homologs,
        alignment=order.alignment,
    )  # fmt: skip
    first, *later = [
        replace(
            ask, sequences=ask.sequences[cut], residues=tuple(cost.residues[cut]), offset=cut.start,
            admitted=cut.start > 0,
        )
        for cut in cuts
    ]  # fmt: skip
    try:
        reply = await _reply(request, first)
    except ServiceError as error:
        if error.status in (429, 503):  # nothing was computed: the next try must not pay again
            await service.authorizer.refund(key, minute, tokens)
        raise
    writer = order.writer(target, cost)
    headers = {"X-Model": target.model.exact}
    usage = {"items": order.items(), "tokens": tokens}
    if not later:
        body = writer.begin() + writer.rows(reply, 0) + writer.end(usage)
        return Response(body, media_type=writer.media, headers=headers)
    body_parts = _pieces(request, reply, later, writer, usage, ahead)
    return StreamingResponse(body_parts, media_type=writer.media, headers=headers)


async def _reference(order: Order, target: Target, service: Service) -> str | None:
    """Where the homologs of this request are searched. Raises `SpecError`, `Problem` 404."""
    proteins = target.shape.alphabet.name == "protein"
    name = order.homologs
    if order.alignment is not None:
        return None
    if name == "auto":
        if target.reads_homologs:
            return await own_set(service, target)
        name = order.auto(service) if proteins else "none"
    if name == "none":
        return None
    if not order.mixes and not target.reads_homologs:
        raise SpecError(
            f"{target.model.name} does not read homologs.", field="homologs", hint="Leave them out."
        )
    if not service.settings.searches:
        raise Problem(
            404, "homologs.not_found", "this server does not search for homologs. Ask with homologs 'none'."
        )
    if not proteins:
        raise SpecError(
            f"{target.model.name} reads {target.shape.alphabet.name}; homologs are searched for proteins.",
            field="homologs",
        )
    return name


def _check_alignment(order: Order, target: Target) -> None:
    """Raises `SpecError` for an alignment that nothing reads, or that is not of one protein, and `Problem` 413."""
    assert order.alignment is not None
    rows = most_rows(order.alignment)
    if rows > MAX_ROWS:
        raise Problem(
            413, "request.too_large",
            f"the alignment has {rows} rows (of a Stockholm file: lines); the limit is {MAX_ROWS}. Leave near copies out: "
            "1,000 rows make the profile.",
            given=rows, limit=MAX_ROWS,
        )  # fmt: skip
    if order.homologs != "auto":
        told = "give either homologs or an alignment."
    elif len(order.sequences) != 1:
        told = f"{len(order.sequences)} sequences were given; an alignment belongs to one."
    elif target.shape.alphabet.name != "protein":
        told = f"{target.model.name} reads {target.shape.alphabet.name}; homologs are those of proteins."
    elif not (order.mixes or target.reads_homologs or target.profiles):
        told = f"{target.model.name} does not read homologs" + (
            ", nor do these heads read profiles." if order.heads else "."
        )
    else:
        return
    raise SpecError(told, field="alignment")


async def charge(request: Request, key: KeyInfo, target: Target, items: int, tokens: int) -> int:
    """Refuse what is too much for one request, count the rest; the minute that it was counted in. Raises `Problem` 413 and 429."""
    service = service_of(request)
    limit = service.settings.max_request_tokens
    if tokens > limit:
        raise Problem(
            413, "request.too_large",
            f"the request costs {tokens} tokens; the limit is {limit}. Send several requests, or a screen job.",
            given=tokens, limit=limit,
        )  # fmt: skip
    minute = await service.authorizer.spend(key, tokens=tokens)
    route = getattr(request.scope.get("route"), "path", "other")
    service.metrics.items.labels(route, target.model.name).inc(items)
    service.metrics.tokens.labels(route, target.model.name).inc(tokens)
    for model in target.heads.values():
        service.metrics.head_items.labels(model.name).inc(items)
    request.scope["bioseq.asked"] = {
        "model": target.model.exact,
        "heads": [m.exact for m in target.heads.values()] or None,
        "items": items,
        "tokens": tokens,
        "engine_ms": 0.0,
    }
    return minute


async def _reply(request: Request, ask: Ask) -> Reply:
    """One slice: its homologs, if they are wanted, then the engine. A fault is raised as its error."""
    service = service_of(request)
    if ask.reference is not None or ask.alignment is not None or ask.searching:
        said = await _homologs(request, ask)
        ask = replace(ask, found=said.found, told=said.told, alignment=None)
    with service.tracing.ask(ask.kind, ask.model, ask.heads, len(ask.sequences)) as span:
        reply = await service.link.answer(ask)
        if span is not None:
            span.set_attribute("bioseq.engine_s", reply.engine_s)
    told = request.scope["bioseq.asked"]
    told["engine_ms"] = round(told["engine_ms"] + reply.engine_s * 1000, 2)
    if reply.fault is not None:
        raise reply.fault.error()
    return reply


async def _homologs(request: Request, ask: Ask) -> SearchReply:
    """What the search deployment finds for a slice: for what is computed of each sequence."""
    reply = await service_of(request).searches.find(
        SearchAsk(
            ask.reference,
            tuple(kept(ask.sequences, ask.residues)),
            ask.reads or ask.kind in ("score", "scan", "predict"),
            ask.offset,
            ask.admitted,
            ask.timeout_s,
            ask.caller,
            ask.searching,
            ask.alignment,
        )
    )
    told = request.scope["bioseq.asked"]
    told["search_ms"] = round(told.get("search_ms", 0.0) + reply.search_s * 1000, 2)
    if reply.fault is not None:
        raise reply.fault.error()
    return reply


async def _pieces(
    request: Request, reply: Reply, asks: list[Ask], writer: Writer, usage: dict[str, int], ahead: int
) -> AsyncIterator[bytes]:
    """The answer piece by piece, with `ahead` asks on their way while a piece is sent."""
    waiting: list[asyncio.Task[Reply]] = []
    try:
        waiting += [asyncio.create_task(_reply(request, ask)) for ask in asks[:ahead]]
        piece = writer.begin() + writer.rows(reply, 0)
        for number, ask in enumerate(asks):
            del reply  # while the piece is sent, and the next one made, this one is not kept
            yield piece
            del piece
            reply = await (waiting.pop(0) if waiting else _reply(request, ask))
            following = asks[number + ahead : number + ahead + 1] if ahead else []
            waiting += [asyncio.create_task(_reply(request, a)) for a in following]
            piece = writer.rows(reply, ask.offset)
        yield piece
        yield writer.end(usage)
    finally:
        for task in waiting:
            task.cancel()

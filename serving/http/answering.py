"""From a checked request to a response: names resolved once, cost counted, slices asked for, answers streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from bioseq.bundles.manifest import Manifest
from bioseq.errors import NotFoundError
from serving.database.keys import KeyInfo
from serving.engine.asks import Ask, Reply
from serving.engine.catalogue import Model
from serving.http.checks import Checked, Shape, checked, slices
from serving.http.problems import Problem, too_many_items
from serving.http.service import Service
from serving.http.wire import Writer


@dataclass(frozen=True, slots=True)
class Target:
    """The exact versions that answer: `heads` maps the names asked for to them."""

    model: Model
    shape: Shape
    manifest: Manifest
    heads: dict[str, Model] = field(default_factory=dict)
    routes: int = 1  # passes over each sequence: the bare backbone, and each head with weights of its own

    @property
    def exact_heads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.exact for m in self.heads.values()))


def service_of(request: Request) -> Service:
    return request.app.state.service


async def find(service: Service, model: str, heads: Sequence[str] = ()) -> Target:
    """Raises `NotFoundError`. A name that is unknown is looked for once more in the registry as it is now."""
    try:
        return await _find(service, model, heads)
    except NotFoundError:
        await service.refresh()
        return await _find(service, model, heads)


async def _find(service: Service, model: str, heads: Sequence[str]) -> Target:
    catalogue = service.catalogue
    backbone = catalogue.backbone(model)
    manifest = await _manifest(service, backbone)
    chosen = {name: catalogue.head(name, backbone) for name in heads}
    routes = 0
    plain = not chosen
    for head in {m.exact: m for m in chosen.values()}.values():
        if _own_weights(await _manifest(service, head)):
            routes += 1
        else:
            plain = True
    return Target(backbone, Shape.of(manifest), manifest, chosen, routes + plain)


async def _manifest(service: Service, model: Model) -> Manifest:
    known = service.catalogue.known_manifest(model)
    return known if known is not None else await asyncio.to_thread(service.catalogue.manifest, model)


def _own_weights(manifest: Manifest) -> bool:
    """Whether a head changes the backbone (LoRA, or a trunk of its own), and so costs a pass of its own."""
    if any(name.startswith("adapter/") for name in manifest.files):
        return True
    return (manifest.extra.get("head") or {}).get("method") == "full"


async def admit(
    request: Request,
    key: KeyInfo,
    target: Target,
    sequences: Sequence[str],
    long_sequences: str,
) -> Checked:
    """Check the sequences and count the cost. Raises `SequenceError`, `Problem` 413 and 429."""
    service = service_of(request)
    settings = service.settings
    if len(sequences) > settings.max_items:
        raise too_many_items(len(sequences), settings.max_items)
    result = await checked(target.shape, sequences, long_sequences)
    if target.routes > 1:
        result = Checked(result.residues, [t * target.routes for t in result.tokens])
    await charge(request, key, target, len(sequences), sum(result.tokens))
    return result


async def charge(request: Request, key: KeyInfo, target: Target, items: int, tokens: int) -> None:
    """Refuse what is too much for one request, count the rest. Raises `Problem` 413 and 429."""
    service = service_of(request)
    limit = service.settings.max_request_tokens
    if tokens > limit:
        raise Problem(
            413, "request.too_large",
            f"the request costs {tokens} tokens; the limit is {limit}. Send several requests, or a screen job.",
            given=tokens, limit=limit,
        )  # fmt: skip
    await service.guard.spend(key, tokens)
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
    }


async def ask_one(request: Request, ask: Ask) -> Reply:
    """One slice; a fault is raised as its error."""
    service = service_of(request)
    with service.tracing.ask(ask) as span:
        reply = await service.link.answer(replace(ask, timeout_s=service.settings.request_s))
        if span is not None:
            span.set_attribute("bioseq.engine_s", reply.engine_s)
    told = request.scope.get("bioseq.asked")
    if told is not None:
        told["engine_ms"] = round(told.get("engine_ms", 0.0) + reply.engine_s * 1000, 2)
    if reply.fault is not None:
        raise reply.fault.error()
    return reply


async def stream(
    request: Request,
    ask: Ask,
    cost: Checked,
    writer: Writer,
    *,
    bytes_a_residue: int = 0,
    bytes_an_item: int = 64,
) -> Response:
    """Ask for the sequences in slices and answer through `writer`. The first slice decides the status; if a
    later one fails the response breaks off, which every client notices."""
    settings = service_of(request).settings
    sizes = [bytes_an_item + bytes_a_residue * n for n in cost.residues]
    cuts = slices(cost.tokens, sizes, settings.chunk_tokens, settings.chunk_bytes)
    usage = {"items": len(cost.tokens), "tokens": sum(cost.tokens)}

    def part(cut: slice, admitted: bool) -> Ask:
        return replace(ask, sequences=ask.sequences[cut], offset=cut.start, admitted=admitted)

    first = await ask_one(request, part(cuts[0], False))
    headers = {"X-Model": ask.model}
    if len(cuts) == 1:
        body = writer.begin() + writer.rows(first, 0) + writer.end(usage)
        return Response(body, media_type=writer.media, headers=headers)

    async def pieces() -> AsyncIterator[bytes]:
        waiting: list[asyncio.Task[Reply]] = []
        rest = iter(cuts[1:])

        def more() -> None:
            for cut in rest:
                waiting.append(asyncio.create_task(ask_one(request, part(cut, True))))
                if len(waiting) >= settings.parallel_chunks:
                    return

        try:
            more()
            yield writer.begin() + writer.rows(first, 0)
            for cut in cuts[1:]:
                reply = await waiting.pop(0)
                more()
                yield writer.rows(reply, cut.start)
            yield writer.end(usage)
        finally:
            for task in waiting:
                task.cancel()

    return StreamingResponse(pieces(), media_type=writer.media, headers=headers)

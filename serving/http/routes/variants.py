"""POST /v1/score and /v1/scan."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from serving.database.keys import KeyInfo
from serving.engine.asks import Ask, Reply
from serving.http.answering import Target, ask_one, charge, find, service_of
from serving.http.auth import require
from serving.http.checks import checked, variant_tokens
from serving.http.problems import too_many_items
from serving.http.routes.body import Route
from serving.http.schemas.common import problems
from serving.http.schemas.variants import ScanRequest, ScanResponse, ScoreRequest, ScoreResponse
from serving.http.wire import ARROW, JSON, NPZ, ArrowRows, NpzRows, TableRows, Writer, choose, dumps

router = APIRouter(prefix="/v1", tags=["variants"], route_class=Route)
Accept = Annotated[str | None, Header(include_in_schema=False)]
_RESPONSES: dict[int | str, dict[str, Any]] = {
    **problems(400, 401, 403, 404, 406, 408, 413, 422, 429, 503),
    200: {
        "content": {
            ARROW: {"schema": {"type": "string", "format": "binary"}},
            NPZ: {"schema": {"type": "string", "format": "binary"}},
        },
        "description": "By Accept: JSON, an Arrow stream, or numpy's npz.",
    },
}


@router.post("/score", response_model=ScoreResponse, responses=_RESPONSES)
async def score(
    request: Request, body: ScoreRequest, accept: Accept = None, key: KeyInfo = require("predict")
) -> Response:
    """How likely variants of a protein are, against the wild type."""
    media = choose(accept)
    limit = service_of(request).settings.max_variants
    if len(body.mutants) > limit:
        raise too_many_items(len(body.mutants), limit, "mutants")
    target, tokens = await _admit(request, key, body, len(body.mutants), scan=False)
    reply = await ask_one(
        request,
        Ask(
            "score", target.model.exact, (body.sequence,), long_sequences=body.long_sequences,
            options={"strategy": body.strategy, "mutants": body.mutants},
        ),
    )  # fmt: skip
    assert reply.scores is not None
    usage = {"items": len(reply.scores), "tokens": tokens}
    meta = {"model": target.model.exact, "strategy": body.strategy}
    if media == JSON:
        data = {**meta, "scores": reply.scores, "notes": reply.notes[0], "usage": usage}
        return _respond(dumps(data), JSON, target)
    values = np.array(reply.scores)
    if media == ARROW:

        def columns(reply: Reply, first: int) -> dict[str, Any]:
            import pyarrow as pa

            return {"mutant": pa.array(body.mutants), "score": pa.array(values)}

        return _write(TableRows(columns, _told(meta, reply)), reply, usage, target)
    writer = NpzRows("scores", (len(values),), "float64", False, [], _told(meta, reply))
    return _write(writer, Reply(arrays=values), usage, target)


@router.post("/scan", response_model=ScanResponse, responses=_RESPONSES)
async def scan(
    request: Request, body: ScanRequest, accept: Accept = None, key: KeyInfo = require("predict")
) -> Response:
    """All single substitutions of a sequence."""
    media = choose(accept)
    target, tokens = await _admit(request, key, body, 1, scan=True)
    reply = await ask_one(
        request,
        Ask(
            "scan", target.model.exact, (body.sequence,), long_sequences=body.long_sequences,
            options={"strategy": body.strategy},
        ),
    )  # fmt: skip
    assert reply.arrays is not None
    table, letters = reply.arrays[0], target.shape.alphabet.standard
    usage = {"items": int(table.size), "tokens": tokens}
    meta = {"model": target.model.exact, "strategy": body.strategy, "letters": letters}
    if media == JSON:
        rows = np.ascontiguousarray(table)
        data = {**meta, "scores": rows, "notes": reply.notes[0], "usage": usage}
        return _respond(dumps(data), JSON, target)
    rows_reply = Reply(arrays=table, notes=((),) * len(table))
    if media == ARROW:
        writer: Writer = ArrowRows("scores", len(letters), "float32", False, _told(meta, reply))
    else:
        writer = NpzRows("scores", table.shape, "float32", False, [], _told(meta, reply))
    return _write(writer, rows_reply, usage, target)


async def _admit(
    request: Request, key: KeyInfo, body: ScoreRequest | ScanRequest, variants: int, *, scan: bool
) -> tuple[Target, int]:
    target = await find(service_of(request), body.model)
    cost = await checked(target.shape, [body.sequence], body.long_sequences)
    tokens = variant_tokens(body.strategy, cost.residues[0], variants, target.shape.max_residues, scan=scan)
    await charge(request, key, target, variants, tokens)
    return target, tokens


def _told(meta: dict[str, str], reply: Reply) -> dict[str, str]:
    return {**meta, "notes": "; ".join(reply.notes[0])}


def _respond(body: bytes, media: str, target: Target) -> Response:
    return Response(body, media_type=media, headers={"X-Model": target.model.exact})


def _write(writer: Writer, reply: Reply, usage: dict[str, int], target: Target) -> Response:
    return _respond(writer.begin() + writer.rows(reply, 0) + writer.end(usage), writer.media, target)

"""POST /v1/embed, /v1/logits, and OpenAI's /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from bioseq.errors import SpecError
from serving.database.keys import KeyInfo
from serving.engine.asks import Ask, Reply
from serving.http.answering import Target, admit, find, service_of, stream
from serving.http.auth import require
from serving.http.checks import Checked
from serving.http.problems import Problem
from serving.http.routes.body import Route
from serving.http.schemas.common import problems
from serving.http.schemas.embed import (
    EmbedRequest,
    EmbedResponse,
    LogitsRequest,
    LogitsResponse,
    OpenAIRequest,
    OpenAIResponse,
)
from serving.http.wire import (
    ARROW,
    JSON,
    NPZ,
    ArrowRows,
    JsonRows,
    NpzRows,
    Writer,
    base64_floats,
    choose,
    vector_item,
)

router = APIRouter(prefix="/v1", tags=["embeddings"], route_class=Route)
Accept = Annotated[str | None, Header(include_in_schema=False)]
_ERRORS = (400, 401, 403, 404, 406, 408, 413, 422, 429, 503)
BINARY: dict[str, Any] = {
    "content": {
        ARROW: {"schema": {"type": "string", "format": "binary"}},
        NPZ: {"schema": {"type": "string", "format": "binary"}},
    },
    "description": "By Accept: JSON, an Arrow stream, or numpy's npz.",
}


@router.post("/embed", response_model=EmbedResponse, responses={**problems(*_ERRORS), 200: BINARY})
async def embed(
    request: Request, body: EmbedRequest, accept: Accept = None, key: KeyInfo = require("predict")
) -> Response:
    """Embeddings, pooled or per residue, of any layers. Not normalised."""
    media = choose(accept)
    target = await find(service_of(request), body.model)
    _check_layers(body.layers, target)
    cost = await admit(request, key, target, body.sequences, body.long_sequences)
    ask = Ask(
        "embed", target.model.exact, tuple(body.sequences), long_sequences=body.long_sequences,
        options={"pooling": body.pooling, "layers": tuple(body.layers), "per_residue": body.per_residue},
    )  # fmt: skip
    d, n = target.shape.d_model, len(body.layers)
    tail = (d,) if n == 1 else (n, d)
    if media == JSON:
        head = {"model": target.model.exact, "layers": body.layers}
        writer: Writer = JsonRows(head, _item("embedding", body.dtype, body.per_residue))
    else:
        meta = {"pooling": body.pooling, "layers": ",".join(map(str, body.layers)), "width": str(d)}
        writer = _binary(media, "embedding", tail, body.dtype, body.per_residue, cost, target, meta)
    bytes_each = 4 * d * n
    return await stream(
        request, ask, cost, writer,
        bytes_a_residue=bytes_each if body.per_residue else 0, bytes_an_item=64 + bytes_each,
    )  # fmt: skip


@router.post("/logits", response_model=LogitsResponse, responses={**problems(*_ERRORS), 200: BINARY})
async def logits(
    request: Request, body: LogitsRequest, accept: Accept = None, key: KeyInfo = require("predict")
) -> Response:
    """Language-model logits of every residue; "<mask>" in a sequence is a mask token."""
    media = choose(accept)
    target = await find(service_of(request), body.model)
    cost = await admit(request, key, target, body.sequences, body.long_sequences)
    ask = Ask("logits", target.model.exact, tuple(body.sequences), long_sequences=body.long_sequences)
    tokens = target.shape.alphabet.tokens
    if media == JSON:
        head = {"model": target.model.exact, "tokens": tokens}
        writer: Writer = JsonRows(head, vector_item("logits", body.dtype))
    else:
        meta = {"tokens": " ".join(tokens), "width": str(len(tokens))}
        writer = _binary(media, "logits", (len(tokens),), body.dtype, True, cost, target, meta)
    return await stream(request, ask, cost, writer, bytes_a_residue=4 * len(tokens))


def _item(name: str, dtype: str, per_residue: bool) -> Any:
    make = vector_item(name, dtype)
    if not per_residue:
        return make

    def item(reply: Reply, i: int, index: int) -> dict[str, Any]:
        made = make(reply, i, index)
        if made[name].ndim == 3:
            made[name] = np.ascontiguousarray(made[name].swapaxes(0, 1))
        return made

    return item


def _binary(
    media: str,
    name: str,
    tail: tuple[int, ...],
    dtype: str,
    ragged: bool,
    cost: Checked,
    target: Target,
    meta: dict[str, str],
) -> Writer:
    meta = {"model": target.model.exact, "content_hash": target.model.content_hash, **meta}
    if media == ARROW:
        return ArrowRows(name, int(np.prod(tail)), dtype, ragged, meta)
    rows = sum(cost.residues) if ragged else len(cost.residues)
    plural = {"embedding": "embeddings"}.get(name, name)  # as `bioseq embed -o FILE.npz` names it
    return NpzRows(plural, (rows, *tail), dtype, ragged, cost.residues, meta)


def _check_layers(layers: list[int], target: Target) -> None:
    depth = target.shape.n_layers
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise SpecError(f"layer {layer} is not there; this model has 0 to {depth}.", field="layers")


@router.post(
    "/embeddings",
    response_model=OpenAIResponse,
    responses=problems(*_ERRORS, openai=True),
    tags=["openai"],
)
async def openai_embeddings(
    request: Request, body: OpenAIRequest, accept: Accept = None, key: KeyInfo = require("predict")
) -> Response:
    """As OpenAI's: mean over residues of the last layer, one vector a sequence."""
    choose(accept, (JSON,))
    sequences = [body.input] if isinstance(body.input, str) else body.input
    target = await find(service_of(request), body.model)
    if body.dimensions not in (None, target.shape.d_model):
        raise Problem(
            422, "request.invalid",
            f"dimensions is {body.dimensions}; this model gives {target.shape.d_model}. Leave it out.",
            field="dimensions",
        )  # fmt: skip
    cost = await admit(request, key, target, sequences, "error")
    ask = Ask(
        "embed", target.model.exact, tuple(sequences),
        options={"pooling": "mean", "layers": (-1,), "per_residue": False},
    )  # fmt: skip
    base64 = body.encoding_format == "base64"

    def item(reply: Reply, i: int, index: int) -> dict[str, Any]:
        assert reply.arrays is not None
        vector = reply.arrays[i]
        return {
            "object": "embedding",
            "index": index,
            "embedding": base64_floats(vector) if base64 else np.ascontiguousarray(vector),
        }

    writer = _OpenAIRows({"object": "list", "model": target.model.exact}, item)
    return await stream(request, ask, cost, writer, bytes_an_item=64 + 4 * target.shape.d_model)


class _OpenAIRows(JsonRows):
    def end(self, usage: dict[str, int]) -> bytes:
        return super().end({"prompt_tokens": usage["tokens"], "total_tokens": usage["tokens"]})

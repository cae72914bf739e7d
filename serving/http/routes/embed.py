"""POST /v1/embed, /v1/logits, and OpenAI's /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from bioseq.errors import SpecError
from serving.database.keys import KeyInfo
from serving.engine.asks import Ask, Reply
from serving.http.answering import Order, answer, embedding_bytes
from serving.http.auth import require
from serving.http.checks import Checked
from serving.http.formats import (
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
from serving.http.routes.body import Route
from serving.http.schemas.common import homolog_info, problems
from serving.http.schemas.embed import (
    EmbedRequest,
    EmbedResponse,
    LogitsRequest,
    LogitsResponse,
    OpenAIRequest,
    OpenAIResponse,
)
from serving.http.service import Service
from serving.http.targets import Target
from serving.problems import Problem

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
    return await answer(request, key, EmbedOrder(body, choose(accept)))


class EmbedOrder(Order):
    def __init__(self, body: EmbedRequest, media: str):
        super().__init__(
            model=body.model, sequences=body.sequences, long_sequences=body.long_sequences,
            homologs=body.homologs, alignment=body.alignment,
        )  # fmt: skip
        self.body, self.media = body, media

    def check(self, target: Target, service: Service) -> None:
        super().check(target, service)
        depth = target.shape.n_layers
        for layer in self.body.layers:
            if not -depth - 1 <= layer <= depth:
                raise SpecError(f"layer {layer} does not exist; this model has 0 to {depth}.", field="layers")

    def ask(self, target: Target) -> Ask:
        b = self.body
        options = {"pooling": b.pooling, "layers": tuple(b.layers), "per_residue": b.per_residue}
        return Ask(
            "embed", target.model.exact, tuple(b.sequences), long_sequences=b.long_sequences, options=options
        )

    def answer_bytes(self, target: Target) -> tuple[int, int]:
        return embedding_bytes(target, len(self.body.layers), self.body.per_residue)

    def writer(self, target: Target, cost: Checked) -> Writer:
        b, d, n = self.body, target.shape.d_model, len(self.body.layers)
        if self.media == JSON:
            head = {"model": target.model.exact, "layers": b.layers}
            return JsonRows(head, _item("embedding", b.dtype, b.per_residue))
        meta = {"pooling": b.pooling, "layers": ",".join(map(str, b.layers)), "width": str(d)}
        tail = (d,) if n == 1 else (n, d)
        return _binary(self.media, "embedding", tail, b.dtype, b.per_residue, cost, target, meta)


@router.post("/logits", response_model=LogitsResponse, responses={**problems(*_ERRORS), 200: BINARY})
async def logits(
    request: Request, body: LogitsRequest, accept: Accept = None, key: KeyInfo = require("predict")
) -> Response:
    """Language-model logits of every residue; "<mask>" in a sequence is a mask token."""
    return await answer(request, key, LogitsOrder(body, choose(accept)))


class LogitsOrder(Order):
    mixes = True

    def __init__(self, body: LogitsRequest, media: str):
        super().__init__(
            model=body.model, sequences=body.sequences, long_sequences=body.long_sequences,
            homologs=body.homologs, alignment=body.alignment,
        )  # fmt: skip
        self.body, self.media = body, media

    def ask(self, target: Target) -> Ask:
        b = self.body
        return Ask("logits", target.model.exact, tuple(b.sequences), long_sequences=b.long_sequences)

    def answer_bytes(self, target: Target) -> tuple[int, int]:
        return 64, 4 * len(target.shape.alphabet.tokens)

    def writer(self, target: Target, cost: Checked) -> Writer:
        tokens = target.shape.alphabet.tokens
        if self.media == JSON:
            head = {"model": target.model.exact, "tokens": tokens}
            return JsonRows(head, _with_homologs(vector_item("logits", self.body.dtype)))
        meta = {"tokens": " ".join(tokens), "width": str(len(tokens))}
        return _binary(self.media, "logits", (len(tokens),), self.body.dtype, True, cost, target, meta)


def _with_homologs(make: Any) -> Any:
    def item(reply: Reply, i: int, index: int) -> dict[str, Any]:
        made = make(reply, i, index)
        return made | ({"homologs": homolog_info(reply.homologs[i])} if reply.homologs else {})

    return item


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
    return await answer(request, key, OpenAIOrder(body))


class OpenAIOrder(Order):
    def __init__(self, body: OpenAIRequest):
        super().__init__(
            model=body.model, sequences=[body.input] if isinstance(body.input, str) else body.input
        )
        self.body = body

    def check(self, target: Target, service: Service) -> None:
        super().check(target, service)
        if self.body.dimensions not in (None, target.shape.d_model):
            raise Problem(
                422, "request.invalid",
                f"dimensions is {self.body.dimensions}; this model gives {target.shape.d_model}. Leave it out.",
                field="dimensions",
            )  # fmt: skip

    def ask(self, target: Target) -> Ask:
        options = {"pooling": "mean", "layers": (-1,), "per_residue": False}
        return Ask("embed", target.model.exact, tuple(self.sequences), options=options)

    def answer_bytes(self, target: Target) -> tuple[int, int]:
        return 64 + 4 * target.shape.d_model, 0

    def writer(self, target: Target, cost: Checked) -> Writer:
        base64 = self.body.encoding_format == "base64"

        def item(reply: Reply, i: int, index: int) -> dict[str, Any]:
            assert reply.arrays is not None
            vector = reply.arrays[i]
            return {
                "object": "embedding",
                "index": index,
                "embedding": base64_floats(vector) if base64 else np.ascontiguousarray(vector),
            }

        return _OpenAIRows({"object": "list", "model": target.model.exact}, item)


class _OpenAIRows(JsonRows):
    def end(self, usage: dict[str, int]) -> bytes:
        return super().end({"prompt_tokens": usage["tokens"], "total_tokens": usage["tokens"]})

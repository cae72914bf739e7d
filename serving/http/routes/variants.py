"""POST /v1/score and /v1/scan."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from serving.database.keys import KeyInfo
from serving.engine.asks import Ask, Reply
from serving.http.answering import Order, answer
from serving.http.auth import require
from serving.http.checks import Checked, variant_tokens
from serving.http.formats import ARROW, JSON, NPZ, ArrowRows, NpzRows, TableRows, Whole, Writer, choose, dumps
from serving.http.routes.body import Route
from serving.http.schemas.common import homolog_info, problems
from serving.http.schemas.variants import ScanRequest, ScanResponse, ScoreRequest, ScoreResponse
from serving.http.service import Service
from serving.http.targets import Target
from serving.problems import Problem, too_many_items

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
    return await answer(request, key, ScoreOrder(body, choose(accept)))


@router.post("/scan", response_model=ScanResponse, responses=_RESPONSES)
async def scan(
    request: Request, body: ScanRequest, accept: Accept = None, key: KeyInfo = require("predict")
) -> Response:
    """All single substitutions of a sequence."""
    return await answer(request, key, ScanOrder(body, choose(accept)))


class _VariantOrder(Order):
    body: ScoreRequest | ScanRequest
    mixes = True

    def __init__(self, body: ScoreRequest | ScanRequest, media: str):
        super().__init__(
            model=body.model, sequences=[body.sequence], long_sequences=body.long_sequences,
            homologs=body.homologs, alignment=body.alignment,
        )  # fmt: skip
        self.body, self.media = body, media

    def auto(self, service: Service) -> str:
        return service.settings.homologs

    def tokens(self, target: Target, length: int) -> int:
        raise NotImplementedError

    def cost(self, target: Target, plain: Checked) -> Checked:
        return Checked(plain.residues, [self.tokens(target, plain.residues[0])])

    def ask(self, target: Target) -> Ask:
        return Ask(
            "score", target.model.exact, (self.body.sequence,), long_sequences=self.long_sequences,
            options={"strategy": self.body.strategy},
        )  # fmt: skip

    def writer(self, target: Target, cost: Checked) -> Writer:
        return Whole(self.media, lambda reply, usage: self.whole(target, reply, usage))

    def whole(self, target: Target, reply: Reply, usage: dict[str, int]) -> bytes:
        raise NotImplementedError

    def meta(self, target: Target, reply: Reply) -> dict[str, Any]:
        meta = {"model": target.model.exact, "strategy": self.body.strategy}
        return meta | {"homologs": homolog_info(reply.homologs[0]) if reply.homologs else None}


class ScoreOrder(_VariantOrder):
    body: ScoreRequest

    def check(self, target: Target, service: Service) -> None:
        limit = service.settings.max_variants
        if len(self.body.mutants) > limit:
            raise too_many_items(len(self.body.mutants), limit, "mutants")
        limit = service.settings.max_variant_bytes
        if self.characters > limit:
            raise Problem(
                413, "request.too_large",
                f"the mutants have {self.characters} characters; the limit is {limit}. Send several requests.",
                given=self.characters, limit=limit,
            )  # fmt: skip

    def items(self) -> int:
        return len(self.body.mutants)

    @property
    def characters(self) -> int:
        return sum(map(len, self.body.mutants))

    def tokens(self, target: Target, length: int) -> int:
        return variant_tokens(
            self.body.strategy, length, self.items(), target.shape.max_residues,
            scan=False, characters=self.characters,
        )  # fmt: skip

    def ask(self, target: Target) -> Ask:
        ask = super().ask(target)
        return replace(ask, options={**ask.options, "mutants": self.body.mutants})

    def whole(self, target: Target, reply: Reply, usage: dict[str, int]) -> bytes:
        assert reply.scores is not None
        meta = self.meta(target, reply)
        if self.media == JSON:
            return dumps({**meta, "scores": reply.scores, "notes": reply.notes[0], "usage": usage})
        values, told = np.array(reply.scores), _told(meta, reply)
        if self.media == NPZ:
            writer: Writer = NpzRows("scores", (len(values),), "float64", False, [], told)
            return _written(writer, Reply(arrays=values), usage)

        def columns(reply: Reply, first: int) -> dict[str, Any]:
            import pyarrow as pa

            return {"mutant": pa.array(self.body.mutants), "score": pa.array(values)}

        return _written(TableRows(columns, told), reply, usage)


class ScanOrder(_VariantOrder):
    def check(self, target: Target, service: Service) -> None:
        """Every length is within the limits of one request, or its tokens are not."""

    def tokens(self, target: Target, length: int) -> int:
        return variant_tokens(self.body.strategy, length, 1, target.shape.max_residues, scan=True)

    def ask(self, target: Target) -> Ask:
        return replace(super().ask(target), kind="scan")

    def whole(self, target: Target, reply: Reply, usage: dict[str, int]) -> bytes:
        assert reply.arrays is not None
        table, letters = reply.arrays[0], target.shape.alphabet.standard
        usage = {**usage, "items": int(table.size)}
        meta = {**self.meta(target, reply), "letters": letters}
        if self.media == JSON:
            if reply.homologs:
                meta |= {"depth": reply.homologs[0].depth, "weights": reply.homologs[0].weight}
            rows = np.ascontiguousarray(table)
            return dumps({**meta, "scores": rows, "notes": reply.notes[0], "usage": usage})
        told = _told(meta, reply)
        writer: Writer = (
            ArrowRows("scores", len(letters), "float32", False, told)
            if self.media == ARROW
            else NpzRows("scores", table.shape, "float32", False, [], told)
        )
        return _written(writer, Reply(arrays=table, notes=((),) * len(table)), usage)


def _told(meta: dict[str, Any], reply: Reply) -> dict[str, str]:
    told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items() if v is not None}
    return {**told, "notes": "; ".join(reply.notes[0])}


def _written(writer: Writer, reply: Reply, usage: dict[str, int]) -> bytes:
    return writer.begin() + writer.rows(reply, 0) + writer.end(usage)

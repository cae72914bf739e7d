"""POST /v1/predict."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from serving.database.keys import KeyInfo
from serving.engine.asks import Ask, Reply
from serving.http.answering import Order, answer
from serving.http.auth import require
from serving.http.checks import Checked
from serving.http.coding import Coding, translate
from serving.http.formats import ARROW, JSON, JsonRows, TableRows, Writer, choose
from serving.http.routes.body import Route
from serving.http.schemas.common import problems
from serving.http.schemas.predict import PredictRequest, PredictResponse
from serving.http.service import service_of
from serving.http.tables import coding_type, prediction_type
from serving.http.targets import Target
from serving.problems import Problem

router = APIRouter(prefix="/v1", tags=["predictions"], route_class=Route)


@router.post(
    "/predict",
    response_model=PredictResponse,
    responses={
        **problems(400, 401, 403, 404, 406, 408, 413, 422, 429, 503),
        200: {
            "content": {ARROW: {"schema": {"type": "string", "format": "binary"}}},
            "description": "By Accept: JSON, or an Arrow stream with a struct column for each head.",
        },
    },
)
async def predict(
    request: Request,
    body: PredictRequest,
    accept: Annotated[str | None, Header(include_in_schema=False)] = None,
    key: KeyInfo = require("predict"),
) -> Response:
    """Predictions of one or many heads, computed in one pass, with intervals and out-of-domain scores."""
    media = choose(accept, (JSON, ARROW))
    coding = None
    if body.translate != "none":
        coding = await translate(service_of(request), body.sequences, body.translate, body.genetic_code)
    return await answer(request, key, PredictOrder(body, media, coding))


class PredictOrder(Order):
    def __init__(self, body: PredictRequest, media: str, coding: Coding | None = None):
        super().__init__(
            model=body.model, sequences=body.sequences if coding is None else coding.proteins, heads=body.heads,
            long_sequences=body.long_sequences, homologs=body.homologs, alignment=body.alignment, coding=coding,
        )  # fmt: skip
        self.body, self.media = body, media
        if len(set(body.heads)) < len(body.heads):
            raise Problem(422, "request.invalid", "heads: a head is named twice.", field="heads")

    def ask(self, target: Target) -> Ask:
        return Ask(
            "predict", target.model.exact, tuple(self.sequences), heads=target.exact_heads,
            long_sequences=self.long_sequences, options={"nearest": self.body.nearest},
        )  # fmt: skip

    def answer_bytes(self, target: Target) -> tuple[int, int]:
        per_residue = any(m.task == "per_residue" for m in target.heads.values())
        n = len(target.heads)
        return (500 + 60 * self.body.nearest) * n, 200 * n if per_residue else 0

    def writer(self, target: Target, cost: Checked) -> Writer:
        exact = {name: model.exact for name, model in target.heads.items()}
        if self.media == JSON:
            return JsonRows({"model": target.model.exact, "heads": exact}, _items(exact, self.coding))
        return TableRows(_columns(exact, self.coding), {"model": target.model.exact})


def _by_asked_name(exact: dict[str, str], reply: Reply, i: int) -> dict[str, Any]:
    assert reply.predictions is not None
    return {name: reply.predictions[i][of] for name, of in exact.items()}


def _items(exact: dict[str, str], coding: Coding | None) -> Any:
    def item(reply: Reply, i: int, index: int) -> dict[str, Any]:
        place = {"coding": coding.places[index]} if coding else {}
        return {
            "index": index, **place, "predictions": _by_asked_name(exact, reply, i), "notes": reply.notes[i]
        }  # fmt: skip

    return item


def _columns(exact: dict[str, str], coding: Coding | None) -> Any:
    types: dict[str, Any] = {}

    def columns(reply: Reply, first: int) -> dict[str, Any]:
        import pyarrow as pa

        rows = [_by_asked_name(exact, reply, i) for i in range(len(reply.notes))]
        made: dict[str, Any] = {"index": pa.array(range(first, first + len(rows)), type=pa.int64())}
        if coding:
            made["coding"] = pa.array(coding.places[first : first + len(rows)], type=coding_type())
        for name in exact:
            if name not in types:
                types[name] = prediction_type(rows[0][name])
            made[name] = pa.array([row[name] for row in rows], type=types[name])
        made["notes"] = pa.array([list(n) for n in reply.notes], type=pa.list_(pa.string()))
        return made

    return columns

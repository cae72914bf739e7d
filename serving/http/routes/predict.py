"""POST /v1/predict."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from serving.database.keys import KeyInfo
from serving.engine.asks import Ask, Reply
from serving.http.answering import admit, find, service_of, stream
from serving.http.auth import require
from serving.http.problems import Problem
from serving.http.routes.body import Route
from serving.http.schemas.common import problems
from serving.http.schemas.predict import PredictRequest, PredictResponse
from serving.http.tables import prediction_type
from serving.http.wire import ARROW, JSON, JsonRows, TableRows, Writer, choose

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
    if len(set(body.heads)) < len(body.heads):
        raise Problem(422, "request.invalid", "heads: a head is named twice.", field="heads")
    target = await find(service_of(request), body.model, body.heads)
    cost = await admit(request, key, target, body.sequences, body.long_sequences)
    ask = Ask(
        "predict", target.model.exact, tuple(body.sequences), heads=target.exact_heads,
        long_sequences=body.long_sequences, options={"nearest": body.nearest},
    )  # fmt: skip
    exact = {name: model.exact for name, model in target.heads.items()}

    def by_asked_name(reply: Reply, i: int) -> dict[str, Any]:
        assert reply.predictions is not None
        return {name: reply.predictions[i][of] for name, of in exact.items()}

    def item(reply: Reply, i: int, index: int) -> dict[str, Any]:
        return {"index": index, "predictions": by_asked_name(reply, i), "notes": reply.notes[i]}

    types: dict[str, Any] = {}

    def columns(reply: Reply, first: int) -> dict[str, Any]:
        import pyarrow as pa

        rows = [by_asked_name(reply, i) for i in range(len(reply.notes))]
        made: dict[str, Any] = {"index": pa.array(range(first, first + len(rows)), type=pa.int64())}
        for name in exact:
            if name not in types:
                types[name] = prediction_type(rows[0][name])
            made[name] = pa.array([row[name] for row in rows], type=types[name])
        made["notes"] = pa.array([list(n) for n in reply.notes], type=pa.list_(pa.string()))
        return made

    writer: Writer = (
        JsonRows({"model": target.model.exact, "heads": exact}, item)
        if media == JSON
        else TableRows(columns, {"model": target.model.exact})
    )
    per_residue = any(m.task == "per_residue" for m in target.heads.values())
    return await stream(
        request, ask, cost, writer,
        bytes_a_residue=200 * len(exact) if per_residue else 0, bytes_an_item=(500 + 60 * body.nearest) * len(exact),
    )  # fmt: skip

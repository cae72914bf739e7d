"""POST /v1/estimate: tokens, memory and time, before anything runs."""

from __future__ import annotations

from fastapi import APIRouter, Request

from bioseq.backbones.shapes import shape_of
from bioseq.errors import SequenceTooLongError, ServiceError
from serving.database.keys import KeyInfo
from serving.http.answering import embedding_bytes
from serving.http.auth import require
from serving.http.checks import checked, variant_tokens
from serving.http.routes.body import Route
from serving.http.schemas.common import problems
from serving.http.schemas.estimate import EstimateRequest, EstimateResponse
from serving.http.service import Service, service_of
from serving.http.targets import Target, find
from serving.problems import Problem

router = APIRouter(prefix="/v1", tags=["operations"], route_class=Route)


@router.post("/estimate", responses=problems(400, 401, 403, 404, 408, 413, 422))
async def estimate(
    request: Request, body: EstimateRequest, key: KeyInfo = require("read")
) -> EstimateResponse:
    """What a request (or a screen of so many records) would cost on one engine, at its measured speed."""
    service = service_of(request)
    by_mean = body.records is not None and body.mean_length is not None
    given = [body.sequences is not None, body.lengths is not None, by_mean]
    if sum(given) != 1 or (not by_mean and (body.records is not None or body.mean_length is not None)):
        raise Problem(
            422,
            "request.invalid",
            "give one of sequences, lengths, or records with mean_length.",
            field="lengths",
        )
    target = await find(service, body.model, body.heads)
    residues, items = await _residues(body, target)
    tokens = _tokens(body, target, residues, items)
    try:
        status = await service.link.status()
    except ServiceError:
        status = {"tokens_per_second": None, "wait_s": 0.0, "models": {}}
    speed = status.get("tokens_per_second")
    searching = await _search_seconds(body, target, service, sum(residues) * items / len(residues))
    backbone = shape_of(target.manifest.architecture)
    flops = tokens * backbone.flops_per_token(sum(residues) / len(residues))
    d, f, weights = backbone.d_model, backbone.d_ff, 4 * backbone.n_parameters
    budget = max([m["budget"] for m in status.get("models", {}).values()] or [2048])
    response = _response_bytes(body, target, residues, items)
    s = service.settings
    return EstimateResponse(
        model=target.model.exact,
        items=items,
        tokens=tokens,
        flops=flops,
        seconds=round(tokens / speed, 3) if speed else None,
        search_seconds=searching,
        wait_seconds=status.get("wait_s", 0.0),
        response_bytes=response,
        engine_bytes=weights + 4 * budget * (6 * d + f),
        fits_one_request=items <= s.max_items
        and tokens <= s.max_request_tokens
        and response <= s.max_answer_bytes
        and _item_bytes(body, target, residues) <= s.max_item_bytes
        and body.kind != "screen",
    )


def _item_bytes(body: EstimateRequest, target: Target, residues: list[int]) -> int:
    """Of the largest embedding."""
    if body.kind != "embed":
        return 0
    a_sequence, a_residue = embedding_bytes(target, body.layers, body.per_residue)
    return a_sequence + a_residue * max(residues)


async def _search_seconds(
    body: EstimateRequest, target: Target, service: Service, residues: float
) -> float | None:
    """Of the search for homologs of so many residues; None where none is made or its speed is unknown."""
    wanted = body.homologs
    if wanted == "auto" and not target.reads_homologs:
        wanted = service.settings.homologs if body.kind in ("score", "scan") else "none"
    searches = (wanted != "none") + (len(target.searching) if body.kind == "predict" else 0)
    if not searches or target.shape.alphabet.name != "protein":
        return None
    try:
        speed = (await service.searches.status()).get("tokens_per_second")
    except ServiceError:
        return None
    return round(searches * residues / speed, 6) if speed else None


async def _residues(body: EstimateRequest, target: Target) -> tuple[list[int], int]:
    """Lengths, or the mean length for all records; and the number of items."""
    if body.sequences is not None:
        result = await checked(target.shape, body.sequences, body.long_sequences)
        return result.residues, len(body.sequences)
    if body.lengths is not None:
        for index, length in enumerate(body.lengths):
            if length > target.shape.max_residues and body.long_sequences == "error":
                raise SequenceTooLongError(
                    f"{length} residues; the limit is {target.shape.max_residues}.", index=index,
                    hint="Choose long_sequences 'window' or 'truncate'.",
                )  # fmt: skip
        return body.lengths, len(body.lengths)
    assert body.records is not None and body.mean_length is not None
    return [max(1, round(body.mean_length))], body.records


def _tokens(body: EstimateRequest, target: Target, residues: list[int], items: int) -> int:
    times = items / len(residues)
    if body.kind in ("score", "scan"):
        limit = target.shape.max_residues
        one = sum(
            variant_tokens(body.strategy, n, body.variants, limit, scan=body.kind == "scan") for n in residues
        )
        return round(one * times)
    one = sum(target.shape.cost(n, body.long_sequences)[1] for n in residues)
    return round(one * times) * target.routes


def _response_bytes(body: EstimateRequest, target: Target, residues: list[int], items: int) -> int:
    times = items / len(residues)
    if body.kind == "embed":
        vectors = sum(residues) if body.per_residue else len(residues)
        return round(4 * target.shape.d_model * body.layers * vectors * times)
    if body.kind == "score":
        return 8 * body.variants * items
    if body.kind == "scan":
        return round(4 * len(target.shape.alphabet.standard) * sum(residues) * times)
    return 300 * max(1, len(body.heads)) * items

"""`/v1/campaigns`: create, ingest, mark, status, plates and report. A round is proposed by a job of the kind `propose`.
Everything belongs to the key that made it; another key's is not found (404)."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import orjson
from fastapi import APIRouter, Query, Request, Response

from bioseq.campaigns.campaign import Campaign, Objective, Settings, check
from bioseq.campaigns.ingest import ingest
from bioseq.errors import InputError, SpecError
from bioseq.homologs.database import LETTERS
from bioseq.sequences.mutations import letters_of
from serving.database.keys import KeyInfo
from serving.http.answering import answer
from serving.http.auth import require
from serving.http.formats import JSON
from serving.http.routes.body import Route
from serving.http.routes.files import Id, files_of, sees
from serving.http.routes.variants import ScanOrder
from serving.http.schemas.campaigns import (
    CampaignEntry,
    CampaignInfo,
    CampaignList,
    CampaignRequest,
    Ingested,
    Marked,
    MarkRequest,
)
from serving.http.schemas.common import problems
from serving.http.schemas.variants import ScanRequest
from serving.http.service import service_of
from serving.jobs.campaigns import CampaignStore
from serving.jobs.tables import CampaignRow
from serving.problems import Problem

router = APIRouter(prefix="/v1", route_class=Route, tags=["campaigns"])
CSV = {"text/csv": {"schema": {"type": "string"}}}
REPORTS = asyncio.Semaphore(1)  # a report fits surrogates: one at a time beside the requests


def _store(request: Request) -> CampaignStore:
    return service_of(request).extras["campaigns"]


def _find(request: Request, campaign_id: str, key: KeyInfo) -> tuple[CampaignRow, Campaign]:
    row = _store(request).get(campaign_id, sees(key))
    return row, _store(request).open(row)


@contextlib.contextmanager
def _without(path: Path, name: str) -> Iterator[None]:
    """Errors with the name of what lies at a path of the server's, and 409 where another is writing."""
    try:
        yield
    except InputError as error:
        status = 409 if error.code == "campaign.busy" else 422
        raise Problem(status, error.code, str(error).replace(str(path), name)) from None


def _entry(row: CampaignRow) -> CampaignEntry:
    return CampaignEntry(id=row.id, name=row.name, owner=row.owner, created=row.created)


def _info(row: CampaignRow, campaign: Campaign) -> CampaignInfo:
    settings = vars(campaign.settings)
    return CampaignInfo(**_entry(row).model_dump(), settings=settings, **campaign.status())


async def _prior(request: Request, key: KeyInfo, body: CampaignRequest) -> np.ndarray | None:
    """float [L, 20]: the zero-shot score of every substitution, as `POST /v1/scan` answers it."""
    if body.model == "none":
        return None
    scan = ScanRequest(
        sequence=body.wild_type, model=body.model, homologs=body.homologs, long_sequences="window"
    )
    found = orjson.loads((await answer(request, key, ScanOrder(scan, JSON))).body)
    if set(LETTERS) - set(found["letters"]):
        raise SpecError("the model does not read proteins.", field="model")
    return np.array(found["scores"])[:, [found["letters"].index(x) for x in LETTERS]]


@router.post(
    "/campaigns", status_code=201, responses=problems(400, 401, 403, 404, 408, 409, 413, 422, 429, 503)
)
async def create(
    request: Request, response: Response, body: CampaignRequest, key: KeyInfo = require("train")
) -> CampaignInfo:
    """Start a campaign: its settings are frozen, and the zero-shot score of every substitution is computed once."""
    service, file = service_of(request), None
    if (body.candidates is None) == (not body.sites and body.mutations is None):
        raise SpecError("give candidates, or sites and mutations.", field="candidates")
    if body.candidates is not None:
        files = files_of(request)
        row = await asyncio.to_thread(files.get, body.candidates.removeprefix("file:"), key.id)
        file = files.path(row)
    settings = Settings(
        wild_type=letters_of(body.wild_type),
        objectives=tuple(str(Objective.read(o)) for o in body.objectives),
        sites=tuple(body.sites),
        mutations=body.mutations,
        allowed={k: v.upper() for k, v in body.allowed.items()},
        forbidden=tuple(body.forbidden),
        batch=body.batch,
        plate=body.plate,
        controls=body.controls,
        budget=body.budget,
        seed=body.seed,
    )
    check(settings)
    prior = await _prior(request, key, body)

    def make() -> CampaignInfo:
        with _without(file or Path("/"), "candidates"):
            return _info(
                *_store(request).create(
                    key.id,
                    body.name,
                    lambda folder: Campaign.create(folder, settings, prior=prior, file=file),
                    limit=service.settings.max_campaigns_per_key,
                )
            )

    made = await asyncio.to_thread(make)
    response.headers["Location"] = f"/v1/campaigns/{made.id}"
    return made


@router.get("/campaigns", responses=problems(401, 403))
def list_campaigns(request: Request, key: KeyInfo = require("train")) -> CampaignList:
    """This key's campaigns, newest first."""
    return CampaignList(data=[_entry(row) for row in _store(request).list(key.id)])


@router.get("/campaigns/{campaign_id}", responses=problems(401, 403, 404, 422))
def status(request: Request, campaign_id: Id, key: KeyInfo = require("train")) -> CampaignInfo:
    """Rounds, wells and the best so far."""
    return _info(*_find(request, campaign_id, key))


@router.delete("/campaigns/{campaign_id}", status_code=204, responses=problems(401, 403, 404, 409, 422))
def delete(request: Request, campaign_id: Id, key: KeyInfo = require("train")) -> Response:
    """Delete a campaign that no pending or running job proposes for."""
    row, _ = _find(request, campaign_id, key)
    _store(request).delete(row)
    return Response(status_code=204)


@router.post(
    "/campaigns/{campaign_id}/ingest",
    response_model=Ingested,
    responses=problems(400, 401, 403, 404, 408, 409, 413, 422),
    openapi_extra={"requestBody": {"required": True, "content": CSV}},
)
async def take_in(
    request: Request,
    campaign_id: Id,
    round: Annotated[int | None, Query(ge=1, le=10_000, description="Default: the latest.")] = None,
    correct: Annotated[bool, Query(description="Replace values of wells measured before.")] = False,
    key: KeyInfo = require("train"),
) -> Ingested:
    """Take in results: the body is a CSV file with variant and the objectives. All rows or none."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "text/csv":
        raise Problem(400, "request.bad", "send the table itself, as text/csv.")
    data = await request.body()

    def work() -> Ingested:
        _, campaign = _find(request, campaign_id, key)
        with _without(campaign.folder, "the campaign"):
            return Ingested(**ingest(campaign, data, round_=round, correct=correct))

    return await asyncio.to_thread(work)


@router.post("/campaigns/{campaign_id}/mark", responses=problems(400, 401, 403, 404, 408, 409, 413, 422))
def mark(request: Request, campaign_id: Id, body: MarkRequest, key: KeyInfo = require("train")) -> Marked:
    """Mark wells as ordered, abandoned (never proposed again) or excluded (a measurement that is left out)."""
    _, campaign = _find(request, campaign_id, key)
    with _without(campaign.folder, "the campaign"):
        return Marked(wells=campaign.mark(body.event, body.which))


@router.get(
    "/campaigns/{campaign_id}/plates/{number}",
    response_class=Response,
    responses={**problems(401, 403, 404, 422), 200: {"content": CSV, "description": "plate.csv"}},
)
def plate(request: Request, campaign_id: Id, number: int, key: KeyInfo = require("train")) -> Response:
    """The plate of a round."""
    _, campaign = _find(request, campaign_id, key)
    if not 1 <= number <= campaign.state().rounds:
        raise Problem(404, "round.not_found", "the campaign has no such round.")
    with _without(campaign.folder, "the campaign"):
        return Response(campaign.plate(number), media_type="text/csv")


@router.get(
    "/campaigns/{campaign_id}/ledger",
    response_class=Response,
    responses={**problems(401, 403, 404, 422), 200: {"content": CSV, "description": "ledger.csv"}},
)
def ledger(request: Request, campaign_id: Id, key: KeyInfo = require("train")) -> Response:
    """Every event of every well: proposed, ordered, measured with its values, failed, abandoned, excluded. Of a well the last row
    counts; rows `commit` seal what stands above them."""
    _, campaign = _find(request, campaign_id, key)
    with _without(campaign.folder, "the campaign"):
        return Response(campaign.ledger_text(), media_type="text/csv")


@router.get(
    "/campaigns/{campaign_id}/report",
    response_class=Response,
    responses={
        **problems(401, 403, 404, 408, 422),
        200: {
            "content": {"text/html": {"schema": {"type": "string"}}},
            "description": "One offline HTML file.",
        },
    },
)
async def report(request: Request, campaign_id: Id, key: KeyInfo = require("train")) -> Response:
    """The campaign as one HTML file."""
    _, campaign = await asyncio.to_thread(_find, request, campaign_id, key)
    seconds = service_of(request).settings.request_s

    def write() -> bytes:  # by the command line: `serving` does not import `training`
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.html"
            done = subprocess.run(
                [sys.executable, "-m", "bioseq", "campaign", "report", str(campaign.folder), "-o", str(out)],
                capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["the report failed."])[-1]
                text = re.sub("^.*?error: ", "", said).replace(str(campaign.folder), "the campaign")
                raise Problem(422, "campaign.report", text)
            return out.read_bytes()

    async with REPORTS:
        try:
            page = await asyncio.to_thread(write)
        except subprocess.TimeoutExpired:
            raise Problem(408, "request.timeout", f"the report took longer than {seconds:g} s.") from None
    headers = {
        "Content-Disposition": 'attachment; filename="report.html"', "Content-Security-Policy": "sandbox",
    }  # fmt: skip
    return Response(page, media_type="text/html", headers=headers)

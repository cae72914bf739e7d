"""POST /v1/homologs: the homologs of one protein, aligned to it."""

from __future__ import annotations

import numpy as np
from fastapi import APIRouter, Request

from bioseq.errors import ServiceError
from bioseq.homologs.database import GAP
from bioseq.homologs.database import LETTERS as TWENTY
from bioseq.homologs.search import clean
from serving.database.keys import KeyInfo
from serving.engine.searches import SearchAsk
from serving.http.answering import charge
from serving.http.auth import require
from serving.http.routes.body import Route
from serving.http.schemas.common import Usage, problems
from serving.http.schemas.homologs import HomologRow, HomologsRequest, HomologsResponse
from serving.http.service import service_of
from serving.http.targets import find
from serving.problems import Problem

router = APIRouter(prefix="/v1", tags=["homologs"], route_class=Route)
_LETTERS = np.frombuffer((TWENTY + "X-").encode(), np.uint8)  # by code
assert len(_LETTERS) == GAP + 1


@router.post("/homologs", responses=problems(400, 401, 403, 404, 408, 413, 422, 429, 503))
async def homologs(
    request: Request, body: HomologsRequest, key: KeyInfo = require("predict")
) -> HomologsResponse:
    """The homologs of one protein in a reference set of this server, best first, aligned to it. Costs a token a residue."""
    service = service_of(request)
    name = service.settings.homologs if body.homologs == "auto" else body.homologs
    if name == "none" or not service.settings.searches:
        raise Problem(404, "homologs.not_found", "this server does not search for homologs.")
    query = clean(body.sequence, 0)
    request.scope["bioseq.hold"](len(query) * body.most)
    minute = await charge(request, key, await find(service, "default"), 1, len(query))
    ask = SearchAsk(name, (query,), timeout_s=service.settings.request_s, caller=key.id, hits=body.most)
    reply = await service.searches.find(ask)
    request.scope["bioseq.asked"]["search_ms"] = round(reply.search_s * 1000, 2)
    if reply.fault is not None:
        error = reply.fault.error()
        if isinstance(error, ServiceError) and error.status in (429, 503):  # nothing was searched
            await service.authorizer.refund(key, minute, len(query))
        raise error
    hits = reply.hits[0]
    rows = [
        HomologRow(
            id=hits.ids[i],
            identity=round(float(hits.identity[i]), 4),
            coverage=round(float(hits.coverage[i]), 4),
            e_value=float(hits.e_values[i]),
            bits=round(float(hits.bits[i]), 1),
            aligned=_LETTERS[hits.aligned[i]].tobytes().decode(),
        )
        for i in range(len(hits))
    ]
    return HomologsResponse(
        source=name,
        query=hits.query,
        number=reply.count[0],
        data=rows,
        usage=Usage(items=1, tokens=len(query)),
    )

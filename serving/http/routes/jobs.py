"""`/v1/files` and `/v1/jobs`. Everything belongs to the key that made it; another key's is not found (404).
A key with the scope `admin` sees all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse
from prometheus_client import Gauge
from starlette.responses import PlainTextResponse, StreamingResponse

from bioseq.errors import BioseqError, NotFoundError
from serving.database.keys import KeyInfo
from serving.http.auth import require
from serving.http.routes import streams
from serving.http.routes.body import Route
from serving.http.routes.files import BINARY, Id, files_of, sees
from serving.http.routes.files import router as file_router
from serving.http.schemas.common import problems
from serving.http.schemas.jobs import (
    JobInfo,
    JobList,
    JobRequest,
    Kind,
    Progress,
    ResultFile,
    ResultList,
    State,
)
from serving.http.service import Service, service_of
from serving.jobs.admission import Context, admit
from serving.jobs.campaigns import CampaignStore
from serving.jobs.files import FileStore
from serving.jobs.folder import JobFolder
from serving.jobs.loop import scheduling
from serving.jobs.store import JobStore
from serving.jobs.tables import ACTIVE, PENDING, RUNNING, STATES, SUCCEEDED, JobRow
from serving.problems import Problem
from serving.telemetry.logs import line

router = APIRouter(prefix="/v1", route_class=Route, tags=["jobs"])
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,119}")


@contextlib.asynccontextmanager
async def attach(service: Service) -> AsyncIterator[None]:
    """Runs while the application does."""
    service.extras["jobs"] = JobStore(service.database)
    service.extras["files"] = FileStore(service.database, service.settings.data)
    service.extras["campaigns"] = CampaignStore(service.database, service.settings.data)
    async with scheduling(service.settings, service.database):
        task = asyncio.create_task(_count(service))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _count(service: Service) -> None:
    """Jobs by state, for /metrics."""
    gauge = Gauge("bioseq_jobs", "Jobs.", ["state"], registry=service.metrics.registry)
    while True:
        try:
            counts = await asyncio.to_thread(service.extras["jobs"].counts)
            for state in STATES:
                gauge.labels(state).set(counts.get(state, 0))
        except BioseqError as error:
            line("jobs", state="uncounted", code=error.code)
        await asyncio.sleep(5)


def _jobs(request: Request) -> JobStore:
    return service_of(request).extras["jobs"]


def _folder(request: Request, row: JobRow) -> JobFolder:
    return JobFolder(service_of(request).settings.data, row.id)


# ------------------------------------------------------------------------------------------------------- jobs


def _job(request: Request, row: JobRow) -> JobInfo:
    at = f"/v1/jobs/{row.id}"
    progress = _folder(request, row).progress() if row.attempt else None
    return JobInfo(
        id=row.id,
        number=row.number,
        kind=row.kind,  # type: ignore[arg-type]
        name=row.name,
        state=row.state,  # type: ignore[arg-type]
        owner=row.owner,
        created=row.created,
        started=row.started,
        ended=row.ended,
        attempt=row.attempt,
        cancelling=row.cancel and row.state == RUNNING,
        waiting_before=_jobs(request).place(row) if row.state == PENDING else None,
        progress=Progress(**progress) if progress else None,
        reason=row.reason,
        register_as=row.register,
        registered=row.registered,
        spec=json.loads(row.spec),
        logs=f"{at}/logs",
        result=f"{at}/result" if row.state == SUCCEEDED else None,
    )


def _context(request: Request, key: KeyInfo) -> Context:
    service = service_of(request)
    catalogue, files = service.catalogue, files_of(request)
    catalogue.refresh()  # a head that was registered a moment ago

    return Context(
        file=lambda file_id: files.get(file_id, key.id).id,
        backbone=lambda name: catalogue.backbone(name).exact,
        head=lambda name, base: catalogue.head(name, catalogue.backbone(base)).exact,
        campaign=lambda campaign_id: service.extras["campaigns"].get(campaign_id, key.id).id,
        roots=service.settings.roots,
        max_workers=service.settings.max_job_workers,
    )


def _may_register(request: Request, key: KeyInfo, name: str) -> None:
    """A name belongs to the key whose job asked for it first; names that models have from elsewhere to admins."""
    service, jobs, admin = service_of(request), _jobs(request), key.allows("admin")
    try:
        taken = service.catalogue.any(name)
    except NotFoundError:
        taken = None
    if taken is not None and (name in taken.aliases or taken.shipped):
        raise Problem(
            422, "request.invalid", "spec.register: that is an alias or a shipped model. Choose another name.",
            field="spec.register",
        )  # fmt: skip
    theirs = taken is not None and jobs.owner_of(name, registered=True) != key.id
    if not admin and (theirs or not jobs.claim(key.id, name)):
        raise Problem(
            403,
            "auth.forbidden",
            "spec.register: that name is another's. Choose another.",
            field="spec.register",
        )
    if admin:
        jobs.claim(key.id, name, take=True)


@router.post(
    "/jobs",
    status_code=201,
    responses={
        **problems(400, 401, 403, 404, 408, 409, 413, 422, 429),
        200: {"model": JobInfo, "description": "The job that this Idempotency-Key was used for before."},
    },
)
def submit(
    request: Request,
    response: Response,
    body: JobRequest,
    idempotency_key: Annotated[
        str | None,
        Header(max_length=200, pattern=r"^[!-~]+$", description="The same key gives the same job again."),
    ] = None,
    key: KeyInfo = require("train"),
) -> JobInfo:
    """Submit a pretrain, finetune, screen or propose job. It starts when its turn comes: fair between keys, in order
    within one."""
    service = service_of(request)
    job = admit(
        body.kind,
        body.spec,
        _context(request, key),
        name=body.name,
        recipe_name=body.recipe,
        prepare=body.prepare,
    )
    if job.register is not None:
        _may_register(request, key, job.register)
    row, new = _jobs(request).submit(
        key.id, job, max_active=service.settings.max_jobs_per_key, idempotency_key=idempotency_key
    )
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/jobs/{row.id}"
    return _job(request, row)


@router.get("/jobs", responses=problems(401, 403, 422))
def list_jobs(
    request: Request,
    state: State | None = None,
    kind: Kind | None = None,
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="Numbers below this.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    all: Annotated[bool, Query(description="Of every key; needs the scope admin.")] = False,
    key: KeyInfo = require("train"),
) -> JobList:
    """This key's jobs, newest first."""
    if all and not key.allows("admin"):
        raise Problem(403, "auth.forbidden", "this needs a key with the scope 'admin'.", scope="admin")
    owner = None if all else key.id
    rows = _jobs(request).list(owner, state=state, kind=kind, before=before, limit=limit)
    return JobList(data=[_job(request, row) for row in rows])


@router.get("/jobs/{job_id}", responses=problems(401, 403, 404, 422))
def show_job(request: Request, job_id: Id, key: KeyInfo = require("train")) -> JobInfo:
    return _job(request, _jobs(request).get(job_id, sees(key)))


@router.delete("/jobs/{job_id}", responses={**problems(401, 403, 404, 409, 422)})
def cancel(
    request: Request,
    job_id: Id,
    purge: Annotated[bool, Query(description="Delete an ended job with its log and result.")] = False,
    key: KeyInfo = require("train"),
) -> JobInfo:
    """Cancel a pending or running job; an ended one is left as it is. With `purge` an ended job is deleted."""
    jobs = _jobs(request)
    row = jobs.get(job_id, sees(key))
    if not purge:
        return _job(request, jobs.cancel(job_id, sees(key)))
    if row.state in ACTIVE:
        raise Problem(409, "job.active", f"the job is {row.state}. Cancel it first, and wait for its end.")
    shown = _job(request, row)
    jobs.forget(job_id)
    _folder(request, row).remove()
    return shown


@router.get(
    "/jobs/{job_id}/logs",
    response_class=PlainTextResponse,
    responses={
        **problems(401, 403, 404, 422),
        200: {
            "content": {"text/plain": {"schema": {"type": "string"}}, "text/event-stream": {}},
            "description": "The log, or with `follow` server-sent events: lines, `progress` and `end`.",
        },
    },
)
def logs(
    request: Request,
    job_id: Id,
    follow: Annotated[bool, Query(description="As it is written, until the job ends.")] = False,
    offset: Annotated[int, Query(ge=0, le=2**53, description="From this byte on.")] = 0,
    last_event_id: Annotated[str | None, Header(description="An event's id, to go on from.")] = None,
    key: KeyInfo = require("train"),
) -> Response:
    """What the job printed."""
    jobs = _jobs(request)
    row = jobs.get(job_id, sees(key))
    folder = _folder(request, row)
    if not follow:
        return StreamingResponse(_whole_log(folder, offset), media_type="text/plain; charset=utf-8")
    if last_event_id is not None and last_event_id.isdigit() and len(last_event_id) < 16:
        offset = int(last_event_id)
    limits = request.scope["bioseq.limits"]

    def look() -> JobRow | None:
        try:
            return jobs.get(job_id)
        except Problem:
            return None  # purged meanwhile

    events = streams.follow(folder, look, offset, lambda: limits.draining)
    return EventSourceResponse(events, headers={"X-Accel-Buffering": "no"})


async def _whole_log(folder: JobFolder, offset: int) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(streams.read_log, folder, offset):
        offset += len(piece)
        yield piece


def _succeeded(request: Request, job_id: str, key: KeyInfo) -> JobRow:
    row = _jobs(request).get(job_id, sees(key))
    if row.state != SUCCEEDED:
        raise Problem(409, "job.no_result", f"the job is {row.state}: there is no result.", state=row.state)
    return row


@router.get("/jobs/{job_id}/result", responses=problems(401, 403, 404, 409))
def result(request: Request, job_id: Id, key: KeyInfo = require("train")) -> ResultList:
    """The files of a job that has succeeded."""
    row = _succeeded(request, job_id, key)
    return ResultList(
        data=[
            ResultFile(name=name, bytes=size, href=f"/v1/jobs/{job_id}/result/{name}")
            for name, size in _folder(request, row).results()
        ],
        registered=row.registered,
    )


@router.get(
    "/jobs/{job_id}/result/{name:path}",
    responses={
        **problems(401, 403, 404, 409, 416),
        200: {"content": {"application/octet-stream": BINARY}, "description": "The file."},
        206: {"content": {"application/octet-stream": BINARY}, "description": "The range asked for."},
    },
    response_class=StreamingResponse,
)
def result_file(request: Request, job_id: Id, name: str, key: KeyInfo = require("train")) -> Response:
    """One file, whole or one byte range."""
    row = _succeeded(request, job_id, key)
    path = _folder(request, row).result(name)
    if path is None:
        raise Problem(404, "result.not_found", "the job has no such file.")
    shown = path.name if _NAME.fullmatch(path.name) else "result"
    return streams.Download(path, shown)


router.routes.extend(file_router.routes)

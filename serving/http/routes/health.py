"""Liveness, readiness, metrics. Open; /metrics needs the scope `read` off loopback unless opened."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPAuthorizationCredentials
from pydantic import BaseModel
from starlette.responses import Response

from bioseq.errors import ServiceError
from serving.http.auth import _bearer, current_key
from serving.http.schemas.common import problems
from serving.http.service import service_of
from serving.problems import Problem
from serving.telemetry.metrics import CONTENT_TYPE, join

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    status: str


class Ready(BaseModel):
    status: str
    wait_seconds: float
    queued_tokens: int


@router.get("/health/live")
async def live() -> Health:
    """This process answers."""
    return Health(status="live")


@router.get("/health/ready", responses=problems(503))
async def ready(request: Request) -> Ready:
    """An engine answers and the service takes requests."""
    if request.scope["bioseq.limits"].draining:
        raise Problem(503, "service.draining", "the service is stopping.", retry_after=5)
    try:
        status = await service_of(request).link.status()
    except ServiceError as error:
        raise Problem(503, "engine.unavailable", str(error), retry_after=5) from None
    return Ready(status="ready", wait_seconds=status["wait_s"], queued_tokens=status["queued_tokens"])


async def _may_watch(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    if not service_of(request).settings.metrics_open:
        key = await current_key(request)
        if not key.allows("read"):
            raise Problem(403, "auth.forbidden", "this needs a key with the scope 'read'.", scope="read")


@router.get(
    "/metrics",
    dependencies=[Depends(_may_watch)],
    response_class=Response,
    responses={**problems(401, 403), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus text: requests, latency, queue, batches, engine utilisation; joined over all processes."""
    service = service_of(request)
    texts = await service.board.collect() if service.board is not None else {}
    texts[getattr(service.board, "process", "ingress")] = service.metrics.text()
    return Response(join(texts), media_type=CONTENT_TYPE)

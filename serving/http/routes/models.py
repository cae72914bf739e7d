"""The registry: what there is, its evidence, and for admins registering and removing."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response

from bioseq.errors import NotFoundError
from bioseq.heads import relatives
from serving.database.keys import KeyInfo
from serving.engine.catalogue import Model
from serving.http.archives import inside, unpack
from serving.http.auth import require
from serving.http.routes.body import _parse
from serving.http.schemas.common import problems
from serving.http.schemas.models import Limits, ModelDetail, ModelInfo, ModelList, RegisterRequest
from serving.http.service import Service, service_of
from serving.http.targets import find
from serving.problems import Problem, too_large

router = APIRouter(prefix="/v1", tags=["models"])
ARCHIVES = ("application/x-tar", "application/gzip", "application/zip", "application/octet-stream")


def _info(model: Model) -> dict[str, Any]:
    return {
        "id": model.exact if "/" not in model.exact else model.name,
        "name": model.name,
        "version": model.version,
        "kind": model.kind,
        "content_hash": model.content_hash,
        "weights_hash": model.weights_hash,
        "base_hash": model.base_hash,
        "base_weights_hash": model.base_weights_hash,
        "task": model.task,
        "aliases": sorted(model.aliases),
        "shipped": model.shipped,
    }


@router.get("/models", responses=problems(401, 403, 422))
async def list_models(
    request: Request,
    kind: Literal["backbone", "head"] | None = None,
    after: Annotated[str | None, Query(max_length=120, description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    key: KeyInfo = require("read"),
) -> ModelList:
    """Backbones and heads, in OpenAI's list shape, by kind, name and version."""
    models = service_of(request).catalogue.snapshot.models
    if kind is not None:
        models = tuple(m for m in models if m.kind == kind)
    start = 0
    if after is not None:
        start = next((i + 1 for i, m in enumerate(models) if _info(m)["id"] == after), 0)
        if not start:
            raise Problem(
                422, "request.invalid", "after: no such model is listed. Begin again.", field="after"
            )
    page = models[start : start + limit]
    return ModelList(data=[ModelInfo(**_info(m)) for m in page], has_more=start + limit < len(models))


@router.get("/limits", responses=problems(401, 403, 404))
async def limits(request: Request, key: KeyInfo = require("read")) -> Limits:
    """What one request may hold; clients pack by it."""
    service = service_of(request)
    s = service.settings
    target = await find(service, "default")
    return Limits(
        max_items=s.max_items,
        max_body_bytes=s.max_body_bytes,
        max_variants=s.max_variants,
        max_request_tokens=s.max_request_tokens,
        max_residues=target.shape.max_residues,
        alphabet=target.shape.alphabet.name,
        request_seconds=s.request_s,
        max_queue_seconds=s.max_queue_s,
    )


async def _any(service: Service, name: str) -> Model:
    try:
        return service.catalogue.any(name)
    except NotFoundError:
        await service.refresh()
        return service.catalogue.any(name)


@router.get("/models/{name}", responses=problems(401, 403, 404))
async def show_model(request: Request, name: str, key: KeyInfo = require("read")) -> ModelDetail:
    """One version, with its evidence."""
    service = service_of(request)
    model = await _any(service, name)

    def read() -> ModelDetail:
        m = service.catalogue.manifest(model)
        evidence = json.loads(service.catalogue.text(model, "evidence.json"))
        return ModelDetail(
            **_info(model), alphabet=m.alphabet, architecture=m.architecture, labels=m.labels, units=m.units,
            licence=m.licence, data_hash=m.data_hash, code_version=m.code_version, evidence=evidence,
        )  # fmt: skip

    return await asyncio.to_thread(read)


@router.get(
    "/models/{name}/card",
    response_class=PlainTextResponse,
    responses={
        **problems(401, 403, 404),
        200: {"content": {"text/markdown": {"schema": {"type": "string"}}}, "description": "Markdown."},
    },
)
async def card(request: Request, name: str, key: KeyInfo = require("read")) -> Response:
    """The evidence card."""
    service = service_of(request)
    model = await _any(service, name)
    text = await asyncio.to_thread(service.catalogue.text, model, "card.md")
    return PlainTextResponse(text, media_type="text/markdown")


@router.post(
    "/models",
    status_code=201,
    response_model=ModelInfo,
    responses=problems(400, 401, 403, 404, 408, 413, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/RegisterRequest"}},
                **{k: {"schema": {"type": "string", "format": "binary"}} for k in ARCHIVES},
            },
        }
    },
)
async def register(
    request: Request,
    name: Annotated[
        str | None, Query(max_length=120, description="For an archive: register under it.")
    ] = None,
    accept_weak: Annotated[bool, Query(description="For an archive.")] = False,
    key: KeyInfo = require("admin"),
) -> ModelInfo:
    """Register a bundle, from a tar or zip archive in the body or from a folder on the server; or move an
    alias. It answers under its name within seconds, without a restart."""
    service = service_of(request)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind in ARCHIVES:
        with tempfile.TemporaryDirectory(prefix="bioseq-upload-") as folder:
            archive = Path(folder) / "archive"
            await _receive(request, archive, service.settings.max_upload_bytes, service.settings.body_s)
            entry = await asyncio.to_thread(
                _register, service, archive, Path(folder) / "bundle", name, accept_weak
            )
    else:
        body = await _json(request, kind, service)
        if body.alias is not None and body.target is not None and body.path is None:
            alias, target = body.alias, body.target
            entry = await asyncio.to_thread(lambda: service.catalogue.registry.alias(alias, target))
        elif body.path is not None and body.alias is None and body.target is None:
            path = inside(body.path, service.settings.roots)
            entry = await asyncio.to_thread(
                lambda: service.catalogue.registry.register(path, body.name, body.accept_weak)
            )
        else:
            raise Problem(422, "request.invalid", "give either path, or alias and target.", field="path")
    await service.refresh()
    return ModelInfo(**_info(service.catalogue.any(entry.ref)))


def _register(service: Service, archive: Path, folder: Path, name: str | None, accept_weak: bool) -> Any:
    bundle = unpack(archive, folder, service.settings.max_upload_bytes)
    return service.catalogue.registry.register(bundle, name, accept_weak)


async def _json(request: Request, kind: str, service: Service) -> RegisterRequest:
    if kind != "application/json":
        raise Problem(
            400, "request.not_json", f"send application/json, or an archive as {', '.join(ARCHIVES)}."
        )
    parts = []
    async with asyncio.timeout(service.settings.body_s):
        async for part in request.stream():
            parts.append(part)
            if sum(map(len, parts)) > 1 << 20:
                raise too_large(1 << 20)
    try:
        return RegisterRequest.model_validate(_parse(b"".join(parts)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))[:200] or "body"
        raise Problem(422, "request.invalid", f"{field}: {first['msg']}", field=field) from None


async def _receive(request: Request, target: Path, limit: int, pause_s: float) -> None:
    """The body onto disk, without holding it; each piece must come within `pause_s`."""
    size = 0
    pieces = request.stream().__aiter__()
    with open(target, "wb") as out:
        while True:
            try:
                piece = await asyncio.wait_for(anext(pieces), pause_s)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise Problem(
                    408, "request.timeout", f"nothing came for {pause_s:g} s.", limit=pause_s
                ) from None
            except ClientDisconnect:
                raise Problem(400, "request.bad", "the upload broke off.") from None
            size += len(piece)
            if size > limit:
                raise too_large(limit)
            await asyncio.to_thread(out.write, piece)


@router.delete("/models/{name}", status_code=204, responses=problems(401, 403, 404, 422))
async def remove(request: Request, name: str, key: KeyInfo = require("admin")) -> Response:
    """Remove one version, named in full (`NAME@V`). Requests that hold it finish."""
    service = service_of(request)
    await _any(service, name)
    await asyncio.to_thread(relatives.remove, service.catalogue.registry, name)
    await service.refresh()
    return Response(status_code=204)

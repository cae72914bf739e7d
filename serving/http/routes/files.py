"""`/v1/files`: what jobs read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from serving.database.keys import KeyInfo
from serving.http.auth import require
from serving.http.routes import streams
from serving.http.routes.body import Route
from serving.http.schemas.common import problems
from serving.http.schemas.jobs import FileInfo, FileList
from serving.http.service import service_of
from serving.jobs.files import FileStore
from serving.jobs.tables import FileRow
from serving.problems import Problem

router = APIRouter(prefix="/v1", route_class=Route, tags=["jobs"])
Id = Annotated[str, Path(pattern="^[0-9a-f]{24}$")]
BINARY = {"schema": {"type": "string", "format": "binary"}}


def files_of(request: Request) -> FileStore:
    return service_of(request).extras["files"]


def sees(key: KeyInfo) -> str | None:
    """Whose things the key may see; None is everybody's."""
    return None if key.allows("admin") else key.id


def _file(row: FileRow) -> FileInfo:
    return FileInfo(
        id=row.id, name=row.name, bytes=row.bytes, sha256=row.sha256, created=row.created, expires=row.expires
    )


@router.post(
    "/files",
    status_code=201,
    response_model=FileInfo,
    responses=problems(400, 401, 403, 408, 413, 422),
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": BINARY}}},
)
async def upload(
    request: Request,
    name: Annotated[str, Query(max_length=200, description="With the ending that tells its form.")],
    sha256: Annotated[
        str | None, Query(pattern="^[0-9a-fA-F]{64}$", description="Refused if the bytes have another.")
    ] = None,
    key: KeyInfo = require("train"),
) -> FileInfo:
    """Upload a library (FASTA), a label table (CSV, TSV, Parquet) or a corpus (FASTA, or text of one sequence a
    line), plain or packed. The body is the file."""
    service = service_of(request)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/octet-stream":  # a web page of another origin cannot send this unasked
        raise Problem(400, "request.bad", "send the file itself, as application/octet-stream.")
    length = request.headers.get("content-length", "")
    s = service.settings
    row = await files_of(request).receive(
        key.id,
        name,
        _stream(request, s.body_s),
        max_bytes=s.max_file_bytes,
        max_stored=s.max_stored_bytes_per_key,
        days=s.file_days,
        sha256=sha256,
        announced=int(length) if length.isdigit() else None,
    )
    return _file(row)


async def _stream(request: Request, pause_s: float) -> AsyncIterator[bytes]:
    pieces = request.stream().__aiter__()
    while True:
        try:
            yield await asyncio.wait_for(anext(pieces), pause_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Problem(408, "request.timeout", f"nothing came for {pause_s:g} s.", limit=pause_s) from None
        except ClientDisconnect:
            raise Problem(400, "request.bad", "the upload broke off.") from None


@router.get("/files", responses=problems(401, 403))
def list_files(request: Request, key: KeyInfo = require("train")) -> FileList:
    """This key's files, newest first."""
    files = files_of(request)
    return FileList(
        data=[_file(row) for row in files.list(key.id)],
        bytes=files.used(key.id),
        limit=service_of(request).settings.max_stored_bytes_per_key,
    )


@router.get("/files/{file_id}", responses=problems(401, 403, 404))
def show_file(request: Request, file_id: Id, key: KeyInfo = require("train")) -> FileInfo:
    return _file(files_of(request).get(file_id, sees(key)))


@router.get(
    "/files/{file_id}/content",
    responses={
        **problems(401, 403, 404, 416),
        200: {"content": {"application/octet-stream": BINARY}, "description": "The file."},
        206: {"content": {"application/octet-stream": BINARY}, "description": "The range asked for."},
    },
    response_class=StreamingResponse,
)
def read_file(request: Request, file_id: Id, key: KeyInfo = require("train")) -> Response:
    """The file again, whole or one byte range."""
    files = files_of(request)
    row = files.get(file_id, sees(key))
    return streams.Download(files.path(row), row.name, f'"{row.sha256}"')


@router.delete("/files/{file_id}", status_code=204, responses=problems(401, 403, 404, 409))
def delete_file(request: Request, file_id: Id, key: KeyInfo = require("train")) -> Response:
    """Delete a file that no pending or running job names."""
    files_of(request).delete(file_id, sees(key))
    return Response(status_code=204)

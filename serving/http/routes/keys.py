"""GET, POST and DELETE /v1/keys: API keys, for callers with the scope admin."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from serving.database.keys import KeyInfo
from serving.http.auth import require
from serving.http.routes.body import Route
from serving.http.schemas.common import problems
from serving.http.schemas.keys import KeyDetail, KeyList, KeyMade, KeyRequest
from serving.http.service import service_of
from serving.problems import Problem

router = APIRouter(prefix="/v1", tags=["keys"], route_class=Route)


def _told(key: KeyInfo) -> dict[str, Any]:
    return {
        "id": key.id, "name": key.name, "scopes": sorted(key.scopes), "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute, "created": key.created, "expires": key.expires, "revoked": key.revoked,
    }  # fmt: skip


@router.get("/keys", responses=problems(401, 403))
async def list_keys(request: Request, key: KeyInfo = require("admin")) -> KeyList:
    """All keys, oldest first, without their secrets."""
    keys = service_of(request).authorizer.keys
    return KeyList(data=[KeyDetail(**_told(k)) for k in await asyncio.to_thread(keys.list)])


@router.post("/keys", status_code=201, responses=problems(400, 401, 403, 409, 422))
async def create_key(request: Request, body: KeyRequest, key: KeyInfo = require("admin")) -> KeyMade:
    """Make a key. Its text is in this answer and nowhere else. From the first key on every caller needs one, so the first
    must have the scope admin."""
    keys = service_of(request).authorizer.keys
    if "admin" not in body.scopes and not await asyncio.to_thread(keys.any):
        raise Problem(
            409, "keys.first",
            "from the first key on every caller needs one, and only an admin can make others. Give the first the scope admin.",
        )  # fmt: skip
    made, text = await asyncio.to_thread(
        lambda: keys.create(
            body.name, tuple(body.scopes), requests_per_minute=body.requests_per_minute,
            tokens_per_minute=body.tokens_per_minute, days=body.days,
        )
    )  # fmt: skip
    return KeyMade(**_told(made), key=text)


@router.delete("/keys/{key_id}", responses=problems(401, 403, 404, 409, 422))
async def revoke_key(
    request: Request,
    key_id: Annotated[str, Path(max_length=32, pattern=r"^[0-9a-f]+$")],
    key: KeyInfo = require("admin"),
) -> KeyDetail:
    """Revoke a key; it stops working within two seconds. The key that asks cannot revoke itself."""
    if key_id == key.id:
        raise Problem(409, "keys.own", "this is the key that asks. Revoke it with another admin's key.")
    keys = service_of(request).authorizer.keys
    return KeyDetail(**_told(await asyncio.to_thread(keys.revoke, key_id)))

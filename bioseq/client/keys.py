"""API keys of a service, for callers with the scope admin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from bioseq.client.exchange import Call, Connection, ask


async def create_key(
    at: Connection, name: str, scopes: Sequence[str] = ("read", "predict"), **fields: Any
) -> dict[str, Any]:
    """Make a key; its text is in `key` of this answer and nowhere else. The other fields: requests_per_minute,
    tokens_per_minute, days."""
    return await ask(at, Call("POST", "/v1/keys", {"name": name, "scopes": list(scopes), **fields}))


async def keys(at: Connection) -> list[dict[str, Any]]:
    """All keys, oldest first, without their secrets."""
    return (await ask(at, Call("GET", "/v1/keys")))["data"]


async def revoke_key(at: Connection, key_id: str) -> dict[str, Any]:
    """Raises `NotFoundError`."""
    return await ask(at, Call("DELETE", f"/v1/keys/{quote(key_id, safe='')}"))

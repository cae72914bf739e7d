"""API keys: what an admin says of one, and what is told of it. A key's text is told once, when it is made."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import Field

from serving.http.schemas.common import Answer, Wire

Scope = Literal["read", "predict", "train", "admin"]
Count = Annotated[int, Field(ge=1, le=2**62)]


class KeyRequest(Wire):
    """As `bioseq keys create`."""

    name: str = Field(min_length=1, max_length=200, description="Whose it is, for lists.")
    scopes: list[Scope] = Field(["read", "predict"], min_length=1, max_length=4)
    requests_per_minute: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    tokens_per_minute: Count | None = None
    days: Annotated[int, Field(ge=1, le=36_500)] | None = Field(None, description="Until it expires.")


class KeyDetail(Answer):
    id: str
    name: str
    scopes: list[Scope]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created: datetime.datetime
    expires: datetime.datetime | None
    revoked: datetime.datetime | None


class KeyMade(KeyDetail):
    key: str = Field(description="The key itself. It is kept nowhere: note it now.")


class KeyList(Answer):
    data: list[KeyDetail]

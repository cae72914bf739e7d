"""Jobs and files on the wire."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from serving.http.schemas.common import Answer, Wire

Kind = Literal["pretrain", "finetune", "screen", "propose"]
State = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED"]


class FileInfo(Answer):
    id: str = Field(description="Name it in a job's spec as `file:ID`.")
    name: str
    bytes: int
    sha256: str
    created: datetime.datetime
    expires: datetime.datetime = Field(description="Deleted after this, unless a job is using it.")


class FileList(Answer):
    data: list[FileInfo]
    bytes: int = Field(description="Stored by this key in all.")
    limit: int


class JobRequest(Wire):
    kind: Kind
    spec: dict[str, Any] = Field(
        description="Fields of the kind's spec, as in `bioseq KIND --spec FILE`. Inputs are `file:ID` of uploaded "
        "files; models are registry names; output, address and the like are the server's.",
        examples=[
            {"labels": "file:0123456789abcdef01234567", "targets": ["stability"], "register": "stability"}
        ],
    )
    name: Annotated[str, Field(min_length=1, max_length=200, description="Shown in lists.")] | None = None
    recipe: Annotated[str, Field(min_length=1, max_length=40)] | None = Field(
        None, description="pretrain: a recipe, which `spec` then changes."
    )
    prepare: dict[str, Any] | None = Field(
        None,
        description="pretrain: how the uploaded corpus is prepared: clusters, valid (name to file:ID), held_out, "
        "min_length, max_length, on_error.",
    )


class Progress(Answer):
    label: str
    done: float
    total: float
    unit: str
    fraction: float = Field(description="0 to 1.")


class JobInfo(Answer):
    id: str
    number: int = Field(description="Counts submissions; `before` in lists.")
    kind: Kind
    name: str
    state: State
    owner: str = Field(description="The key's id.")
    created: datetime.datetime
    started: datetime.datetime | None
    ended: datetime.datetime | None
    attempt: int = Field(description="Starts so far; more than 1 means that it was resumed.")
    cancelling: bool
    waiting_before: int | None = Field(description="Pending jobs of this key before it, while it is pending.")
    progress: Progress | None
    reason: str | None = Field(description="Why it failed or was cancelled, or what to know of its success.")
    register_as: str | None
    registered: str | None = Field(description="NAME@V of the bundle in the registry.")
    spec: dict[str, Any]
    logs: str
    result: str | None = Field(description="Once it has succeeded.")


class JobList(Answer):
    data: list[JobInfo]


class ResultFile(Answer):
    name: str
    bytes: int
    href: str


class ResultList(Answer):
    data: list[ResultFile]
    registered: str | None

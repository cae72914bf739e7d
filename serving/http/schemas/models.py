"""The registry on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.http.schemas.common import Answer, ModelName, Wire


class ModelInfo(Answer):
    """A version of a backbone or head. The first four members are OpenAI's."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "bioseq"
    name: str
    version: int
    kind: Literal["backbone", "head"]
    content_hash: str
    weights_hash: str | None = None
    base_hash: str | None = None
    base_weights_hash: str | None = None
    task: str | None = None
    aliases: list[str]
    shipped: bool


class ModelDetail(ModelInfo):
    alphabet: str
    architecture: dict[str, Any]
    labels: list[str]
    units: Any = None
    licence: str
    data_hash: str | None = None
    code_version: str
    evidence: dict[str, Any]


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelInfo]
    has_more: bool = Field(False, description="Ask again with `after` the last id of this page.")


class RegisterRequest(Wire):
    """A bundle in a folder that the server may read (see the server's `roots`), or an alias to move."""

    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="A bundle's folder on the server, inside its roots."
    )
    name: ModelName | None = Field(None, description="Register under this name; default: the bundle's own.")
    accept_weak: bool = Field(False, description="Take a head that does not beat its baselines.")
    alias: ModelName | None = Field(None, description="Move this alias ...")
    target: ModelName | None = Field(None, description="... to this NAME@V.")


class Limits(BaseModel):
    """What one request may hold."""

    model_config = ConfigDict(extra="forbid")

    max_items: int
    max_body_bytes: int
    max_variants: int
    max_request_tokens: int
    max_residues: int = Field(description="Of the default model.")
    alphabet: str
    request_seconds: float
    max_queue_seconds: float

"""What several requests share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_ITEMS = 10_000
EXAMPLES = [
    "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ",
    "MQYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE",
]

# The pattern documents protein models; what a model refuses is told by its own alphabet, with the position.
Sequence = Annotated[
    str,
    Field(
        min_length=1,
        description='Residues, upper or lower case; "<mask>" is a mask token; a final * is dropped.',
        json_schema_extra={"pattern": r"^([A-Za-z]|<mask>)+\*?$"},
    ),
]
Sequences = Annotated[
    list[Sequence],
    Field(min_length=1, max_length=MAX_ITEMS, description="Answered in this order.", examples=[EXAMPLES]),
]
ModelName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=120,
        description="A backbone's name, NAME@VERSION, or an alias; see GET /v1/models.",
        examples=["default"],
    ),
]
HeadName = Annotated[str, Field(min_length=1, max_length=120)]
LongSequences = Annotated[
    Literal["error", "window", "truncate"],
    Field(
        description="Sequences over the model's limit: refused; computed in overlapping windows and merged; or "
        "cut at the limit. What was done is told in `notes`."
    ),
]

Homologs = Annotated[
    str,
    Field(
        min_length=1,
        max_length=120,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Where relatives are searched: `auto`, `none`, `default` (the shipped reference set), or a reference "
        "set of this server.",
    ),
]
OwnHomologs = Annotated[
    str,
    Field(
        min_length=1,
        max_length=120,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="For a model that reads homologs: `auto` (its own reference set), `none`, or another reference set of "
        "this server.",
    ),
]
Alignment = Annotated[
    str | None,
    Field(
        min_length=1,
        description="The homologs of the one sequence, in place of a search: the text of an a3m, a2m, aligned FASTA or "
        "Stockholm file.",
    ),
]


class Wire(BaseModel):
    """Requests: unknown fields are refused and types are not bent."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Answer(BaseModel):
    """Responses."""

    model_config = ConfigDict(extra="forbid")


class HomologInfo(Answer):
    """What stood behind an answer. Without homologs it is the model's and a substitution matrix's alone."""

    source: str = Field(description="The reference set.")
    number: int = Field(description="Homologs found.")
    effective: float = Field(description="Effective number of homologs: near copies count once.")
    weight: float | None = Field(
        description="The model's weight beside them, 0 to 1: the mean over residues. Null for a model that reads them."
    )


def homolog_info(found: Any) -> dict[str, Any]:
    """A `HomologInfo` of the engine's summary."""
    return {
        "source": found.source,
        "number": int(found.number),
        "effective": round(float(found.effective), 3),
        "weight": None if found.weight is None else round(float(found.weight.mean()), 4),
    }


class Usage(Answer):
    items: int = Field(description="Sequences or variants.")
    tokens: int = Field(
        description="Tokens computed, special tokens, windows, adapters and the reading of an alignment included."
    )


class Problem(BaseModel):
    """An RFC 9457 problem document. `code` is stable; the other members depend on it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    index: int | None = Field(None, description="Place of the sequence at fault, from 0.")
    position: int | None = Field(None, description="Residue at fault, from 1.")


class OpenAIErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(BaseModel):
    """OpenAI's error shape."""

    error: OpenAIErrorBody


_WHEN = {
    400: "The body is not JSON.",
    401: "No key, or an unknown one.",
    403: "The key lacks the scope.",
    404: "No such model, head or version.",
    406: "The Accept header names nothing that this route answers in.",
    408: "The body was too slow, or the request took too long.",
    409: "It is in a state that does not allow this.",
    413: "Too many items, or too large a body.",
    416: "The range begins behind the end.",
    422: "A field, a sequence or a variant is invalid.",
    429: "The queue is full or the key's quota is spent; see Retry-After.",
    503: "No engine answers; see Retry-After.",
}


def problems(*statuses: int, openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for these statuses."""
    model = OpenAIError if openai else Problem
    media = "application/json" if openai else "application/problem+json"
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {s: {"description": _WHEN[s], "content": {media: {"schema": schema}}} for s in statuses}

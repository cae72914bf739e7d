"""Embeddings and logits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from serving.http.schemas.common import (
    EXAMPLES,
    Alignment,
    Answer,
    HomologInfo,
    Homologs,
    LongSequences,
    ModelName,
    OwnHomologs,
    Sequence,
    Sequences,
    Usage,
    Wire,
)


class EmbedRequest(Wire):
    """`layers`: 0 is the embedding, -1 the last layer after its norm. `dtype` is that of the answer."""

    sequences: Sequences
    model: ModelName = "default"
    pooling: Literal["mean", "max", "cls"] = Field(
        "mean", description="Over residues; cls is the first token."
    )
    layers: Annotated[list[int], Field(min_length=1, max_length=64)] = Field([-1])
    per_residue: bool = Field(False, description="One vector a residue instead of a pooled one.")
    long_sequences: LongSequences = "error"
    homologs: OwnHomologs = "auto"
    alignment: Alignment = None
    dtype: Literal["float32", "float16"] = "float32"


class EmbedItem(Answer):
    index: int
    embedding: list[Any] = Field(
        description="[D]; [layers, D] for several; per residue [L, D] or [L, layers, D]."
    )
    notes: list[str] = Field(description="What was done to the sequence on the way.")


class EmbedResponse(Answer):
    model: str = Field(description="The exact version that answered.")
    layers: list[int]
    data: list[EmbedItem]
    usage: Usage


class LogitsRequest(Wire):
    """Language-model logits of every residue; with homologs log-probabilities of model and homologs together, and
    masked residues are hidden from the search too."""

    sequences: Sequences
    model: ModelName = "default"
    long_sequences: LongSequences = "error"
    homologs: Homologs = "auto"
    alignment: Alignment = None
    dtype: Literal["float32", "float16"] = "float32"


class LogitsItem(Answer):
    index: int
    logits: list[list[float]] = Field(description="[L, V]")
    homologs: HomologInfo | None = Field(
        None, description="The homologs that were mixed in, if any were sought."
    )
    notes: list[str]


class LogitsResponse(Answer):
    model: str
    tokens: list[str] = Field(description="The V tokens, in order.")
    data: list[LogitsItem]
    usage: Usage


class OpenAIRequest(Wire):
    """OpenAI's embeddings request. Unknown fields are ignored, as clients may send newer ones."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input: Sequence | Sequences = Field(description="One sequence or several.", examples=[EXAMPLES])
    model: ModelName
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Only the model's own width is accepted.")
    user: str | None = None


class OpenAIItem(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian float32.")


class OpenAIUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class OpenAIResponse(Answer):
    object: Literal["list"]
    model: str
    data: list[OpenAIItem]
    usage: OpenAIUsage

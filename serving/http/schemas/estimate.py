"""What a request would cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serving.http.schemas.common import (
    Answer,
    HeadName,
    Homologs,
    LongSequences,
    ModelName,
    Sequences,
    Wire,
)


class EstimateRequest(Wire):
    """Give exactly one of `sequences`, `lengths`, or `records` with `mean_length`."""

    kind: Literal["embed", "predict", "score", "scan", "screen"] = "embed"
    model: ModelName = "default"
    heads: Annotated[list[HeadName], Field(max_length=64)] = Field([])
    sequences: Sequences | None = None
    lengths: (
        Annotated[list[Annotated[int, Field(ge=1, le=1_000_000)]], Field(min_length=1, max_length=100_000)]
        | None
    ) = Field(None, examples=[[120, 350, 512]])
    records: Annotated[int, Field(ge=1, le=10**12)] | None = None
    mean_length: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    variants: Annotated[int, Field(ge=1, le=1_000_000)] = Field(1, description="Of each sequence, to score.")
    per_residue: bool = False
    layers: Annotated[int, Field(ge=1, le=1000)] = Field(1, description="Number of layers, of an embedding.")
    strategy: Literal["masked-marginals", "wt-marginals", "pseudo-log-likelihood"] = "masked-marginals"
    long_sequences: LongSequences = "window"
    homologs: Homologs = "auto"


class EstimateResponse(Answer):
    model: str
    items: int
    tokens: int
    flops: float = Field(description="Floating-point operations of the forward passes.")
    seconds: float | None = Field(
        description="On one engine, at its measured speed; null before it is known."
    )
    search_seconds: float | None = Field(
        None, description="Of the search for homologs, at its measured speed; null without one."
    )
    wait_seconds: float = Field(description="What waits before it now.")
    response_bytes: int = Field(description="As Arrow or npz.")
    engine_bytes: int = Field(description="Weights and one batch's activations.")
    fits_one_request: bool

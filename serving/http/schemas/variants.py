"""Variant scores and scans."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serving.http.schemas.common import (
    EXAMPLES,
    MAX_ITEMS,
    Alignment,
    Answer,
    HomologInfo,
    Homologs,
    ModelName,
    Sequence,
    Usage,
    Wire,
)

Strategy = Annotated[
    Literal["masked-marginals", "wt-marginals", "pseudo-log-likelihood"],
    Field(description="Differences of natural log probabilities; 0 is as likely as the wild type."),
]
Long = Annotated[Literal["error", "window"], Field(description="Wild types over the model's limit.")]
Mutant = Annotated[str, Field(min_length=1, max_length=20_000)]


class ScoreRequest(Wire):
    """Variants of one wild type: `A24G`, `A24G:L50P`, or `WT`; one-based and checked against it."""

    sequence: Sequence = Field(description="The wild type.", examples=EXAMPLES[:1])
    mutants: Annotated[list[Mutant], Field(min_length=1, max_length=MAX_ITEMS, examples=[["K2A", "K2A:T3S"]])]
    model: ModelName = "default"
    strategy: Strategy = "masked-marginals"
    long_sequences: Long = "error"
    homologs: Homologs = "auto"
    alignment: Alignment = None


class ScoreResponse(Answer):
    model: str
    strategy: str
    scores: list[float] = Field(description="In the order of `mutants`.")
    homologs: HomologInfo | None = Field(
        None, description="The homologs that were mixed in, if any were sought."
    )
    notes: list[str]
    usage: Usage


class ScanRequest(Wire):
    """All single substitutions of one sequence."""

    sequence: Sequence = Field(examples=EXAMPLES[:1])
    model: ModelName = "default"
    strategy: Strategy = "masked-marginals"
    long_sequences: Long = "error"
    homologs: Homologs = "auto"
    alignment: Alignment = None


class ScanResponse(Answer):
    model: str
    strategy: str
    letters: str = Field(description="The columns of `scores`.")
    scores: list[list[float]] = Field(description="[L, letters]; the wild-type residue is 0.")
    homologs: HomologInfo | None = Field(
        None, description="The homologs that were mixed in, if any were sought."
    )
    depth: list[float] | None = Field(None, description="[L] effective number of homologs in each column.")
    weights: list[float] | None = Field(None, description="[L] the model's weight beside them.")
    notes: list[str]
    usage: Usage

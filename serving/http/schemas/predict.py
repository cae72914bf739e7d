"""Predictions of property heads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.http.schemas.common import (
    Alignment,
    Answer,
    HeadName,
    LongSequences,
    ModelName,
    OwnHomologs,
    Sequences,
    Usage,
    Wire,
)


class PredictRequest(Wire):
    """Several heads are computed in one pass. `localization@3` pins a version."""

    sequences: Sequences
    heads: Annotated[
        list[HeadName],
        Field(min_length=1, max_length=64, examples=[["localization"]], description="By name."),
    ]
    model: ModelName = "default"
    nearest: Annotated[
        int, Field(ge=0, le=100, description="Name so many nearest training examples beside each prediction.")
    ] = 0
    translate: Annotated[
        Literal["none", "one", "six"],
        Field(
            description="The sequences are coding ones, DNA or RNA: predict the protein of frame 1, whole (`one`), or each "
            "frame's longest stretch between stops (`six`). Each row then says in `coding` which bases code for it."
        ),
    ] = "none"
    genetic_code: Annotated[
        int, Field(ge=1, le=1000, description="NCBI translation table, for `translate`.")
    ] = 1
    long_sequences: LongSequences = "error"
    homologs: OwnHomologs = "auto"
    alignment: Alignment = None


class Prediction(BaseModel):
    """`value`: a number (several targets: a map), a label, a list of labels, or a string of length L.
    `interval`: [low, high] of a regression. `probabilities`: by label, or [L, C] in the order of `labels`.
    `ood`: distance to the training set, higher is further; `ood_percentile` its place among theirs.
    `nearest`: the training examples nearest to the sequence, by id, never by sequence: the best homolog with its
    `identity`, `coverage`, `label` and a `text` for people; if K were asked for, the K nearest by embedding with their
    cosine `similarity`. `homologs`: how many training examples are homologs, and their effective number."""

    model_config = ConfigDict(extra="allow")

    task: str
    value: Any
    interval: Any = None
    probabilities: Any = None
    ood: float | None = None
    ood_percentile: float | None = None
    head: str
    version: int | None = None


class CodingPlace(Answer):
    """Where a translated protein is coded, without a stop codon. Residue i is the codon that begins at base
    `first_base` + 3 (i - 1) on strand "+"; on "-" the one that begins at `last_base` - 3 (i - 1), read backwards."""

    sequence: int = Field(description="Place of the coding sequence in the request, from 0.")
    strand: Literal["+", "-"]
    first_base: int = Field(description="From 1, in the sequence as it was given.")
    last_base: int = Field(description="Inclusive; over `first_base` on both strands.")
    residues: int


class PredictItem(Answer):
    index: int = Field(
        description="Place in the answer, which is that in the request unless it was translated."
    )
    coding: CodingPlace | None = Field(None, description="With `translate` only.")
    predictions: dict[str, Prediction] = Field(description="By the head's name as asked for.")
    notes: list[str]


class PredictResponse(Answer):
    model: str
    heads: dict[str, str] = Field(description="The exact version that answered for each name.")
    data: list[PredictItem]
    usage: Usage

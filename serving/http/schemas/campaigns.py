"""Campaigns: what a client says of one, and what it is told."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from serving.http.schemas.common import Answer, Homologs, ModelName, Sequence, Wire

Position = Annotated[int, Field(ge=1, le=100_000)]
Residues = Annotated[str, Field(pattern="^[A-Za-z]{1,20}$")]


class CampaignRequest(Wire):
    """As `bioseq campaign create`. The space is `candidates`, or all combinations at `sites`, or up to `mutations`
    mutations, at `sites` or anywhere."""

    wild_type: Sequence
    objectives: Annotated[list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=20)] = (
        Field(description="COLUMN, COLUMN:max, COLUMN:min, COLUMN:>=X or COLUMN:<=X.", examples=[["fitness"]])
    )
    name: str = Field("campaign", min_length=1, max_length=200, description="Shown in lists.")
    sites: list[Position] = Field([], max_length=10_000)
    mutations: Annotated[int, Field(ge=1, le=1000)] | None = None
    candidates: Annotated[str, Field(pattern="^file:[0-9a-f]{24}$")] | None = Field(
        None, description="An uploaded CSV file with a column variant, mutant or sequence."
    )
    allowed: dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,5}$")], Residues] = Field(
        {}, max_length=10_000, description="Residues by position."
    )
    forbidden: list[Position] = Field([], max_length=10_000, description="Positions that stay.")
    batch: Annotated[int, Field(ge=1)] = 96
    plate: Literal[96, 384] = 96
    controls: Annotated[int, Field(ge=0)] = 4
    budget: Annotated[int, Field(ge=0, le=2**31)] = Field(0, description="Wells in all; 0 is no limit.")
    seed: Annotated[int, Field(ge=0, le=2**63)] = 0
    model: ModelName = Field("default", description="Of the zero-shot score; none for no prior.")
    homologs: Homologs = "auto"


class CampaignEntry(Answer):
    id: str
    name: str
    owner: str
    created: datetime.datetime


class CampaignInfo(CampaignEntry):
    settings: dict[str, Any] = Field(description="As they were frozen.")
    rounds: int
    space: int = Field(description="Variants.")
    wells: dict[str, int] = Field(description="By the last event.")
    best: dict[str, Any] = Field(description="Variant and value by objective.")


class CampaignList(Answer):
    data: list[CampaignEntry]


class Ingested(Answer):
    """Wells."""

    measured: int
    failed: int
    unproposed: int


class MarkRequest(Wire):
    event: Literal["ordered", "abandoned", "excluded"]
    which: list[Annotated[str, Field(min_length=1, max_length=20_000)]] = Field(
        [], max_length=10_000, description="Wells as 2/B7, or variants; none with ordered is all under way."
    )


class Marked(Answer):
    wells: int

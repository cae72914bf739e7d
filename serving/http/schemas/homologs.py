"""Homologs of a protein and how they align to it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.http.schemas.common import Answer, Homologs, Sequence, Usage, Wire

MOST = 500  # rows of one answer


class HomologsRequest(Wire):
    """The homologs of one protein in a reference set, best first, each on the protein's own columns."""

    sequence: Sequence
    homologs: Homologs = "auto"
    most: Annotated[int, Field(ge=1, le=MOST)] = 50


class HomologRow(Answer):
    id: str
    identity: float = Field(description="Equal residues among the aligned ones.")
    coverage: float = Field(description="Aligned residues over the protein's length.")
    e_value: float
    bits: float
    aligned: str = Field(
        description="The residue on each column of the protein; - where there is none. Insertions are left out."
    )


class HomologsResponse(Answer):
    source: str = Field(description="The reference set.")
    query: str = Field(description="The protein as it was searched.")
    number: int = Field(description="Homologs found; `data` has the best of them.")
    data: list[HomologRow]
    usage: Usage

"""Coding sequences in a request: translated before anything else, so that the rest of the walk sees proteins, with the
bases that code for each in the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bioseq.errors import EmptySequenceError, SequenceError
from bioseq.sequences.fasta import Record
from bioseq.sequences.translation import check_code, coded
from serving.http.service import Service
from serving.problems import too_many_items

_CHARACTERS = 64  # reading and translating so many, in six frames too, takes less than computing a token


@dataclass
class Coding:
    """Proteins in the order of their coding sequences, and of each: the coding sequence's index, strand, bases."""

    proteins: list[str] = field(default_factory=list)
    places: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0  # what the reading costs

    def blamed(self, error: SequenceError) -> SequenceError:
        """An error of a protein, told of its coding sequence."""
        if error.index is None:
            return error
        place = self.places[error.index]
        return type(error)(
            f"the protein on bases {place['first_base']} to {place['last_base']} ({place['strand']}): {error.bare}",
            index=place["sequence"],
            position=error.position,
            hint=error.hint,
        )


async def translate(service: Service, sequences: Sequence[str], mode: str, code: int) -> Coding:
    """Raises `Problem` 413 for too many, `SpecError` for an unknown code, and `SequenceError` with the index of the first
    sequence that cannot be translated."""
    if len(sequences) > service.settings.max_items:
        raise too_many_items(len(sequences), service.settings.max_items)
    check_code(code)
    return await asyncio.to_thread(_translate, sequences, mode, code)


def _translate(sequences: Sequence[str], mode: str, code: int) -> Coding:
    made = Coding(tokens=sum(map(len, sequences)) // _CHARACTERS)
    for index, sequence in enumerate(sequences):
        for protein in coded(Record("", sequence), mode, code):
            if isinstance(protein, SequenceError):
                raise protein.at(index=index)
            made.proteins.append(protein.sequence)
            made.places.append(
                {
                    "sequence": index,
                    "strand": protein.strand,
                    "first_base": protein.first,
                    "last_base": protein.last,
                    "residues": len(protein.sequence),
                }
            )
    if not made.proteins:
        raise EmptySequenceError("no reading frame has a codon but stops.", index=0)
    return made

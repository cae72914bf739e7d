"""DNA libraries: from nucleotides to the proteins that are screened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from bioseq.errors import EmptySequenceError, IllegalResidueError, SequenceError, SpecError
from bioseq.sequences.alphabet import dna
from bioseq.sequences.fasta import Record

_LETTERS = len(dna().letters)  # ids of the DNA alphabet that may stand in a codon, one after the other


class Product(NamedTuple):
    """What one reading frame of a record gives. `start` is how many bases of its strand come before the protein's."""

    suffix: str
    protein: str | SequenceError
    notes: tuple[str, ...] = ()
    start: int = 0


@dataclass(frozen=True, slots=True)
class Coded(Record):
    """A protein and where it is coded: one-based, inclusive bases of the record as it was given, `first` < `last` on both
    strands, without a stop codon. Residue i is the codon from first + 3 (i - 1) on "+", to last - 3 (i - 1) on "-"."""

    strand: str = "+"
    first: int = 0
    last: int = 0


def check_code(code: int) -> None:
    """Raise `SpecError` unless NCBI has a genetic code of this number."""
    from Bio.Data.CodonTable import unambiguous_dna_by_id

    if code not in unambiguous_dna_by_id:
        known = ", ".join(map(str, sorted(unambiguous_dna_by_id)))
        raise SpecError(f"NCBI has no genetic code {code}.", field="genetic_code", hint=f"One of {known}.")


def coded(record: Record, mode: str, code: int) -> Iterator[Coded | SequenceError]:
    """The proteins of a DNA record by `products`, with coordinates; a frame of stops alone gives none."""
    length = len(record.sequence.removesuffix("*"))  # which encoding drops
    for suffix, protein, _, start in products(record.sequence, mode, code):
        if isinstance(protein, SequenceError):
            yield protein.at(record=record.id, source=record.source)
            if mode == "six":  # all frames share the fault
                return
            continue
        protein = protein.removesuffix("*")
        if not protein and mode == "six":
            continue
        strand, end = suffix[1:2] or "+", start + 3 * len(protein)
        first, last = (start + 1, end) if strand == "+" else (length - end + 1, length - start)
        yield Coded(record.id + suffix, protein, record.source, record.description, strand, first, last)


def translated(
    sequence: str, mode: str, code: int
) -> Iterator[tuple[str, str | SequenceError, tuple[str, ...]]]:
    """(suffix of the id, protein or what is wrong, notes) of each of a record's `products`; `none` passes it on."""
    if mode == "none":
        yield "", sequence, ()
        return
    for suffix, protein, notes, _ in products(sequence, mode, code):
        yield suffix, protein, notes


def products(sequence: str, mode: str, code: int) -> Iterator[Product]:
    """What the reading frames of a record give.

    `one` translates frame 1 whole: a stop at the end is dropped, one inside is
    an error later, in the protein alphabet. `six` gives each of the six frames' longest stretch between
    stops, as ID/+1 to ID/+3 and ID/-1 to ID/-3; the first of equally long ones. `code` is an NCBI genetic
    code. U reads as T, an ambiguous codon as X, and one or two bases at the end are left out.
    """
    text = sequence.upper().replace("U", "T")
    fault: SequenceError | None = None
    ids = np.zeros(0, np.uint8)
    try:
        ids = dna().encode(text).ids
    except SequenceError as error:
        fault = error
    if fault is None and len(ids) < 3:
        fault = EmptySequenceError("fewer than three nucleotides, so no codon to translate.")
    if mode == "one":
        if fault is not None:
            yield Product("", fault)
            return
        protein = _translated(ids, code)
        left = len(ids) % 3
        notes = (f"translated from {len(ids)} nucleotides, genetic code {code}",)
        inside = protein[:-1].find("*")
        if inside >= 0:
            yield Product("", _stop(inside))
        else:
            yield Product("", protein, notes + ((f"{left} nucleotides at the end left out",) if left else ()))
        return
    for strand in "+-":
        template = ids if strand == "+" or fault is not None else dna().reverse_complement(ids)
        for frame in range(3):
            suffix = f"/{strand}{frame + 1}"
            if fault is not None:
                yield Product(suffix, fault)
                continue
            stretches = _translated(template[frame:], code).split("*")
            best = max(stretches, key=len)
            before = sum(len(s) + 1 for s in stretches[: stretches.index(best)])
            start = frame + 3 * before
            note = f"frame {strand}{frame + 1} from nucleotide {start + 1}, genetic code {code}"
            yield Product(suffix, best, (note,), start)


def _translated(ids: np.ndarray, code: int) -> str:
    """Ids of the DNA alphabet from their first codon on; one or two at the end are left out."""
    codons = ids[: len(ids) // 3 * 3].reshape(-1, 3).astype(np.int64) - dna().id("A")
    return _codons(code)[codons @ (_LETTERS**2, _LETTERS, 1)].tobytes().decode("ascii")


@cache
def _codons(code: int) -> np.ndarray:
    """The amino acid of each codon, ambiguous ones too, as Biopython has it: ASCII, uint8 [15 ** 3]."""
    from Bio.Seq import Seq

    every = "".join(map("".join, product(dna().letters, repeat=3)))
    return np.frombuffer(str(Seq(every).translate(table=code)).encode("ascii"), dtype=np.uint8)


def _stop(place: int) -> IllegalResidueError:
    return IllegalResidueError(
        f"a stop codon inside frame 1, at codon {place + 1}.",
        position=place + 1,
        hint="Translate six frames, or cut the sequence.",
    )

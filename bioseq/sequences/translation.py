"""DNA libraries: from nucleotides to the proteins that are screened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bioseq.errors import EmptySequenceError, IllegalResidueError, SequenceError
from bioseq.sequences.alphabet import dna
from bioseq.sequences.fasta import Record


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


def coded(record: Record, mode: str, code: int) -> Iterator[Coded | SequenceError]:
    """The proteins of a DNA record by `products`, with coordinates; a frame of stops alone gives none."""
    length = len(record.sequence)
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
    for product in products(sequence, mode, code):
        yield product[:3]


def products(sequence: str, mode: str, code: int) -> Iterator[Product]:
    """What the reading frames of a record give.

    `one` translates frame 1 whole: a stop at the end is dropped, one inside is
    an error later, in the protein alphabet. `six` gives each of the six frames' longest stretch between
    stops, as ID/+1 to ID/+3 and ID/-1 to ID/-3; the first of equally long ones. `code` is an NCBI genetic
    code. U reads as T, an ambiguous codon as X, and one or two bases at the end are left out.
    """
    from Bio.Seq import Seq

    text = sequence.upper().replace("U", "T")
    fault: SequenceError | None = None
    try:
        dna().encode(text)
    except SequenceError as error:
        fault = error
    if fault is None and len(text) < 3:
        fault = EmptySequenceError("fewer than three nucleotides, so no codon to translate.")
    if mode == "one":
        if fault is not None:
            yield Product("", fault)
            return
        protein = str(Seq(text[: len(text) // 3 * 3]).translate(table=code))
        left = len(text) % 3
        notes = (f"translated from {len(text)} nucleotides, genetic code {code}",)
        inside = protein[:-1].find("*")
        if inside >= 0:
            yield Product("", _stop(inside))
        else:
            yield Product("", protein, notes + ((f"{left} nucleotides at the end left out",) if left else ()))
        return
    for strand in "+-":
        template = text if strand == "+" or fault is not None else str(Seq(text).reverse_complement())
        for frame in range(3):
            suffix = f"/{strand}{frame + 1}"
            if fault is not None:
                yield Product(suffix, fault)
                continue
            end = frame + (len(template) - frame) // 3 * 3
            stretches = (
                str(Seq(template[frame:end]).translate(table=code)).split("*") if end > frame else [""]
            )
            best = max(stretches, key=len)
            before = sum(len(s) + 1 for s in stretches[: stretches.index(best)])
            start = frame + 3 * before
            note = f"frame {strand}{frame + 1} from nucleotide {start + 1}, genetic code {code}"
            yield Product(suffix, best, (note,), start)


def _stop(place: int) -> IllegalResidueError:
    return IllegalResidueError(
        f"a stop codon inside frame 1, at codon {place + 1}.",
        position=place + 1,
        hint="Translate six frames, or cut the sequence.",
    )

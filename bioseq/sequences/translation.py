"""DNA libraries: from nucleotides to the proteins that are screened."""

from __future__ import annotations

from collections.abc import Iterator

from bioseq.errors import EmptySequenceError, IllegalResidueError, SequenceError
from bioseq.sequences.alphabet import dna


def translated(
    sequence: str, mode: str, code: int
) -> Iterator[tuple[str, str | SequenceError, tuple[str, ...]]]:
    """(suffix of the id, protein or what is wrong, notes) of each product of one record.

    `none` passes the sequence on. `one` translates frame 1 whole: a stop at the end is dropped, one inside is
    an error later, in the protein alphabet. `six` gives each of the six frames' longest stretch between
    stops, as ID/+1 to ID/+3 and ID/-1 to ID/-3; the first of equally long ones. `code` is an NCBI genetic
    code. U reads as T, an ambiguous codon as X, and one or two bases at the end are left out.
    """
    if mode == "none":
        yield "", sequence, ()
        return
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
            yield "", fault, ()
            return
        protein = str(Seq(text[: len(text) // 3 * 3]).translate(table=code))
        left = len(text) % 3
        notes = (f"translated from {len(text)} nucleotides, genetic code {code}",)
        inside = protein[:-1].find("*")
        if inside >= 0:
            yield "", _stop(inside), ()
        else:
            yield "", protein, notes + ((f"{left} nucleotides at the end left out",) if left else ())
        return
    for strand in "+-":
        template = text if strand == "+" or fault is not None else str(Seq(text).reverse_complement())
        for frame in range(3):
            suffix = f"/{strand}{frame + 1}"
            if fault is not None:
                yield suffix, fault, ()
                continue
            end = frame + (len(template) - frame) // 3 * 3
            stretches = (
                str(Seq(template[frame:end]).translate(table=code)).split("*") if end > frame else [""]
            )
            best = max(stretches, key=len)
            before = sum(len(s) + 1 for s in stretches[: stretches.index(best)])
            start = frame + 3 * before + 1
            yield suffix, best, (f"frame {strand}{frame + 1} from nucleotide {start}, genetic code {code}",)


def _stop(place: int) -> IllegalResidueError:
    return IllegalResidueError(
        f"a stop codon inside frame 1, at codon {place + 1}.",
        position=place + 1,
        hint="Translate six frames, or cut the sequence.",
    )

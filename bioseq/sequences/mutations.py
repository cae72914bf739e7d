"""Mutation notation: `A24G` is alanine 24 to glycine, one-based; `A24G:L50P` is both; `WT` the wild type itself.

Every mutation is checked against the wild type. Only substitutions by standard residues are known; `A24A` is
allowed and changes nothing. Messages name positions and single residues, never a sequence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from bioseq.errors import MutationError
from bioseq.sequences.alphabet import Alphabet, protein

WILD_TYPE = "WT"
_NOTATION = re.compile(r"([A-Za-z])([0-9]{1,9})([A-Za-z])")


@dataclass(frozen=True, slots=True)
class Mutation:
    """One substitution; `position` is one-based."""

    wild_type: str
    position: int
    mutant: str

    def __str__(self) -> str:
        return f"{self.wild_type}{self.position}{self.mutant}"


@dataclass(frozen=True, slots=True)
class Variant:
    """Substitutions by ascending position; none is the wild type."""

    mutations: tuple[Mutation, ...] = ()

    def __str__(self) -> str:
        return ":".join(map(str, self.mutations)) or WILD_TYPE

    @property
    def changes(self) -> tuple[Mutation, ...]:
        """The mutations that change the residue."""
        return tuple(m for m in self.mutations if m.mutant != m.wild_type)


def parse(
    text: str | Variant, wild_type: str, *, alphabet: Alphabet | None = None, index: int | None = None
) -> Variant:
    """Read `A24G:L50P` against a wild type; case is folded. A `Variant` is checked alike: it may have been made for
    another wild type.

    Raises `MutationError` for other notation, a position outside the wild type or given twice, a mutant letter
    that is not one of the alphabet's standard residues, and a wild-type letter that contradicts the sequence
    (naming the position, what stands there and what was claimed). `index` is the variant's place in the
    caller's list, for the message.
    """
    alphabet = alphabet or protein()
    letters = letters_of(wild_type)
    where = "" if index is None else f"variant {index + 1}: "
    if isinstance(text, Variant):
        given = text.mutations
    elif text.strip().upper() == WILD_TYPE:
        given = ()
    else:
        given = tuple(_read(piece.strip(), where) for piece in text.strip().split(":"))
    mutations: dict[int, Mutation] = {}
    for m in given:
        if not 1 <= m.position <= len(letters):
            raise MutationError(
                f"{where}{m}: position {m.position} is outside the wild type of {len(letters)} residues.",
                hint="Positions begin at 1.",
            )
        there = letters[m.position - 1]
        if there != m.wild_type:
            raise MutationError(
                f"{where}{m}: the wild type has {there} at position {m.position}, not {m.wild_type}.",
                hint="Check the numbering (one-based, a leading M counts) and that this is the right wild type.",
            )
        if m.mutant not in alphabet.standard:
            raise MutationError(
                f"{where}{m}: {m.mutant} is not a standard residue.",
                hint=f"Mutants may be {alphabet.standard}.",
            )
        if m.position in mutations:
            raise MutationError(
                f"{where}position {m.position} is given twice.",
                hint="Give each position once in a variant.",
            )
        mutations[m.position] = m
    return Variant(tuple(mutations[p] for p in sorted(mutations)))


@lru_cache(maxsize=1 << 14)  # a million variants are made of a few thousand substitutions
def _read(piece: str, where: str) -> Mutation:
    match = _NOTATION.fullmatch(piece)
    if match is None:
        # Only what cannot be a sequence is shown again: sequences are confidential.
        digits = any(c.isdigit() for c in piece)
        shown = repr(piece) if len(piece) <= 12 and digits else f"{len(piece)} characters"
        raise MutationError(
            f"{where}{shown} is not a substitution.",
            hint="Write wild-type residue, one-based position, new residue: A24G, or A24G:L50P; WT for none.",
        )
    return Mutation(match[1].upper(), int(match[2]), match[3].upper())


def apply(wild_type: str, variant: Variant) -> str:
    """The variant's sequence, upper case."""
    letters = list(letters_of(wild_type))
    for m in variant.mutations:
        letters[m.position - 1] = m.mutant
    return "".join(letters)


def between(
    wild_type: str, sequence: str, *, alphabet: Alphabet | None = None, index: int | None = None
) -> Variant:
    """The variant that turns one sequence into another of the same length. Raises `MutationError`."""
    old, new = letters_of(wild_type), letters_of(sequence)
    where = "" if index is None else f"variant {index + 1}: "
    if len(old) != len(new):
        raise MutationError(
            f"{where}{len(new)} residues, but the wild type has {len(old)}.",
            hint="Insertions and deletions cannot be scored; give substitutions.",
        )
    text = ":".join(f"{a}{i}{b}" for i, (a, b) in enumerate(zip(old, new), 1) if a != b)
    return parse(text or WILD_TYPE, wild_type, alphabet=alphabet, index=index)


def letters_of(sequence: str) -> str:
    """The residues as they are numbered: upper case, without a stop at the end."""
    return sequence.strip().upper().removesuffix("*")


def singles(sequence: str, alphabet: Alphabet | None = None) -> list[Variant]:
    """All single substitutions by standard residues, by position and then in the order of `standard`."""
    alphabet = alphabet or protein()
    return [
        Variant((Mutation(old, at, new),))
        for at, old in enumerate(letters_of(sequence), 1)
        for new in alphabet.standard
        if new != old
    ]

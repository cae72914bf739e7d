"""The variants that a campaign may propose: combinations at sites, up to K mutations, or a file of candidates.

Variants are rows of codes uint8 [N, S]: the residue (place in LETTERS) at each of the space's S sites.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bioseq.errors import InputError, MutationError, TableError
from bioseq.homologs.database import LETTERS
from bioseq.sequences.mutations import Mutation, Variant, between, parse

CODE = {letter: i for i, letter in enumerate(LETTERS)}
ENUMERATED = 400_000  # spaces up to this size are looked through whole, larger ones by a sample


@dataclass
class Space:
    """`sites` are zero-based; `allowed` has the codes at each site, wild type included. `listed` are the candidates of a
    file, uint8 [N, S]; otherwise all combinations of at most `most` mutations belong to the space."""

    wild_type: str
    sites: list[int]
    allowed: list[list[int]]
    most: int
    listed: np.ndarray | None = None
    _keys: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.wild = np.array([CODE.get(self.wild_type[s], 255) for s in self.sites], np.uint8)
        if self.listed is not None:
            self._keys = {row.tobytes() for row in self.listed}
        if self.size < 1:
            raise InputError(
                "the space is empty: no variant is left after the constraints.",
                code="campaign.empty_space",
                hint="Allow more residues or sites.",
            )

    @property
    def size(self) -> int:
        """Variants other than the wild type."""
        if self.listed is not None:
            return len(self.listed) - (self.wild.tobytes() in self._keys)
        choices = [len(codes) - 1 for codes in self.allowed]
        ways = [1] + [0] * self.most
        for n in choices:
            for k in range(self.most, 0, -1):
                ways[k] += ways[k - 1] * n
        return sum(ways) - 1

    def read(self, text: str) -> Variant:
        """Mutation notation, or the letters at the sites. Raises `MutationError`."""
        letters = text.strip().upper()
        if letters != "WT" and letters.isalpha() and len(letters) == len(self.sites):
            wild = [self.wild_type[s] for s in self.sites]
            letters = (
                ":".join(f"{w}{s + 1}{m}" for w, s, m in zip(wild, self.sites, letters) if w != m) or "WT"
            )
        return Variant(parse(letters, self.wild_type).changes)

    def encode(self, variants: Sequence[Variant]) -> np.ndarray:
        """uint8 [N, S]; raises `MutationError` for a mutation at another site."""
        place = {s: i for i, s in enumerate(self.sites)}
        codes = np.tile(self.wild, (len(variants), 1))
        for row, variant in zip(codes, variants, strict=True):
            for m in variant.changes:
                if m.position - 1 not in place:
                    raise MutationError(
                        f"{variant}: position {m.position} is outside the campaign's space.",
                        hint="Use the campaign's sites.",
                    )
                row[place[m.position - 1]] = CODE[m.mutant]
        return codes

    def decode(self, row: np.ndarray) -> Variant:
        return Variant(
            tuple(
                Mutation(self.wild_type[s], s + 1, LETTERS[c])
                for s, c, w in zip(self.sites, row.tolist(), self.wild.tolist(), strict=True)
                if c != w
            )
        )

    def holds(self, variant: Variant) -> bool:
        """Whether the variant is the wild type or one of the space."""
        if not variant.changes:
            return True
        try:
            row = self.encode([variant])[0]
        except MutationError:
            return False
        if self.listed is not None:
            return row.tobytes() in self._keys
        inside = all(c in codes for c, codes in zip(row.tolist(), self.allowed, strict=True))
        return inside and len(variant.changes) <= self.most

    def pool(self, rng: np.random.Generator, parents: np.ndarray) -> np.ndarray:
        """The candidates to choose from: all of them, or of a large space a random sample, all single mutants, and
        recombined and mutated `parents` (the best measured variants, uint8 [P, S])."""
        if self.listed is not None:
            return self.listed[(self.listed != self.wild).any(1)]
        if self.size <= ENUMERATED:
            return self._all()
        found = [self._near(row) for row in (self.wild, *parents[:50])]
        found.append(self._scatter(rng, np.tile(self.wild, (50_000, 1)), self.most))
        if len(parents):
            one, two = (parents[rng.integers(len(parents), size=50_000)] for _ in range(2))
            child = np.where(rng.random(one.shape) < 0.5, one, two)
            found.append(self._scatter(rng, child, 2))
        rows = np.unique(np.concatenate(found), axis=0)
        count = (rows != self.wild).sum(1)
        return rows[(count > 0) & (count <= self.most)]

    def _all(self) -> np.ndarray:
        """All combinations of one to `most` mutations, in the order of their codes."""
        by_count = [[self.wild[None]]] + [[] for _ in range(self.most)]
        for s, codes in enumerate(self.allowed):
            other = np.array([c for c in codes if c != self.wild[s]], np.uint8)
            for count in range(self.most, 0, -1):
                if by_count[count - 1] and len(other):
                    before = np.concatenate(by_count[count - 1])
                    rows = np.repeat(before, len(other), axis=0)
                    rows[:, s] = np.tile(other, len(before))
                    by_count[count].append(rows)
        return np.unique(np.concatenate([np.concatenate(rows) for rows in by_count[1:] if rows]), axis=0)

    def _near(self, row: np.ndarray) -> np.ndarray:
        """The row with each allowed residue at each site."""
        at = np.repeat(np.arange(len(self.sites)), [len(codes) for codes in self.allowed])
        out = np.tile(row, (len(at), 1))
        out[np.arange(len(at)), at] = np.concatenate(self.allowed)
        return out

    def _scatter(self, rng: np.random.Generator, rows: np.ndarray, most: int) -> np.ndarray:
        """The rows with one to `most` random sites drawn anew."""
        rows = rows.copy()
        at = np.arange(len(rows))
        counts = np.array([len(codes) for codes in self.allowed])
        table = np.zeros((len(self.sites), 20), np.uint8)
        for i, codes in enumerate(self.allowed):
            table[i, : len(codes)] = codes
        for k in range(most):
            on = rng.random(len(rows)) < (1.0 if k == 0 else 0.6)
            site = rng.integers(len(self.sites), size=len(rows))
            new = table[site, (rng.random(len(rows)) * counts[site]).astype(int)]
            rows[at[on], site[on]] = new[on]
        return rows


def combinations(
    wild_type: str,
    sites: Sequence[int],
    most: int | None,
    allowed: dict[int, str],
    forbidden: Iterable[int] = (),
) -> Space:
    """All combinations at one-based `sites` (empty: everywhere), with the residues that `allowed` gives by position."""
    places = list(sites) or list(range(1, len(wild_type) + 1))
    for position in (*places, *allowed, *forbidden):
        if not 1 <= position <= len(wild_type):
            raise MutationError(
                f"site {position} is outside the wild type of {len(wild_type)} residues.",
                hint="Positions begin at 1.",
            )
    if len(set(places)) < len(places):
        raise InputError("a site is given twice.", code="campaign.sites", hint="Give each site once.")
    places = sorted(p for p in places if p not in set(forbidden))
    codes = []
    for position in places:
        letters = set(allowed.get(position, LETTERS)) | {wild_type[position - 1]}
        if bad := letters - set(LETTERS):
            raise InputError(
                f"site {position}: {', '.join(sorted(bad))} is not a standard residue.",
                code="campaign.sites",
                hint=f"Use {LETTERS}.",
            )
        codes.append(sorted(CODE[x] for x in letters))
    return Space(wild_type, [p - 1 for p in places], codes, min(most or len(places), len(places)))


def read_variant(cell: str, wild_type: str) -> Variant:
    """Mutation notation (`:` or `/` between mutations), or a whole sequence."""
    cell = cell.strip()
    if len(cell) == len(wild_type) and cell.isalpha():
        return between(wild_type, cell)
    return Variant(parse(cell.replace("/", ":"), wild_type).changes)


def read_variants(wild_type: str, path: Path, *needed: str) -> Iterator[tuple[int, Variant, dict[str, str]]]:
    """(line, variant, row) of a CSV file with a column `variant`, `mutant` or `sequence` and those `needed`. Raises
    `TableError` with the line."""
    with open(path, newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        names = reader.fieldnames or []
        column = next((c for c in ("variant", "mutant", "sequence") if c in names), None)
        absent = [c for c in needed if c not in names]
        if column is None:
            raise TableError(
                f"{path}: line 1: there is no column 'variant'.", hint="Add one: A24G or A24G:L50P."
            )
        if absent:
            raise TableError(
                f"{path}: line 1: there is no column {absent[0]!r}.", hint=f"It has: {', '.join(names)}."
            )
        for row in reader:
            try:
                variant = read_variant(row[column] or "", wild_type)
            except MutationError as error:
                raise TableError(
                    f"{path}: line {reader.line_num}, column {column!r}: {error.message}", hint=error.hint
                ) from None
            yield reader.line_num, variant, row


def candidates(wild_type: str, path: Path) -> Space:
    """The variants of a CSV file (`read_variants`)."""
    return listed(wild_type, list(dict.fromkeys(v for _, v, _ in read_variants(wild_type, path))))


def listed(wild_type: str, variants: Sequence[Variant]) -> Space:
    sites = sorted({m.position - 1 for v in variants for m in v.changes})
    space = Space(wild_type, sites, [list(range(20))] * len(sites), len(sites))
    # np.unique by rows takes ten times as long on 10^6 of 200 sites; the order is the same
    rows = sorted({row.tobytes() for row in space.encode(variants)})
    codes = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), len(sites))
    return Space(wild_type, sites, space.allowed, len(sites), codes)

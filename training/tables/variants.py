"""Tables of variants of one protein: whether a table is one, and where its sequences differ from the wild type.

A table is one if a wild type is given, or if all sequences have one length and at least 80 % of them differ from the
consensus in at most a quarter of the positions (or two). Equal lengths alone do not make one: a library of unrelated
9-mers has no wild type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bioseq.errors import TableError
from training.tables.labels import TEST, Labels

MOST, NEAR = 0.8, 0.25
APART = 0.1  # share of test rows that may break what a split keeps apart


@dataclass(frozen=True)
class Variants:
    """`differs` bool [N, L] where a sequence differs from `wild_type`; `note` says what was taken and why."""

    wild_type: str
    differs: np.ndarray
    note: str

    @cached_property
    def order(self) -> np.ndarray:
        """Substitutions of each row, int [N]."""
        return self.differs.sum(1)

    @property
    def sites(self) -> list[int]:
        """Zero-based positions that vary."""
        return np.flatnonzero(self.differs.any(0)).tolist()

    @cached_property
    def site_sets(self) -> np.ndarray:
        """Number of each row's set of mutated positions, int [N]: rows that mutate the same positions share it."""
        return np.unique(self.differs, axis=0, return_inverse=True)[1].ravel()

    @property
    def first_sites(self) -> np.ndarray:
        """Each row's first mutated position, int [N]; -1 for the wild type."""
        return np.where(self.differs.any(1), self.differs.argmax(1), -1)

    @property
    def singles_only(self) -> bool:
        """At least 95 % of the rows have at most one substitution."""
        return bool((self.order <= 1).mean() >= 0.95)


def differences(sequences: Sequence[str], wild_type: str) -> np.ndarray:
    """bool [N, L]. Raises `TableError` naming rows of another length."""
    bad = [i for i, s in enumerate(sequences, 1) if len(s) != len(wild_type)]
    if bad:
        raise TableError(f"not the wild type's length of {len(wild_type)} residues", rows=bad)
    table = np.frombuffer("".join(sequences).encode(), np.uint8).reshape(len(sequences), -1)
    return table != np.frombuffer(wild_type.encode(), np.uint8)


def consensus(sequences: Sequence[str]) -> str | None:
    """The commonest residue at each place, if all sequences have one length."""
    if len({len(s) for s in sequences}) != 1:
        return None
    table = np.frombuffer("".join(sequences).encode(), np.uint8).reshape(len(sequences), -1)
    return "".join(chr(int(np.bincount(column).argmax())) for column in table.T)


def find_variants(labels: Labels) -> Variants | None:
    """The table as variants of one protein, or None. The consensus is that of the rows outside the file's test part,
    so that no test row has a say in it. Raises `TableError` if a wild type was given that does not fit."""
    if labels.task == "per_residue":
        return None
    if labels.wild_type:
        differs = differences(labels.sequences, labels.wild_type)
        return Variants(labels.wild_type, differs, "taken as variants of the given wild type")
    told = np.ones(len(labels), bool) if labels.part is None else labels.part != TEST
    if len({len(s) for s in labels.sequences}) != 1 or not told.any():
        return None
    common = consensus([s for s, own in zip(labels.sequences, told) if own])
    assert common is not None
    differs = differences(labels.sequences, common)
    limit = max(2, int(NEAR * len(common)))
    share = float((differs[told].sum(1) <= limit).mean())
    if share < MOST:
        return None
    return Variants(
        common,
        differs,
        f"taken as variants of one protein: {share:.0%} of the rows differ from the consensus{'' if told.all() else ' of those outside the test part'}, which stands in for "
        f"the wild type, in at most {limit} of {len(common)} positions",
    )


def kept_apart(variants: Variants, part: np.ndarray) -> str | None:
    """What a split's test part does not share with the other rows: `mutations` (nearly all test rows have more of them),
    `position` (hardly any has a mutated position of theirs), or None."""
    test, seen = part == TEST, (part != TEST) & (part >= 0)
    if not test.any() or not seen.any():
        return None
    # 95 % of the others, so that one row of many mutations does not hide what the rest say
    if (variants.order[test] <= np.quantile(variants.order[seen], 0.95)).mean() < APART:
        return "mutations"
    shared = variants.differs[test][:, variants.differs[seen].any(0)].any(1)
    return "position" if shared.mean() < APART else None

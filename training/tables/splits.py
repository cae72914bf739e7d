"""Dealing rows to train, validation and test so that the test tells how well a head will do on new proteins.

Homologous proteins on both sides of a split make a head look better than it is. So the default deals whole
clusters of similar sequences; variants of one protein are dealt by distance from the wild type or by mutated
position; a random split is made only when asked for, and every split reports the similarity that it left
between the sides.

Clusters and leakage are found by `bioseq.homologs.clusters`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bioseq.errors import TableError
from bioseq.homologs.clusters import cluster, leakage
from training.tables.labels import TEST, TRAIN, VALID, Labels


@dataclass(frozen=True)
class Split:
    """`part` int [N] of TRAIN, VALID, TEST (-1: left out). `how` tells the way, its settings and the leakage."""

    part: np.ndarray
    how: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def places(self, part: int) -> np.ndarray:
        return np.flatnonzero(self.part == part)


def _deal(
    groups: np.ndarray, valid: float, test: float, rng: np.random.Generator, strata: np.ndarray
) -> np.ndarray:
    """Deal whole groups: shuffled within each stratum (a group's stratum is its rarest member's), each goes to
    the part that lacks most of its share."""
    share = np.array([1 - valid - test, valid, test])
    part = np.full(len(groups), TRAIN)
    frequency = np.bincount(strata)
    members: dict[int, list[int]] = defaultdict(list)
    for i, g in enumerate(groups.tolist()):
        members[g].append(i)
    by_stratum: dict[int, list[int]] = defaultdict(list)
    for g, rows in members.items():
        by_stratum[min((int(strata[r]) for r in rows), key=lambda s: (frequency[s], s))].append(g)
    for stratum in sorted(by_stratum):
        names = by_stratum[stratum]
        total = sum(len(members[g]) for g in names)
        have = np.zeros(3)
        order = rng.permutation(len(names))
        # largest first, so that one big cluster cannot overshoot a small part at the end
        for at in sorted(order.tolist(), key=lambda a: -len(members[names[a]])):
            rows = members[names[at]]
            goal = int(np.argmax((share * total - have) / share))
            part[rows] = goal
            have[goal] += len(rows)
    return part


def _strata(labels: Labels) -> np.ndarray:
    """Stratum of each row: class, rarest positive label, or 0."""
    n = len(labels)
    if labels.task in ("binary", "multiclass"):
        return np.nan_to_num(labels.y[:, 0], nan=-1).astype(int) + 1
    if labels.task == "multilabel":
        order = np.argsort(np.nansum(labels.y, axis=0))
        out = np.zeros(n, dtype=int)
        for rank, j in reversed(list(enumerate(order, 1))):
            out[labels.y[:, j] == 1] = rank
        return out
    return np.zeros(n, dtype=int)


def mutated(sequences: Sequence[str], wild_type: str) -> list[np.ndarray]:
    """Zero-based positions at which each sequence differs from the wild type. Raises `TableError`."""
    wild = np.frombuffer(wild_type.encode(), np.uint8)
    bad = [i for i, s in enumerate(sequences, 1) if len(s) != len(wild_type)]
    if bad:
        raise TableError(f"not the wild type's length of {len(wild_type)} residues", rows=bad)
    return [np.flatnonzero(np.frombuffer(s.encode(), np.uint8) != wild) for s in sequences]


def consensus(sequences: Sequence[str]) -> str | None:
    """The commonest residue at each place, if all sequences have one length; stands in for a wild type."""
    if len({len(s) for s in sequences}) != 1:
        return None
    table = np.frombuffer("".join(sequences).encode(), np.uint8).reshape(len(sequences), -1)
    return "".join(chr(int(np.bincount(column).argmax())) for column in table.T)


def _by_mutations(
    labels: Labels, wild_type: str, limit: int, valid: float, rng: np.random.Generator
) -> np.ndarray:
    distance = np.array([len(p) for p in mutated(labels.sequences, wild_type)])
    part = np.where(distance <= limit, TRAIN, TEST)
    near = np.flatnonzero(part == TRAIN)
    part[rng.permutation(near)[: round(valid * len(near))]] = VALID
    return part


def _by_position(
    labels: Labels, wild_type: str, mode: str, valid: float, test: float
) -> tuple[np.ndarray, int]:
    """Positions that vary are dealt; a variant belongs to the part that holds all its positions, the wild type
    to train; variants across parts are left out (-1)."""
    places = mutated(labels.sequences, wild_type)
    sites = sorted({int(p) for ps in places for p in ps})
    if len(sites) < 3:
        raise TableError(f"{len(sites)} varied positions cannot be dealt to three parts.")
    count = len(sites)
    of: dict[int, int] = {}
    if mode == "contiguous":
        n_test, n_valid = max(1, round(test * count)), max(1, round(valid * count))
        for i, site in enumerate(sites):
            of[site] = TEST if i >= count - n_test else VALID if i >= count - n_test - n_valid else TRAIN
    else:
        every = max(3, round(1 / max(test, valid)))
        for i, site in enumerate(sites):
            of[site] = TEST if i % every == every - 1 else VALID if i % every == every // 2 else TRAIN
    part = np.array(
        [
            next(iter(k)) if len(k := {of[int(p)] for p in ps}) == 1 else (-1 if ps.size else TRAIN)
            for ps in places
        ]
    )
    return part, int((part == -1).sum())


def make_split(
    labels: Labels,
    *,
    kind: str | None = None,
    valid: float = 0.15,
    test: float = 0.15,
    identity: float = 0.3,
    train_mutations: int = 2,
    position_mode: str = "contiguous",
    seed: int = 0,
    measure: bool = True,
) -> Split:
    """Deal the rows. Raises `TableError` if a part would be too small to train, choose or test.

    With `column` and no test rows, the file's validation rows are the held-out part, and a validation part is
    dealt from its training rows, by the file's clusters if it has them. `measure` searches for leakage.
    """
    rng = np.random.default_rng(seed)
    wild = labels.wild_type
    if kind is None:
        kind = "column" if labels.part is not None else "mutations" if wild else "cluster"
    how: dict[str, Any] = {"kind": kind, "seed": seed}
    warnings: list[str] = []
    if kind == "column":
        if labels.part is None:
            raise TableError("the file has no `set` column.", hint="Choose another split.")
        part = labels.part.copy()
        if not (part == TEST).any():
            part[part == VALID] = TEST
            how["held_out"] = "the file's validation rows (it has no test rows)"
        if not (part == VALID).any() and (part == TRAIN).any():
            rows = np.flatnonzero(part == TRAIN)
            sub = labels.take(rows)
            groups = np.unique(sub.cluster, return_inverse=True)[1] if sub.cluster else np.arange(len(rows))
            part[rows] = np.where(_deal(groups, valid, 1e-9, rng, _strata(sub)) == VALID, VALID, TRAIN)
            how["validation"] = f"{valid:g} of the training rows" + (
                ", by cluster" if sub.cluster else ", at random"
            )
    elif kind == "cluster":
        if labels.cluster:
            groups, way = np.unique(labels.cluster, return_inverse=True)[1], "the file's cluster column"
        else:
            groups, way = cluster(labels.sequences, identity=identity)
        how |= {"clusters": int(groups.max()) + 1, "way": way, "identity": identity}
        part = _deal(groups, valid, test, rng, _strata(labels))
    elif kind in ("mutations", "position"):
        wild = wild or consensus(labels.sequences)
        if wild is None:
            raise TableError(f"a split by {kind} needs variants of one protein.", hint="Give --wild-type.")
        if kind == "mutations":
            part = _by_mutations(labels, wild, train_mutations, valid, rng)
            how["train_mutations"] = train_mutations
        else:
            part, left_out = _by_position(labels, wild, position_mode, valid, test)
            how |= {"mode": position_mode, "left_out": left_out}
    elif kind == "random":
        part = _deal(np.arange(len(labels)), valid, test, rng, _strata(labels))
    else:
        raise TableError(f"unknown split {kind!r}.")
    how |= {name: int((part == p).sum()) for name, p in (("train", TRAIN), ("valid", VALID), ("test", TEST))}
    _enough(labels, part)
    one_protein = kind in ("mutations", "position") or len({len(s) for s in labels.sequences}) == 1
    if measure and not one_protein:
        how["leakage"] = leakage(
            labels.sequences, np.flatnonzero(part == TRAIN), np.flatnonzero(part == TEST), seed=seed
        )
        level = "30" if "share_over_30" in how["leakage"] else "50"
        over = how["leakage"].get(f"share_over_{level}", 0.0)
        if kind == "random" or over > 0.1:
            warnings.append(
                f"{over:.0%} of the test sequences have a training sequence of at least {level} % identity "
                f"({how['leakage'].get('way', '')}): expect worse results on new proteins."
            )
    elif kind == "random":
        warnings.append(
            "a random split of variants of one protein: test variants have close neighbours in train."
        )
    return Split(part, how, tuple(warnings))


def _enough(labels: Labels, part: np.ndarray) -> None:
    for name, p, least in (("training", TRAIN, 10), ("validation", VALID, 3), ("test", TEST, 3)):
        count = int((part == p).sum())
        if count < least:
            raise TableError(
                f"{count} rows in the {name} part; at least {least} are needed of {len(labels)}.",
                hint="Label more rows, or choose another split.",
            )
    for j, name in enumerate(labels.targets):
        for where, p in (("validation", VALID), ("test", TEST)):
            if labels.task != "per_residue" and np.isnan(labels.y[part == p, j]).all():
                raise TableError(f"column {name!r} has no label in the {where} part.")
    train = part == TRAIN
    if labels.task in ("binary", "multiclass"):
        seen = labels.y[train, 0]
        if len(np.unique(seen[~np.isnan(seen)])) < 2:
            raise TableError("the training part has one class only: nothing can be learnt.")
    elif labels.task != "per_residue":
        for j, name in enumerate(labels.targets):
            seen = labels.y[train, j]
            if len(np.unique(seen[~np.isnan(seen)])) < 2:
                raise TableError(f"column {name!r} has one value only in the training part.")

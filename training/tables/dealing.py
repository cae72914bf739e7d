"""How whole groups of rows are dealt to train, validation and test, and to folds."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from sklearn.model_selection import GroupKFold

from training.tables.labels import TEST, TRAIN, VALID, Labels

Folds = list[tuple[np.ndarray, np.ndarray]]
"""(places to train on, places to measure on) of each fold."""


def strata(labels: Labels) -> np.ndarray:
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


def deal(
    groups: np.ndarray, valid: float, test: float, rng: np.random.Generator, stratum: np.ndarray
) -> np.ndarray:
    """Part of each row. Groups are kept whole.

    A group larger than half of a held-out part's share would be most of that part, and its score that of one family.
    Such groups go to train, largest first, while what is left can still fill a third of the held-out share. The rest
    are shuffled and dealt within strata (a group's stratum is its rarest member's), each to the part that lacks most
    of its share.
    """
    share = np.array([1 - valid - test, valid, test])
    n = len(groups)
    part, have = np.full(n, TRAIN), np.zeros(3)
    names, sizes = np.unique(groups, return_counts=True)
    largest = names[np.lexsort((names, -sizes))]
    rows_of = dict(zip(names.tolist(), np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])))
    left = n
    cap, needed = max(1.0, share[1:].max() * n / 2), share[1:].sum() * n / 3
    rest = []
    for at, name in enumerate(largest.tolist()):
        size = len(rows_of[name])
        if size > cap and left - size >= needed and len(largest) - at - 1 >= 2:
            have[TRAIN] += size
            left -= size
        else:
            rest.append(name)
    big = [name for name in rest if len(rows_of[name]) > cap]
    for name in big:  # too few others: the part that lacks most rows
        goal = int(np.argmax(share * n - have))
        part[rows_of[name]] = goal
        have[goal] += len(rows_of[name])
    frequency = np.bincount(stratum)
    by_stratum: dict[int, list[int]] = defaultdict(list)
    for name in rest:
        if len(rows_of[name]) <= cap:
            rarest = min((int(s) for s in stratum[rows_of[name]]), key=lambda s: (frequency[s], s))
            by_stratum[rarest].append(name)
    lacking = np.maximum(share * n - have, 0.0)
    aim = lacking / max(lacking.sum(), 1e-9)  # shares of the small groups' rows
    for s in sorted(by_stratum):
        members = by_stratum[s]
        total, got = sum(len(rows_of[m]) for m in members), np.zeros(3)
        for at in sorted(rng.permutation(len(members)).tolist(), key=lambda a: -len(rows_of[members[a]])):
            rows = rows_of[members[at]]
            goal = int(np.argmax(np.where(aim > 0, (aim * total - got) / np.maximum(aim, 1e-9), -np.inf)))
            part[rows] = goal
            got[goal] += len(rows)
    return part


def families(groups: np.ndarray, part: np.ndarray) -> dict[str, int]:
    """Groups in each part."""
    return {
        name: len(np.unique(groups[part == p]))
        for name, p in (("train", TRAIN), ("valid", VALID), ("test", TEST))
    }


def grouped_folds(groups: np.ndarray, count: int = 5, seed: int = 0) -> Folds:
    """At most `count` folds that keep groups whole, of sizes as alike as the groups allow; none of a single group."""
    distinct = len(np.unique(groups))
    if distinct < 2:
        return []
    names = np.random.default_rng(seed).permutation(distinct)[np.unique(groups, return_inverse=True)[1]]
    return list(GroupKFold(min(count, distinct)).split(np.zeros(len(groups)), groups=names))


def position_folds(differs: np.ndarray, count: int = 5, *, contiguous: bool = True) -> Folds:
    """Folds over the positions that vary: a fold is measured on the rows whose substitutions all lie in its
    positions, and trained on those that have none there. bool [N, L]."""
    sites = np.flatnonzero(differs.any(0))
    count = min(count, len(sites))
    place = np.arange(len(sites))
    fold = place * count // max(len(sites), 1) if contiguous else place % count
    out = []
    for k in range(count):
        inside = differs[:, sites[fold == k]].any(1)
        outside = differs[:, sites[fold != k]].any(1)
        train, valid = np.flatnonzero(~inside), np.flatnonzero(inside & ~outside)
        if len(train) and len(valid):
            out.append((train, valid))
    return out

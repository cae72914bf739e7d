"""Transfer of labels: what a protein's nearest labelled relatives are labelled.

Concept: the labels of the hits in a labelled reference set are averaged with weights that grow with the score of
the alignment; a prior (the labels' mean over the set) counts as much as one hit of about 32 bits. A protein
without hits gets the prior. This is the homology search that a biologist does by hand, as numbers.

    value_c = (sum over hits of w y_c + K prior_c) / (sum over hits of w + K),    w = bits^2,  K = 1000

Per residue the same is done for each column of the query, with the labels copied along the alignments.

Leaving a protein's own row and its near copies out is done by the search (`exclude_above_identity`) and by `own`:
without that, features of training rows would tell their own labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bioseq.homologs.hits import NOWHERE, Hits

PRIOR = 1000.0  # squared bits


@dataclass(frozen=True, slots=True)
class Nearest:
    """The best hit in a labelled set: its id, place in the set, identity and coverage (shares of 1)."""

    id: str
    place: int
    identity: float
    coverage: float


def without(hits: Hits, own: int | None, *, above_identity: float | None = None) -> Hits:
    """Hits less the row `own` and those above an identity."""
    keep = np.ones(len(hits), dtype=bool)
    if own is not None:
        keep &= hits.keys != own
    if above_identity is not None:
        keep &= hits.identity <= above_identity
    return hits if keep.all() else hits.select(keep)


def nearest(hits: Hits) -> Nearest | None:
    if not len(hits):
        return None
    return Nearest(hits.ids[0], int(hits.keys[0]), float(hits.identity[0]), float(hits.coverage[0]))


def transfer(
    hits: Sequence[Hits], labels: np.ndarray, prior: np.ndarray, *, strength: float = PRIOR
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the hits, averaged: float64 [N, C], and the weight of the evidence, float64 [N] in [0, 1).

    `labels` float [M, C] by place in the reference set: 0/1 columns, one-hot classes or values; NaN where unknown.
    `prior` float [C]. Weight 0 means that nothing was found and the prior is the answer.
    """
    values = np.empty((len(hits), labels.shape[1]))
    evidence = np.zeros(len(hits))
    for i, one in enumerate(hits):
        y = labels[one.keys]
        known = ~np.isnan(y)
        w = (one.bits**2)[:, None] * known
        total = w.sum(0)
        values[i] = ((w * np.where(known, y, 0.0)).sum(0) + strength * prior) / (total + strength)
        evidence[i] = 1.0 - strength / (float(total.max(initial=0.0)) + strength)
    return values, evidence


def transfer_residues(
    hits: Sequence[Hits],
    states: Sequence[np.ndarray],
    prior: np.ndarray,
    *,
    strength: float = PRIOR,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Labels copied along alignments: for each query float64 [L, C], and the evidence by column float64 [L].

    `hits` were searched with `places=True`. `states` are class numbers int [length] of every sequence of the
    reference set, negative where unknown. `prior` [C], or [21, C] by the query's own residue (in the order of
    `database.LETTERS`, anything else last): composition, where there is no relative.
    """
    from bioseq.homologs.hits import encode

    values, evidence = [], []
    n_classes = prior.shape[-1]
    for one in hits:
        length = len(one.query)
        base = prior[np.minimum(encode(one.query), 20)] if prior.ndim == 2 else np.tile(prior, (length, 1))
        sums, total = strength * base, np.full(length, strength)
        if len(one):
            assert one.places is not None
            for n, key in enumerate(one.keys.tolist()):
                columns = np.flatnonzero(one.places[n] != NOWHERE)
                state = np.asarray(states[key], dtype=np.int64)[one.places[n][columns]]
                seen = (state >= 0) & (state < n_classes)
                weight = one.bits[n] ** 2
                sums[columns[seen], state[seen]] += weight
                total[columns[seen]] += weight
        values.append(sums / total[:, None])
        evidence.append(1.0 - strength / total)
    return values, evidence

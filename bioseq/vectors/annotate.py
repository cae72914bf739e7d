"""Labels of the nearest vectors, with a reliability: how often a label at this similarity was right.

It is calibrated on held-back pairs: each labelled protein and the nearest other one. Half of the pairs fit the
curve and the other half measure it; the curve that is used is fitted on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bioseq.errors import InputError
from bioseq.vectors.search import search_rows, unit_rows

FEWEST = 20  # held-back pairs that a curve needs


@dataclass(frozen=True, slots=True)
class Reliability:
    """A rising step curve: the share of right labels at a similarity. `error` is the mean gap between stated and
    found reliability, in tenths of the pairs, on the half that the first curve has not seen."""

    similarity: np.ndarray
    share: np.ndarray
    pairs: int
    error: float

    def at(self, similarity: np.ndarray) -> np.ndarray:
        return np.interp(similarity, self.similarity, self.share)


def _rising(x: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Isotonic regression by pooling neighbours that fall: (mean x, share) of each pool. Each pool is drawn towards
    the whole by one pair, so that a pool of few pairs is never certain."""
    order = np.argsort(x, kind="stable")
    pools: list[list[float]] = []  # [pairs, sum of x, right]
    for value, hit in zip(x[order].tolist(), right[order].astype(float).tolist()):
        pools.append([1.0, value, hit])
        while len(pools) > 1 and pools[-2][2] * pools[-1][0] >= pools[-1][2] * pools[-2][0]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last)]
    n, total, hits = np.array(pools).T
    return total / n, np.maximum.accumulate((hits + right.mean()) / (n + 1.0))


def calibrate(similarity: np.ndarray, right: np.ndarray, *, seed: int = 0) -> Reliability:
    """The curve of held-back pairs. Raises `InputError` for fewer than 20."""
    n = len(similarity)
    if n < FEWEST:
        raise InputError(
            f"{n} labelled proteins; {FEWEST} are needed to calibrate a reliability.",
            hint="Label more proteins.",
        )
    order = np.random.default_rng(seed).permutation(n)
    fit, check = order[: n // 2], order[n // 2 :]
    stated = np.interp(similarity[check], *_rising(similarity[fit], right[fit]))
    tenths = np.array_split(np.argsort(stated, kind="stable"), min(10, len(check)))
    gaps = [abs(stated[t].mean() - right[check][t].mean()) * len(t) for t in tenths]
    return Reliability(*_rising(similarity, right), pairs=n, error=float(sum(gaps) / len(check)))


class Annotator:
    """Labels by the nearest of `rows`, float [M, D], whose labels are known. `left_out` [M] and `held_back` [M] are
    the place and the similarity of each labelled protein's nearest other one."""

    def __init__(self, rows: np.ndarray, labels: Sequence[str]):
        self.rows, self.labels = np.asarray(rows, dtype=np.float32), list(labels)
        if len(self.rows) < FEWEST:
            calibrate(np.empty(len(self.rows)), np.empty(len(self.rows)))
        own = np.arange(len(self.rows))[:, None]
        near = search_rows(self.rows, unit_rows(self.rows), 2)
        column = np.where(near.places[:, :1] == own, 1, 0)
        self.left_out = np.take_along_axis(near.places, column, axis=1)[:, 0]
        self.held_back = np.take_along_axis(near.similarity, column, axis=1)[:, 0]
        self.right = np.array([self.labels[a] == self.labels[b] for a, b in enumerate(self.left_out)])
        self.reliability = calibrate(self.held_back, self.right)

    def annotate(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each query: the place of its nearest labelled vector, the similarity, and the label's reliability."""
        near = search_rows(self.rows, unit_rows(queries), 1)
        similarity = near.similarity[:, 0]
        return near.places[:, 0], similarity, self.reliability.at(similarity)

    def share_right(self, coverage: float) -> float:
        """Share of right labels among the held-back pairs of highest similarity that make up this coverage."""
        count = round(coverage * len(self.right))
        best = np.argsort(-self.held_back, kind="stable")[:count]
        return float(self.right[best].mean()) if count else float("nan")

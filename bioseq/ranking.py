"""Rank-based scores of ordered predictions: ranks, Spearman, NDCG, areas under ROC and precision-recall.

Plain numpy, so that the core needs no scikit-learn. A score that the data cannot define (one class only,
a constant) is NaN, never an invented 0 or 0.5.
"""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """One-based ranks, ties given their mean rank; float64 [N]."""
    values = np.asarray(values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.concatenate([starts, [len(values)]]))
    out = np.empty(len(values))
    out[order] = np.repeat(starts + (sizes + 1) / 2, sizes)
    return out


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def spearman(truth: np.ndarray, score: np.ndarray) -> float:
    """Spearman's rank correlation with mean ranks for ties."""
    return pearson(ranks(truth), ranks(score))


def ndcg(truth: np.ndarray, score: np.ndarray, *, k: int | None = None) -> float:
    """Normalised discounted cumulative gain (Jarvelin & Kekalainen 2002) of the whole order, or of its first k.

    Gains are the true values less their minimum, so that they are never negative.
    """
    truth, score = np.asarray(truth, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if not len(truth):
        return float("nan")
    gain = truth - truth.min()
    discount = 1.0 / np.log2(np.arange(len(truth)) + 2.0)
    if k is not None:
        discount[k:] = 0.0
    best = float((np.sort(gain)[::-1] * discount).sum())
    got = float((gain[np.argsort(-score, kind="stable")] * discount).sum())
    return got / best if best > 0 else float("nan")


def auroc(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve, by the Mann-Whitney statistic; NaN with one class only."""
    positive = np.asarray(truth).astype(bool)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return float("nan")
    return float((ranks(score)[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def average_precision(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the precision-recall steps, sum of (R_n - R_n-1) P_n over distinct scores; NaN without positives."""
    positive = np.asarray(truth).astype(bool)
    if not positive.any():
        return float("nan")
    score = np.asarray(score, dtype=np.float64)
    order = np.argsort(-score, kind="stable")
    hits, ordered = np.cumsum(positive[order]), score[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(order) - 1)
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())

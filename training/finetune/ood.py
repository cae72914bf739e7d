"""Fitting the out-of-domain score (`bioseq.heads.ood`) on training proteins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from bioseq.heads.ood import OodScore, order_features

MOST_ORDER = 4000  # training proteins that the order term is fitted on


def whiten(features: np.ndarray, *, keep: int = 64, shrink: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(mean [F], project [F, K]) so that (x - mean) @ project has about unit variance in K directions.

    The largest K principal directions; each variance is shrunken towards the mean variance of the kept ones
    (Ledoit & Wolf 2004 in spirit, with a fixed share), so that directions that barely vary do not dominate.
    """
    features = np.asarray(features, dtype=np.float64)
    mean = features.mean(0)
    _, singular, directions = np.linalg.svd(features - mean, full_matrices=False)
    k = min(keep, len(singular), max(len(features) - 1, 1))
    variance = singular[:k] ** 2 / max(len(features) - 1, 1)
    variance = (1 - shrink) * variance + shrink * max(variance.mean(), 1e-12)
    return mean.astype(np.float32), (directions[:k].T / np.sqrt(variance)).astype(np.float32)


def shuffled(sequences: Sequence[str], seed: int = 0) -> list[str]:
    """The same residues of each sequence in random order."""
    rng = np.random.default_rng(seed)
    return ["".join(np.array(list(s))[rng.permutation(len(s))]) for s in sequences]


def fit_ood(
    pooled: np.ndarray,
    sequences: Sequence[str],
    ids: Sequence[str],
    *,
    order_term: bool = True,
    neighbours: int = 2000,
    alphabet: str = "protein",
    seed: int = 0,
) -> OodScore:
    """Fit on training proteins: pooled embeddings [N, D] and cleaned sequences. `order_term` is for heads of any
    protein, given 50 rows or more. The score's percentiles come from training rows left out of its fit."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(pooled))
    cut = max(int(0.7 * len(pooled)), 2)
    fit, held = rows[:cut], rows[cut:] if len(pooled) - cut >= 5 else rows
    mean, project = whiten(pooled[fit])
    order, at = None, (0.0, 1.0)
    if order_term and len(pooled) >= 50:
        own = [sequences[i] for i in fit[:MOST_ORDER]]
        repeats = max(1, min(4, MOST_ORDER // len(own)))
        noise = [s for r in range(repeats) for s in shuffled(own, seed + 1 + r)]
        x = np.vstack([order_features(own, alphabet), order_features(noise, alphabet)])
        centre, spread = x.mean(0), x.std(0) + 1e-6
        scale = (4.0 / spread / np.sqrt(x.shape[1])).astype(np.float32)
        y = np.concatenate([np.ones(len(own)), np.zeros(len(noise))])
        weight = _ratio((x - centre) * scale, y, np.where(y == 1, 0.5 / len(own), 0.5 / len(noise)))
        order = (centre.astype(np.float32), scale, weight.astype(np.float32))
        ratios = ((order_features([sequences[i] for i in held], alphabet) - order[0]) * order[1]) @ order[2]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        at = (float(middle), float(max(high - low, 1e-6)))
    kept = np.sort(rows[:neighbours])
    found = OodScore(mean, project, np.zeros(101, np.float32), order, at, alphabet=alphabet)
    if neighbours:
        found.points = found.place(pooled[kept]).astype(np.float16)
        found.ids = [ids[i] for i in kept]
    scores = found.score(pooled[held], [sequences[i] for i in held])
    found.grid = np.quantile(scores, np.linspace(0, 1, 101)).astype(np.float32)
    return found


def _ratio(x: np.ndarray, y: np.ndarray, weight: np.ndarray, l2: float = 2e-3) -> np.ndarray:
    """Weights of a logistic regression; its intercept cancels in u."""
    model = LogisticRegression(C=1 / (2 * l2), tol=1e-6, max_iter=1000)
    return model.fit(x, y, sample_weight=weight).coef_[0]

"""From raw scores to numbers that mean what they say: intervals, probabilities, distances.

- Regression intervals: split conformal prediction (Lei et al. 2018, doi 10.1080/01621459.2017.1307116): the
  ceil((n + 1) level)-th smallest absolute residual of n held-back items. Marginal coverage is at least
  `level` for exchangeable data, whatever the model; far from the training data it is a hope. Optionally
  residuals are divided by a spread that the model itself reports (locally weighted, section 5.2 there).
- Probabilities: temperature scaling (Guo et al. 2017, arXiv 1706.04599) for multiclass and residues, Platt
  scaling (Platt 1999) for each binary label, both fitted on held-back items by Newton's method.
- Out of domain: Mahalanobis distance in a whitened, shrunken space (Lee et al. 2018, arXiv 1807.03888), and
  its place among the training set's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bioseq.ranking import auroc  # noqa: F401  (re-exported for callers that check a distance)


def conformal_radius(residuals: np.ndarray, level: float = 0.9) -> float:
    """Half width of the interval from absolute residuals [n]; inf if n is too small for the level."""
    residuals = np.sort(np.abs(np.asarray(residuals, dtype=np.float64)))
    place = math.ceil((len(residuals) + 1) * level)
    return float(residuals[place - 1]) if place <= len(residuals) else math.inf


def coverage(truth: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Share of true values inside their interval; NaN truth left out."""
    keep = ~np.isnan(truth)
    return float(((truth >= low) & (truth <= high))[keep].mean()) if keep.any() else float("nan")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def fit_platt(score: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(a, b) of sigmoid(a * score + b), by regularised Newton steps; Platt's smoothed targets. a is kept
    positive, so that calibration never changes an order."""
    keep = ~np.isnan(truth)
    score, truth = np.asarray(score, np.float64)[keep], np.asarray(truth, np.float64)[keep]
    n_pos, n_neg = truth.sum(), (1 - truth).sum()
    if not n_pos or not n_neg:
        return 1.0, 0.0
    target = np.where(truth > 0, (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2))
    spread = score.std() or 1.0
    x = np.column_stack([(score - score.mean()) / spread, np.ones(len(score))])
    w = np.array([1.0, math.log((n_pos + 1) / (n_neg + 1))])
    for _ in range(50):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - target) + 1e-3 * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        w -= np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    a = max(w[0] / spread, 1e-3 / spread)
    return float(a), float(w[1] - a * score.mean())


def fit_temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """Inverse temperature that minimises the log loss of softmax(t * logits); golden section on log t."""
    keep = ~np.isnan(truth) & (truth >= 0)
    logits, truth = np.asarray(logits, np.float64)[keep], truth[keep].astype(np.int64)
    if not len(truth):
        return 1.0

    def loss(log_t: float) -> float:
        scaled = math.exp(log_t) * logits
        scaled = scaled - scaled.max(1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(truth)), truth]).mean())

    low, high, ratio = -3.0, 3.0, (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    while high - low > 1e-4:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return math.exp((low + high) / 2)


def f1_threshold(truth: np.ndarray, probability: np.ndarray) -> float:
    """Probability above which calling gives the best F1 on these items; 0.5 if there is no positive."""
    keep = ~np.isnan(truth)
    truth, probability = truth[keep].astype(bool), probability[keep]
    if not truth.any():
        return 0.5
    order = np.argsort(-probability, kind="stable")
    hits = np.cumsum(truth[order])
    scores = 2 * hits / (np.arange(1, len(order) + 1) + hits[-1])
    ordered = probability[order]
    scores[:-1][ordered[1:] == ordered[:-1]] = -1  # a threshold cannot cut through ties
    best = int(scores.argmax())
    below = ordered[best + 1] if best + 1 < len(ordered) else 0.0
    return float((ordered[best] + below) / 2)


@dataclass(frozen=True)
class Reliability:
    """Bins of predicted probability: mean prediction, observed share, items; and the expected calibration
    error, the item-weighted mean distance of the two (Naeini et al. 2015)."""

    predicted: list[float]
    observed: list[float]
    count: list[int]
    ece: float


def reliability(truth: np.ndarray, probability: np.ndarray, bins: int = 10) -> Reliability:
    """Equal-width bins over [0, 1]; NaN truth left out."""
    keep = ~np.isnan(truth)
    truth, probability = np.asarray(truth, float)[keep], np.asarray(probability, float)[keep]
    place = np.minimum((probability * bins).astype(int), bins - 1)
    predicted, observed, count = [], [], []
    for b in range(bins):
        inside = place == b
        if inside.any():
            predicted.append(float(probability[inside].mean()))
            observed.append(float(truth[inside].mean()))
            count.append(int(inside.sum()))
    total = max(sum(count), 1)
    ece = sum(n * abs(p - o) for p, o, n in zip(predicted, observed, count)) / total
    return Reliability(predicted, observed, count, float(ece))


def whiten(features: np.ndarray, *, keep: int = 64, shrink: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(mean [F], project [F, K]) so that (x - mean) @ project has about unit variance in K directions.

    The largest K principal directions; each variance is shrunken towards the mean variance of the kept ones
    (Ledoit & Wolf 2004 in spirit, with a fixed share), so that directions that barely vary do not dominate.
    """
    features = np.asarray(features, dtype=np.float64)
    mean = features.mean(0)
    centred = features - mean
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    k = min(keep, len(singular), max(len(features) - 1, 1))
    variance = singular[:k] ** 2 / max(len(features) - 1, 1)
    variance = (1 - shrink) * variance + shrink * max(variance.mean(), 1e-12)
    return mean.astype(np.float32), (directions[:k].T / np.sqrt(variance)).astype(np.float32)


def percentile_grid(scores: np.ndarray, places: int = 101) -> np.ndarray:
    """Quantiles 0, 1/(places-1), ..., 1 of the training set's scores, float32 [places]."""
    return np.quantile(np.asarray(scores, np.float64), np.linspace(0, 1, places)).astype(np.float32)


def percentile_of(score: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Place of each score among the training set's own, in [0, 1]."""
    grid = np.maximum.accumulate(grid.astype(np.float64))
    return np.interp(np.asarray(score, np.float64), grid, np.linspace(0, 1, len(grid)))

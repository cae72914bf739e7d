"""Fitting what `bioseq.heads.calibration` applies, on rows that the head did not train on.

- Regression intervals: conformal prediction (Lei et al. 2018, doi 10.1080/01621459.2017.1307116): the
  ceil((n + 1) level)-th smallest absolute residual of n held-back items. Coverage on average is at least `level` for
  exchangeable data, whatever the model; nothing is promised far from the training data.
- Probabilities: temperature scaling (Guo et al. 2017, arXiv 1706.04599) with a bias a class for multiclass and
  residues, Platt scaling (Platt 1999) for each binary label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from sklearn.metrics import precision_recall_curve

from bioseq.heads.head import Head


def conformal_radius(residuals: np.ndarray, level: float = 0.9) -> float:
    """Half width of the interval from absolute residuals [n]; inf if n is too small for the level."""
    residuals = np.sort(np.abs(np.asarray(residuals, dtype=np.float64)))
    place = math.ceil((len(residuals) + 1) * level)
    return float(residuals[place - 1]) if place <= len(residuals) else math.inf


def coverage(truth: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Share of true values inside their interval; NaN truth left out."""
    keep = ~np.isnan(truth)
    return float(((truth >= low) & (truth <= high))[keep].mean()) if keep.any() else float("nan")


def fit_platt(score: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(a, b) of sigmoid(a * score + b), to Platt's smoothed targets. a is kept positive, so that calibration never
    changes an order."""
    keep = ~np.isnan(truth)
    score, truth = np.asarray(score, np.float64)[keep], np.asarray(truth, np.float64)[keep]
    positive, negative = truth.sum(), (1 - truth).sum()
    if not positive or not negative:
        return 1.0, 0.0
    target = np.where(truth > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    middle, spread = score.mean(), score.std() or 1.0
    x = (score - middle) / spread

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = w[0] * x + w[1]
        error = expit(z) - target
        value = np.logaddexp(0, z) - target * z
        return value.sum() + 5e-4 * (w @ w), np.array([error @ x, error.sum()]) + 1e-3 * w

    start = np.array([1.0, math.log((positive + 1) / (negative + 1))])
    a, b = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(1e-3, None), (None, None)]).x
    return float(a / spread), float(b - a / spread * middle)


def fit_temperature(logits: np.ndarray, truth: np.ndarray) -> tuple[float, list[float]]:
    """(t, biases [C] that sum to 0) of softmax(t * logits + biases) of least log loss. The biases undo class
    weights, which move every probability towards the rare classes. Each class counts one observation of bias 0
    against them."""
    keep = ~np.isnan(truth) & (truth >= 0)
    logits, truth = np.asarray(logits, np.float64)[keep], truth[keep].astype(np.int64)
    n, k = logits.shape
    if not n:
        return 1.0, [0.0] * k
    spread = logits.std() or 1.0
    scaled, hit = logits / spread, np.eye(k)[truth]

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        t, bias = math.exp(w[0]), w[1:]
        z = t * scaled + bias
        error = softmax(z, axis=1) - hit
        value = -log_softmax(z, axis=1)[np.arange(n), truth].sum() + 0.5 * (bias @ bias)
        return value / n, np.r_[(error * scaled).sum() * t, error.sum(0) + bias] / n

    w = minimize(
        loss, np.r_[math.log(spread), np.zeros(k)], jac=True, method="L-BFGS-B", bounds=[(-7, 7)] * (k + 1)
    ).x
    return math.exp(w[0]) / spread, (w[1:] - w[1:].mean()).tolist()


def f1_threshold(truth: np.ndarray, probability: np.ndarray) -> float:
    """Probability from which calling gives the best F1 on these items; 0.5 if there is no positive."""
    keep = ~np.isnan(truth)
    truth, probability = truth[keep], probability[keep]
    if not truth.any():
        return 0.5
    precision, recall, at = precision_recall_curve(truth, probability)
    scores = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(at[scores[:-1].argmax()])


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
    count = np.bincount(place, minlength=bins)
    used = count > 0
    predicted = np.bincount(place, probability, bins)[used] / count[used]
    observed = np.bincount(place, truth, bins)[used] / count[used]
    ece = float((count[used] * np.abs(predicted - observed)).sum() / max(count.sum(), 1))
    return Reliability(predicted.tolist(), observed.tolist(), count[used].tolist(), ece)


def _scaled_radius(
    residual: np.ndarray, spread: np.ndarray | None, level: float
) -> tuple[float, float, float]:
    """(radius, offset, weight): the half width is radius * (offset + weight * spread).

    Normalised conformal prediction (Papadopoulos et al. 2011): residuals are divided by offset + spread. The offset is
    the multiple of the mean spread that makes the residuals likeliest (Laplace distribution of that scale); without
    spread, or where a constant scale is no less likely, the width is constant."""
    plain = conformal_radius(residual, level)
    if spread is None or len(residual) < 40 or not spread.any():
        return plain, 1.0, 0.0
    mean = float(spread.mean())

    def loss(scale: np.ndarray) -> float:
        return float(np.log(scale).mean() + math.log(max((residual / scale).mean(), 1e-12)))

    options = {offset: spread + offset * mean for offset in (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)}
    best = min(options, key=lambda o: loss(options[o]))
    if not loss(options[best]) < loss(np.ones(len(residual))) - 0.5 / len(residual):
        return plain, 1.0, 0.0
    return conformal_radius(residual / options[best], level), best * mean, 1.0


def calibrate(
    head: Head, out: np.ndarray, y: np.ndarray, level: float, spread: np.ndarray | None = None
) -> dict[str, Any]:
    """calibration.json from raw outputs [n, C], their members' spread, and labels of held-back rows ([n, T]; per
    residue flat [n])."""
    if head.task == "regression":
        found = []
        for j in range(y.shape[1]):
            keep = ~np.isnan(y[:, j])
            residual = np.abs(y[keep, j] - out[keep, j])
            r, offset, weight = _scaled_radius(residual, None if spread is None else spread[keep, j], level)
            # too few rows for the level: the widest residual, and the card says what it covers
            found.append((r if np.isfinite(r) else float(residual.max()), offset, weight))
        radius, offsets, weights = (list(column) for column in zip(*found))
        shape = {"spread": {"offset": offsets, "weight": weights}} if any(weights) else {}
        return {"level": level, "radius": radius, **shape}
    if head.task in ("multiclass", "per_residue"):
        temperature, biases = fit_temperature(out, y.ravel())
        return {"temperature": temperature, "biases": biases}
    platt = [fit_platt(out[:, j], y[:, j]) for j in range(y.shape[1])]
    head.calibration = {"platt": platt}
    p = head.probabilities(out)[:, -y.shape[1] :]
    return {"platt": platt, "thresholds": [f1_threshold(y[:, j], p[:, j]) for j in range(y.shape[1])]}

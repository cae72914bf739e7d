"""From raw outputs to numbers that mean what they say, as a head applies them. They are fitted in
`training.finetune.evaluation.calibrate`.

calibration.json holds, by task:
    regression            level, radius [T]; with `spread` (offset [T], weight [T]) the half width is
                          radius * (offset + weight * spread), where spread is that of the head's members
    multiclass, residues  temperature, and biases [C] (optional)
    binary, multilabel    platt [[a, b], ...], thresholds
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def class_probabilities(raw: np.ndarray, calibration: dict[str, Any]) -> np.ndarray:
    """Softmax of temperature * logits + biases, [.., C]."""
    return softmax(raw * calibration["temperature"] + np.asarray(calibration.get("biases", 0.0)))


def label_probabilities(raw: np.ndarray, calibration: dict[str, Any]) -> np.ndarray:
    """Platt's sigmoid of each label, [.., C]."""
    platt = np.asarray(calibration["platt"], dtype=np.float64)
    return sigmoid(raw * platt[:, 0] + platt[:, 1])


def half_widths(spread: np.ndarray, calibration: dict[str, Any]) -> np.ndarray:
    """Half widths of the intervals [N, T], of the members' spread [N, T] (ignored where the widths are constant)."""
    radius = np.asarray(calibration["radius"], dtype=np.float64)
    shape = calibration.get("spread")
    if shape is None:
        return np.tile(radius, (len(spread), 1))
    return radius * (np.asarray(shape["offset"]) + np.asarray(shape["weight"]) * spread)


def percentile_of(score: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Place of each score among the training set's own, in [0, 1]; `grid` are its quantiles at equal steps."""
    grid = np.maximum.accumulate(grid.astype(np.float64))
    return np.interp(np.asarray(score, np.float64), grid, np.linspace(0, 1, len(grid)))

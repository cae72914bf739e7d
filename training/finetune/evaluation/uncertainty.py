"""Whether a regression's intervals hold: on the whole test part, where the model is sure and where it is not, and near
the training data and far from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bioseq.heads.features import clean
from bioseq.heads.head import Head
from bioseq.specs.finetune import FinetuneSpec
from training.finetune.evaluation.calibrate import coverage
from training.finetune.fit import Fit, pooled
from training.tables.labels import Labels

TERCILES = ("low", "middle", "high")


def of_intervals(
    spec: FinetuneSpec, head: Head, test: Labels, fit: Fit, members: np.ndarray, rows: int
) -> dict[str, Any]:
    """Coverage and mean width, by target; by tercile of the members' spread and of the distance from training."""
    mean, half = members.mean(0), head.half_widths(members)
    low, high = mean - half, mean + half
    out: dict[str, Any] = {
        "level": spec.level,
        "rows": rows,
        "radius": head.calibration["radius"],
        "varies": "spread" in head.calibration,
        "coverage": {t: coverage(test.y[:, j], low[:, j], high[:, j]) for j, t in enumerate(test.targets)},
        "width": {t: float(2 * half[:, j].mean()) for j, t in enumerate(test.targets)},
    }
    features = pooled(head.task, fit.features["test"])
    seen = ~np.isnan(features).any(1)
    by = {"spread": members.std(0).mean(1) if len(members) > 1 else np.zeros(len(test))}
    if seen.sum() >= 30:
        distance = np.full(len(test), np.nan)
        texts = [clean(test.sequences[i]) for i in np.flatnonzero(seen)]
        distance[seen] = head.ood.score(features[seen], texts)
        by["distance"] = distance
    for name, value in by.items():
        known = np.flatnonzero(~np.isnan(value))
        if len(known) < 30 or np.ptp(value[known]) == 0:
            continue
        thirds = np.array_split(known[np.argsort(value[known], kind="stable")], 3)
        out[f"by_{name}"] = {
            third: {
                "rows": len(r),
                "coverage": coverage(test.y[r].ravel(), low[r].ravel(), high[r].ravel()),
                "width": float(2 * half[r].mean()),
            }
            for third, r in zip(TERCILES, thirds)
        }
    return out

"""Replays a campaign on a table of measured variants, beside random picks and greedy ridge regression on one-hot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge

from training.campaigns.choosing import Known, Method, choose
from training.campaigns.surrogates import Eyes, View

METHODS = ("campaign", "greedy ridge", "random")


@dataclass(frozen=True)
class Setting:
    rounds: int = 5
    batch: int = 96
    noise: float = 0.0  # standard deviation, in standard deviations of the table
    failed: float = 0.0  # share of wells


def replay(
    eyes: Eyes,
    pool: View,
    y: np.ndarray,
    setting: Setting,
    seed: int,
    name: str,
    method: Method | None = None,
    greedy: tuple[Any, Any] | None = None,
) -> list[np.ndarray]:
    """The rows measured in each round. Random draws for round one, noise and failures are the same for all methods of
    one seed. Failed wells cost a well and may be picked again. `greedy` is a regressor and its features [N, F], which
    picks the highest it predicts after a random first round: ridge on one-hot unless given."""
    regressor, features = greedy or (Ridge(1.0, solver="lsqr"), pool.X)
    rng = np.random.default_rng([seed, 1])
    first = np.random.default_rng(seed * 1000).permutation(len(y))[: setting.batch]  # as `choose` draws them
    noisy = y + np.random.default_rng([seed, 2]).normal(size=len(y)) * setting.noise * y.std()
    fails = np.random.default_rng([seed, 3])
    measured = np.zeros(len(y), bool)
    rounds = []
    for number in range(setting.rounds):
        free = ~measured
        if name == "random" or (name.startswith("greedy") and number == 0):
            picks = first if number == 0 else rng.choice(np.flatnonzero(free), setting.batch, replace=False)
        elif name.startswith("greedy"):
            score = regressor.fit(features[measured], noisy[measured]).predict(features)
            score = np.where(free, score, -np.inf)
            picks = np.argsort(-score, kind="stable")[: setting.batch]
        else:
            known = [Known(pool.codes[measured], noisy[measured], np.ones(int(measured.sum())))]
            found = choose(
                eyes,
                pool,
                free,
                known,
                pool.codes[:0],
                setting.batch,
                seed * 1000 + number,
                method or Method(),
            )
            picks = np.array(found.rows)
        worked = picks[fails.random(len(picks)) >= setting.failed]
        measured[worked] = True
        rounds.append(worked)
    return rounds


def curves(rounds: Sequence[np.ndarray], y: np.ndarray) -> dict[str, list[float]]:
    """By round: best found (0 the table's median, 1 its maximum), share of the top 1 % found, regret."""
    low, high = float(np.median(y)), float(y.max())
    top = set(np.argsort(-y)[: max(1, len(y) // 100)].tolist())
    best, share, hit = [], [], set()
    reached = -np.inf
    for rows in rounds:
        reached = max(reached, float(y[rows].max())) if len(rows) else reached
        hit |= top & set(rows.tolist())
        best.append((reached - low) / (high - low))
        share.append(len(hit) / len(top))
    return {"best": best, "top": share, "regret": [1 - b for b in best]}


def paired(a: np.ndarray, b: np.ndarray) -> list[float | None]:
    """Mean of a - b over seeds, and its 95 % bootstrap interval, which one seed does not have."""
    gap = a - b
    if len(gap) == 1:
        return [round(float(gap[0]), 4), None, None]
    means = gap[np.random.default_rng(0).integers(len(gap), size=(4000, len(gap)))].mean(1)
    return [round(float(v), 4) for v in (gap.mean(), *np.quantile(means, [0.025, 0.975]))]


def summarise(found: dict[str, list[dict[str, list[float]]]]) -> dict[str, Any]:
    """Means by method and round, and paired differences of the campaign's curve to each other method."""
    best = {m: np.array([c["best"] for c in runs]) for m, runs in found.items()}
    out: dict[str, Any] = {
        m: {k: np.mean([c[k] for c in runs], 0).round(4).tolist() for k in ("best", "top", "regret")}
        for m, runs in found.items()
    }
    for other in found:
        if other != "campaign":
            gap = {"area": paired(best["campaign"].mean(1), best[other].mean(1))}
            for r in range(best[other].shape[1]):
                gap[f"round {r + 1}"] = paired(best["campaign"][:, r], best[other][:, r])
            out[f"campaign - {other}"] = gap
    return out

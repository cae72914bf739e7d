"""How good predictions are, per task, with bootstrap intervals. Missing labels (NaN, -1) are left out.

Regression: Spearman, R2, RMSE, MAE, NDCG. Binary: AUROC, average precision, F1, MCC, Brier score. Multiclass:
accuracy, macro F1, MCC (Gorodkin 2004), log loss. Multilabel: the binary scores of each label and their
macro means. Per residue: accuracy over labelled residues, macro F1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bioseq.ranking import auroc, average_precision, ndcg, spearman

MAIN = {
    "regression": "spearman",
    "binary": "auroc",
    "multiclass": "accuracy",
    "multilabel": "macro_auroc",
    "per_residue": "accuracy",
}
"""The score by which heads and baselines of a task are compared and chosen; higher is better."""


def r2(truth: np.ndarray, value: np.ndarray) -> float:
    """Coefficient of determination against the truth's own mean."""
    total = float(((truth - truth.mean()) ** 2).sum())
    return 1.0 - float(((truth - value) ** 2).sum()) / total if total > 0 else float("nan")


def rmse(truth: np.ndarray, value: np.ndarray) -> float:
    return float(np.sqrt(((truth - value) ** 2).mean())) if len(truth) else float("nan")


def f1(truth: np.ndarray, called: np.ndarray) -> float:
    """F1 of the positive class; NaN when there is neither a positive nor a call."""
    truth, called = np.asarray(truth, bool), np.asarray(called, bool)
    both = 2 * int((truth & called).sum())
    total = int(truth.sum()) + int(called.sum())
    return both / total if total else float("nan")


def mcc(truth: np.ndarray, called: np.ndarray) -> float:
    """Matthews correlation of class numbers, two or more classes (Gorodkin 2004); 0 when undefined."""
    truth, called = np.asarray(truth, np.int64), np.asarray(called, np.int64)
    n = len(truth)
    if not n:
        return float("nan")
    k = int(max(truth.max(), called.max())) + 1
    t, p = np.bincount(truth, minlength=k).astype(float), np.bincount(called, minlength=k).astype(float)
    hits = float((truth == called).sum())
    scale = np.sqrt((n * n - (p * p).sum()) * (n * n - (t * t).sum()))
    return float((hits * n - (t * p).sum()) / scale) if scale > 0 else 0.0


def _confusion_scores(truth: np.ndarray, called: np.ndarray, k: int) -> dict[str, float]:
    truth, called = truth.astype(np.int64), called.astype(np.int64)
    table = np.bincount(truth * k + called, minlength=k * k).reshape(k, k).astype(float)
    both, t, p = np.diag(table), table.sum(1), table.sum(0)
    present = t > 0
    f1s = 2 * both[present] / np.maximum(t[present] + p[present], 1)
    return {"accuracy": float(both.sum() / max(table.sum(), 1)), "macro_f1": float(f1s.mean())}


def regression(truth: np.ndarray, value: np.ndarray) -> dict[str, float]:
    """Scores of one target; float [N] each, NaN truth left out."""
    keep = ~np.isnan(truth)
    truth, value = truth[keep], value[keep]
    return {
        "spearman": spearman(truth, value),
        "r2": r2(truth, value),
        "rmse": rmse(truth, value),
        "mae": float(np.abs(truth - value).mean()) if len(truth) else float("nan"),
        "ndcg": ndcg(truth, value),
    }


def binary(truth: np.ndarray, probability: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """Scores of one 0/1 label; probability of 1 in [0, 1], NaN truth left out."""
    keep = ~np.isnan(truth)
    truth, probability = truth[keep], probability[keep]
    called = probability >= threshold
    return {
        "auroc": auroc(truth, probability),
        "average_precision": average_precision(truth, probability),
        "f1": f1(truth, called),
        "mcc": mcc(truth.astype(np.int64), called.astype(np.int64)),
        "brier": float(((probability - truth) ** 2).mean()) if len(truth) else float("nan"),
    }


def multiclass(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """`truth` class numbers with NaN or -1 missing [N]; `probabilities` [N, C]."""
    keep = ~np.isnan(truth) & (truth >= 0)
    truth, probabilities = truth[keep].astype(np.int64), probabilities[keep]
    if not len(truth):
        return {
            "accuracy": float("nan"),
            "macro_f1": float("nan"),
            "mcc": float("nan"),
            "log_loss": float("nan"),
        }
    called = probabilities.argmax(1)
    picked = probabilities[np.arange(len(truth)), truth]
    return {
        **_confusion_scores(truth, called, probabilities.shape[1]),
        "mcc": mcc(truth, called),
        "log_loss": float(-np.log(np.maximum(picked, 1e-12)).mean()),
    }


def multilabel(
    truth: np.ndarray, probabilities: np.ndarray, thresholds: Sequence[float] | np.ndarray | None = None
) -> dict[str, float]:
    """Macro means over labels [N, C]; labels that are undefined here (one class only) are left out."""
    limits = np.full(truth.shape[1], 0.5) if thresholds is None else np.asarray(thresholds)
    each = [binary(truth[:, j], probabilities[:, j], float(limits[j])) for j in range(truth.shape[1])]
    out = {}
    for key in ("auroc", "average_precision", "f1", "mcc", "brier"):
        values = [e[key] for e in each if not np.isnan(e[key])]
        out[f"macro_{key}"] = float(np.mean(values)) if values else float("nan")
    return out


def score(
    task: str,
    truth: np.ndarray,
    output: np.ndarray,
    *,
    thresholds: Sequence[float] | np.ndarray | None = None,
) -> dict[str, float]:
    """The task's scores. `truth` [N, T]; `output` values [N, T] for regression, probabilities else ([N, C]; for
    binary the probability of the second class in the last column). Several regression targets give the
    mean of each score."""
    if task == "regression":
        each = [regression(truth[:, j], output[:, j]) for j in range(truth.shape[1])]
        return {key: float(np.mean([e[key] for e in each])) for key in each[0]}
    if task == "binary":
        limit = 0.5 if thresholds is None else float(np.asarray(thresholds).ravel()[-1])
        return binary(truth[:, 0], output[:, -1], limit)
    if task == "multiclass":
        return multiclass(truth[:, 0], output)
    if task == "multilabel":
        return multilabel(truth, output, thresholds)
    if task == "per_residue":
        return multiclass(truth.ravel(), output)
    raise ValueError(f"unknown task {task!r}")


def bootstrap(
    n: int,
    scores: Callable[[np.ndarray], dict[str, float]],
    *,
    rounds: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Percentile intervals of `scores(places)` over `rounds` resamples of n items with replacement (Efron 1979).

    Resample whole items (proteins, not residues): residues of one protein are not independent.
    """
    rng = np.random.default_rng(seed)
    drawn = [scores(rng.integers(0, n, n)) for _ in range(rounds)]
    low, high = (1 - level) / 2, (1 + level) / 2
    out: dict[str, list[float]] = {}
    for key in drawn[0] if drawn else {}:
        values = np.array([d[key] for d in drawn], dtype=np.float64)
        values = values[~np.isnan(values)]
        out[key] = [float(v) for v in np.quantile(values, [low, high])] if len(values) else [float("nan")] * 2
    return out


def paired_bootstrap(
    n: int,
    difference: Callable[[np.ndarray], float],
    *,
    rounds: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(difference on all items, low, high) of a score of A minus the same score of B on the same resamples."""
    rng = np.random.default_rng(seed)
    drawn = np.array([difference(rng.integers(0, n, n)) for _ in range(rounds)])
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(difference(np.arange(n))), float(low), float(high)

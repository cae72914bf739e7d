"""How good predictions are, per task, by scikit-learn and scipy, with bootstrap intervals. Missing labels (NaN, -1)
are left out; a score that the data cannot define (one class only, a constant) is NaN.

Regression: Spearman, R2, RMSE, MAE, NDCG. Binary: AUROC, average precision, F1, MCC, Brier score. Multiclass:
accuracy, macro F1, MCC, log loss. Multilabel: the binary scores of each label and their macro means. Per residue:
as multiclass, over labelled residues.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata
from sklearn import config_context
from sklearn import metrics as sk

from bioseq.ranking import spearman

MAIN = {
    "regression": "spearman",
    "binary": "auroc",
    "multiclass": "accuracy",
    "multilabel": "macro_auroc",
    "per_residue": "accuracy",
}
"""The score by which heads and baselines of a task are compared and chosen; higher is better."""
NAN = float("nan")
Scorer = Callable[[np.ndarray], dict[str, float]]
"""From places of rows to scores."""


def auroc(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve from ranks (Mann & Whitney 1947): a bootstrap asks for it thousands of times."""
    positive = np.asarray(truth) > 0
    n, hits = len(positive), int(positive.sum())
    if not 0 < hits < n:
        return NAN
    return float((rankdata(score)[positive].sum() - hits * (hits + 1) / 2) / (hits * (n - hits)))


def regression(truth: np.ndarray, value: np.ndarray) -> dict[str, float]:
    """Scores of one target; float [N] each."""
    keep = ~np.isnan(truth)
    truth, value = truth[keep], value[keep]
    if len(truth) < 2:
        return dict.fromkeys(("spearman", "r2", "rmse", "mae", "ndcg"), NAN)
    gain = truth - truth.min()
    return {
        "spearman": spearman(truth, value),
        "r2": float(sk.r2_score(truth, value)) if gain.any() else NAN,
        "rmse": float(sk.root_mean_squared_error(truth, value)),
        "mae": float(sk.mean_absolute_error(truth, value)),
        "ndcg": float(sk.ndcg_score([gain], [value])) if gain.any() else NAN,
    }


def binary(truth: np.ndarray, probability: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """Scores of one 0/1 label; probability of 1 in [0, 1]."""
    keep = ~np.isnan(truth)
    truth, probability = truth[keep].astype(int), probability[keep]
    called = probability >= threshold
    return {
        "auroc": auroc(truth, probability),
        "average_precision": float(sk.average_precision_score(truth, probability)) if truth.any() else NAN,
        "f1": float(sk.f1_score(truth, called)) if truth.any() or called.any() else NAN,
        "mcc": float(sk.matthews_corrcoef(truth, called)) if len(truth) else NAN,
        "brier": float(((probability - truth) ** 2).mean()) if len(truth) else NAN,
    }


def from_confusion(table: np.ndarray, log_loss: float) -> dict[str, float]:
    """Scores of a confusion table [true, called] of counts, and the summed log loss."""
    total = table.sum()
    if not total:
        return dict.fromkeys(("accuracy", "macro_f1", "mcc", "log_loss"), NAN)
    truth, called = np.indices(table.shape).reshape(2, -1)
    weight, present = table.ravel(), np.flatnonzero(table.sum(1))
    f1 = sk.f1_score(truth, called, sample_weight=weight, labels=present, average="macro", zero_division=0.0)
    return {
        "accuracy": float(np.diag(table).sum() / total),
        "macro_f1": float(f1),
        "mcc": float(sk.matthews_corrcoef(truth, called, sample_weight=weight)),
        "log_loss": float(log_loss / total),
    }


def confusion(truth: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, float]:
    """(counts [C, C] by true and called class, summed log loss) of class numbers [N] and probabilities [N, C]."""
    k = probabilities.shape[1]
    keep = ~np.isnan(truth) & (truth >= 0)
    truth, probabilities = truth[keep].astype(np.int64), probabilities[keep]
    table = np.bincount(truth * k + probabilities.argmax(1), minlength=k * k).reshape(k, k)
    picked = probabilities[np.arange(len(truth)), truth]
    return table, float(-np.log(np.maximum(picked, 1e-12)).sum())


def multiclass(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """`truth` class numbers with NaN or -1 missing [N]; `probabilities` [N, C]."""
    return from_confusion(*confusion(np.asarray(truth, float), probabilities))


def multilabel(
    truth: np.ndarray, probabilities: np.ndarray, thresholds: Sequence[float] | np.ndarray | None = None
) -> dict[str, float]:
    """Macro means over labels [N, C]; labels that are undefined here (one class only) are left out."""
    limits = np.full(truth.shape[1], 0.5) if thresholds is None else np.asarray(thresholds)
    return _means(
        [binary(truth[:, j], probabilities[:, j], float(v)) for j, v in enumerate(limits)], "macro_"
    )


def _means(each: Sequence[dict[str, float]], prefix: str = "") -> dict[str, float]:
    out = {}
    for key in each[0]:
        values = [e[key] for e in each if not np.isnan(e[key])]
        out[prefix + key] = float(np.mean(values)) if values else NAN
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
        return _means([regression(truth[:, j], output[:, j]) for j in range(truth.shape[1])])
    if task == "binary":
        limit = 0.5 if thresholds is None else float(np.asarray(thresholds).ravel()[-1])
        return binary(truth[:, 0], output[:, -1], limit)
    if task == "multilabel":
        return multilabel(truth, output, thresholds)
    if task in ("multiclass", "per_residue"):
        return multiclass(truth.ravel(), output)
    raise ValueError(f"unknown task {task!r}")


def main_score(task: str, truth: np.ndarray, output: np.ndarray) -> float:
    """The task's main score alone, which choosing and paired intervals need many times."""
    if task == "regression":
        each = []
        for j in range(truth.shape[1]):
            keep = ~np.isnan(truth[:, j])
            each.append(spearman(truth[keep, j], output[keep, j]))
        return _mean(each)
    if task in ("multiclass", "per_residue"):
        truth = truth.ravel()
        keep = ~np.isnan(truth) & (truth >= 0)
        return float((output[keep].argmax(1) == truth[keep]).mean()) if keep.any() else NAN
    columns = output[:, -1:] if task == "binary" else output
    each = []
    for j in range(columns.shape[1]):
        keep = ~np.isnan(truth[:, j])
        each.append(auroc(truth[keep, j], columns[keep, j]))
    return _mean(each)


def _mean(values: Sequence[float]) -> float:
    present = [v for v in values if not np.isnan(v)]
    return float(np.mean(present)) if present else NAN


def _draws(groups: np.ndarray, rounds: int, seed: int) -> list[np.ndarray]:
    """Places of `rounds` resamples with replacement (Efron 1979). Whole groups are drawn: members of a family, or
    residues of a protein, are not independent."""
    rng = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return [
        np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        for _ in range(rounds)
    ]


def bootstrap(
    groups: np.ndarray, scores: Scorer, *, rounds: int = 200, level: float = 0.95, seed: int = 0
) -> dict[str, list[float]]:
    """Percentile intervals of `scores(places)` over resamples of the groups; int [N], the group of each row."""
    if not len(groups):
        return {}
    with config_context(skip_parameter_validation=True, assume_finite=True):
        drawn = [scores(rows) for rows in _draws(groups, rounds, seed)]
    return {key: list(_interval([d[key] for d in drawn], level)) for key in drawn[0]}


def paired_bootstrap(
    groups: np.ndarray,
    difference: Callable[[np.ndarray], float],
    *,
    rounds: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(difference on all rows, low, high) of a score of A minus the same score of B on the same resamples."""
    drawn = [difference(rows) for rows in _draws(groups, rounds, seed)]
    return (float(difference(np.arange(len(groups)))), *_interval(drawn, level))


def _interval(drawn: Sequence[float], level: float) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN gives NaN
        low, high = np.nanquantile(np.array(drawn, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

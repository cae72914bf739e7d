"""Heads on frozen features: every feature set and model is tried, the validation part chooses.

With 100 validation rows or more, models train on the training rows and are chosen and calibrated on the
validation rows. With fewer, one number on them says little: then 5-fold cross-validation over training and
validation rows chooses, its out-of-fold outputs calibrate (cross-conformal, Vovk 2015), and the chosen model
is fitted again on all of them. Networks then train a fixed number of epochs, since there is nothing to stop
on. The test part is never looked at here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bioseq.heads import features as blocks
from bioseq.heads.features import Context
from training.finetune.metrics import MAIN, main_score
from training.finetune.models.linear import (
    L2_LINEAR,
    L2_RIDGE,
    Layers,
    Standard,
    as_probabilities,
    class_weights,
    fit_logistic,
    fit_mlp,
    fit_ridge,
    forward,
    standardise,
)

FOLDS = 5
FEW = 100  # validation rows below which folds choose
FIXED_EPOCHS = 40
ANY_PROTEIN = (
    ("embedding",),
    ("embedding", "composition", "dipeptide", "terminal"),
    ("embedding", "composition", "dipeptide", "gapped", "terminal"),
)
ONE_PROTEIN = (
    ("embedding",),
    ("onehot", "masked_marginal"),
    ("embedding", "onehot", "properties", "mutations", "masked_marginal"),
    ("onehot", "properties", "mutations", "masked_marginal"),
)


@dataclass
class Rows:
    """What a fit needs: pooled embeddings [N, D], cleaned sequences, y [N, T], weights [N], of training rows
    first, then validation rows from `cut` on."""

    embeddings: np.ndarray
    sequences: list[str]
    y: np.ndarray
    weight: np.ndarray
    cut: int


@dataclass
class Chosen:
    """The winner: layers over standardised blocks; `calibration` raw outputs and labels of rows that it did not
    train on; `tried` every setting with its validation score."""

    blocks: tuple[str, ...]
    standard: Standard
    layers: Layers
    setting: dict[str, Any]
    out: np.ndarray
    y: np.ndarray
    offset: np.ndarray
    scale: np.ndarray
    tried: list[dict[str, Any]] = field(default_factory=list)


def feature_matrix(
    chosen: tuple[str, ...], embeddings: np.ndarray, sequences: list[str], context: Context
) -> tuple[np.ndarray, list[int]]:
    """[N, F] and the blocks' widths."""
    flat = embeddings.reshape(len(embeddings), -1)
    parts = [flat if b == "embedding" else blocks.compute(b, sequences, context) for b in chosen]
    return np.concatenate(parts, axis=1, dtype=np.float32), [p.shape[1] for p in parts]


def candidates(
    context: Context | None,
    models: tuple[str, ...],
    only: tuple[str, ...] | None,
    sets: tuple[tuple[str, ...], ...] | None = None,
) -> list[tuple[str, tuple[str, ...]]]:
    """(model, blocks) to try: every model on `sets` if they are given."""
    if sets is not None:
        return [(model, s) for model in models for s in sets]
    if only is not None:
        sets = (("embedding", *(b for b in only if b != "embedding")),)
    elif context is None:
        sets = ANY_PROTEIN
    else:
        sets = ONE_PROTEIN
        if context.odds is None:
            sets = tuple(dict.fromkeys(tuple(b for b in s if b != "masked_marginal") for s in sets))
    out = [("linear", s) for s in sets if "linear" in models]
    # networks on few sets only: the others say little more for their time
    rich = sets[-2:] if context is not None else tuple(dict.fromkeys((sets[0], sets[-1])))
    return out + [("mlp", s) for s in rich if "mlp" in models]


def _splits(n: int, cut: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    if n - cut >= FEW:
        return [(np.arange(cut), np.arange(cut, n))]
    fold = np.random.default_rng(seed).permutation(n) % FOLDS
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)]


def fit_frozen(
    task: str,
    rows: Rows,
    n_out: int,
    *,
    context: Context | None,
    models: tuple[str, ...] = ("linear", "mlp"),
    only: tuple[str, ...] | None = None,
    sets: tuple[tuple[str, ...], ...] | None = None,
    balance: str = "auto",
    seed: int = 0,
    tick: Callable[[str], None] | None = None,
) -> Chosen:
    """Try all candidates and return the best by the task's main score."""
    n = len(rows.y)
    folds = _splits(n, rows.cut, seed)
    held = np.concatenate([v for _, v in folds])
    order = np.argsort(held)
    best: Chosen | None = None
    best_score, tried = -np.inf, []
    for model, chosen in candidates(context, models, only, sets):
        x, widths = feature_matrix(chosen, rows.embeddings, rows.sequences, context or Context())
        runner = _linear if model == "linear" else _network
        here = -np.inf
        for setting, value, outs, refit in runner(task, x, widths, rows, n_out, folds, balance, seed):
            record = {"model": model, "blocks": list(chosen), **setting, "valid": round(float(value), 4)}
            tried.append(record)
            here = max(here, value)
            if value > best_score:
                best_score = value
                standard, layers, offset, scale = refit()
                raw = np.concatenate(outs)[order]
                best = Chosen(chosen, standard, layers, record, raw, rows.y[held[order]], offset, scale)
        if tick is not None:
            tick(f"{model} on {' + '.join(chosen)}: {MAIN[task]} {here:.3f} on validation")
    assert best is not None
    best.tried = tried
    return best


def _target_scale(task: str, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if task != "regression":
        return np.zeros(y.shape[1]), np.ones(y.shape[1])
    return np.nanmean(y, axis=0), np.maximum(np.nanstd(y, axis=0), 1e-12)


def _raw(task: str, layers: Layers, x: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    out = forward(layers, torch.from_numpy(x)).numpy()
    return out * scale + offset if task == "regression" else out


def _value(task: str, y: np.ndarray, raw: np.ndarray) -> float:
    value = main_score(task, y, as_probabilities(task, raw))
    return value if np.isfinite(value) else -np.inf


def _linear(
    task: str, x: np.ndarray, widths: list[int], rows: Rows, n_out: int,
    folds: list[tuple[np.ndarray, np.ndarray]], balance: str, seed: int,
) -> list[Any]:  # fmt: skip
    l2s = L2_RIDGE if task == "regression" else tuple(sorted(L2_LINEAR, reverse=True))
    outs: dict[float, list[np.ndarray]] = {a: [] for a in l2s}

    def path(
        train: np.ndarray, wanted: tuple[float, ...]
    ) -> tuple[Standard, list[tuple[float, Layers]], Any, Any]:
        offset, scale = _target_scale(task, rows.y[train])
        standard = standardise(x[train], widths)
        y = (rows.y[train] - offset) / scale
        if task == "regression":
            return standard, fit_ridge(standard(x[train]), y, rows.weight[train], wanted), offset, scale
        positive = class_weights(task, rows.y[train], n_out, balance)
        design, layers, fitted = standard(x[train]), None, []
        for a in wanted:
            layers = fit_logistic(task, design, y, rows.weight[train], positive, n_out, a, layers)
            fitted.append((a, layers))
        return standard, fitted, offset, scale

    last: Any = None
    for train, valid in folds:
        standard, fitted, offset, scale = last = path(train, l2s)
        for a, layers in fitted:
            outs[a].append(_raw(task, layers, standard(x[valid]), offset, scale))
    held = np.concatenate([v for _, v in folds])

    def refit(a: float) -> Callable[[], Any]:
        def make() -> Any:
            if len(folds) == 1:
                standard, fitted, offset, scale = last
            else:
                standard, fitted, offset, scale = path(np.arange(len(rows.y)), (a,))
            return standard, dict(fitted)[a], offset, scale

        return make

    return [({"l2": a}, _value(task, rows.y[held], np.concatenate(outs[a])), outs[a], refit(a)) for a in l2s]


def _network(
    task: str, x: np.ndarray, widths: list[int], rows: Rows, n_out: int,
    folds: list[tuple[np.ndarray, np.ndarray]], balance: str, seed: int,
) -> list[Any]:  # fmt: skip
    few = len(folds) > 1
    small = len(rows.y) < 1000 or sum(widths) < 200
    dropout, decay = (0.3, 0.1) if small else (0.5, 0.1)

    def fit(train: np.ndarray, valid: np.ndarray) -> Any:
        offset, scale = _target_scale(task, rows.y[train])
        standard = standardise(x[train], widths)
        checked, count = standard(x[valid]), [0]

        def value_of(layers: Layers) -> float:
            if few:  # nothing to stop on: the last epoch counts as the best
                count[0] += 1
                return float(count[0])
            return _value(task, rows.y[valid], _raw(task, layers, checked, offset, scale))

        layers, _, epoch = fit_mlp(
            task,
            standard(x[train]),
            (rows.y[train] - offset) / scale,
            rows.weight[train],
            class_weights(task, rows.y[train], n_out, balance),
            n_out,
            value_of,
            dropout=dropout,
            weight_decay=decay,
            epochs=FIXED_EPOCHS if few else 60,
            batch=64 if small else 256,
            seed=seed,
        )
        return standard, layers, offset, scale, epoch

    outs, last = [], None
    for train, valid in folds:
        last = fit(train, valid)
        standard, layers, offset, scale, _ = last
        outs.append(_raw(task, layers, standard(x[valid]), offset, scale))
    assert last is not None
    held = np.concatenate([v for _, v in folds])

    def refit() -> Any:
        return fit(np.arange(len(rows.y)), held[:0])[:4] if few else last[:4]

    setting = {"hidden": 96, "members": 3, "dropout": dropout, "weight_decay": decay, "epochs": last[4]}
    return [(setting, _value(task, rows.y[held], np.concatenate(outs)), outs, refit)]

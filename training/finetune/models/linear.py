"""Small models on fixed features: ridge, logistic regression and ensembles of two-layer networks.

All of them become plain tensors (`bioseq.heads.head`): layers of [M, in, out] over standardised features. Missing
labels (NaN) are masked; rows have weights. Features are standardised on the training rows, and each block is
divided by the square root of its width, so that an L2 penalty weighs blocks, not columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bioseq.heads.calibration import sigmoid, softmax
from training.finetune.metrics import main_score

Layers = list[tuple[torch.Tensor, torch.Tensor]]
L2_LINEAR = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
L2_RIDGE = tuple(float(v) for v in np.logspace(-4, 2, 13))
BLOCK_GAIN = 4.0


@dataclass
class Standard:
    """(x - mean) * scale, float32 [F] each; NaN (an embedding that was not computed) becomes the mean."""

    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.nan_to_num((x - self.mean) * self.scale, nan=0.0).astype(np.float32)


def standardise(x: np.ndarray, widths: Sequence[int]) -> Standard:
    """From training rows [N, F] made of blocks of these widths. Constant columns get scale 0."""
    mean = np.asarray(np.nanmean(x, axis=0, dtype=np.float64))
    spread = np.asarray(np.nanstd(x, axis=0, dtype=np.float64))
    size = np.concatenate([np.full(w, w, dtype=np.float64) for w in widths]) if len(widths) else np.ones(0)
    scale = np.where(spread > 1e-8, BLOCK_GAIN / np.maximum(spread, 1e-8) / np.sqrt(size), 0.0)
    return Standard(mean.astype(np.float32), scale.astype(np.float32))


def forward(layers: Layers, x: torch.Tensor) -> torch.Tensor:
    """[N, F] -> [N, C], as the head does it."""
    h = x[None]
    for i, (weight, bias) in enumerate(layers):
        h = F.gelu(h) if i else h
        h = torch.baddbmm(bias, h.expand(len(weight), -1, -1), weight)
    return h.mean(0)


def as_probabilities(task: str, out: np.ndarray) -> np.ndarray:
    """Outputs of a linear model or network as `training.finetune.metrics` takes them."""
    if task == "regression":
        return out
    return softmax(out) if task in ("multiclass", "per_residue") else sigmoid(out)


def task_loss(
    task: str, out: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, positive: torch.Tensor
) -> torch.Tensor:
    """Weighted mean loss over present labels. `y` [N, T] with NaN missing; `positive` [C] class weights."""
    if task == "multiclass":
        keep = ~torch.isnan(y[:, 0])
        target = y[keep, 0].long()
        rows = weight[keep] * positive[target]
        each = F.cross_entropy(out[keep], target, reduction="none")
        return (each * rows).sum() / rows.sum().clamp_min(1e-9)
    keep = ~torch.isnan(y)
    target = torch.where(keep, y, torch.zeros_like(y))
    if task == "regression":
        each, rows = (out - target) ** 2, weight[:, None].expand_as(target)
    else:
        each = F.binary_cross_entropy_with_logits(out, target, reduction="none")
        rows = weight[:, None] * torch.where(target > 0, positive, torch.ones_like(positive))
    rows = rows * keep
    return (each * rows).sum() / rows.sum().clamp_min(1e-9)


def class_weights(task: str, y: np.ndarray, classes: int, how: str) -> np.ndarray:
    """Weight of each class (multiclass) or of each label's positives; ones unless balanced. `auto` balances,
    by the square root of the ratio, where the rarest class has under 10 % of the rows."""
    out = np.ones(max(classes, 1))
    if task == "regression" or how == "none":
        return out
    if task == "multiclass":
        seen = y[~np.isnan(y[:, 0]), 0].astype(int)
        counts = np.maximum(np.bincount(seen, minlength=classes), 1)
        ratio = counts.max() / counts
    else:
        positive = np.maximum(np.nansum(y, axis=0), 1)
        ratio = np.maximum((~np.isnan(y)).sum(0) - positive, 1) / positive
    if how == "balanced":
        return ratio
    return np.sqrt(ratio) if ratio.max() > 9 else out


def fit_ridge(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, l2s: Sequence[float] = L2_RIDGE
) -> list[tuple[float, Layers]]:
    """Closed form for every penalty at once: min sum_i w_i (y_i - x_i b)^2 / sum w + l2 |b|^2, with intercept.
    Each target uses its own labelled rows."""
    out: list[list[np.ndarray]] = [[] for _ in l2s]
    for j in range(y.shape[1]):
        keep = ~np.isnan(y[:, j])
        w = weight[keep] / weight[keep].sum()
        xs, ys = x[keep].astype(np.float64), y[keep, j]
        mx, my = w @ xs, float(w @ ys)
        centred, root = (xs - mx), np.sqrt(w)[:, None]
        if centred.shape[1] <= centred.shape[0]:
            values, vectors = np.linalg.eigh((centred * root).T @ (centred * root))
            middle = vectors.T @ ((centred * w[:, None]).T @ (ys - my))
            solve: Callable[[float], np.ndarray] = lambda a: vectors @ (middle / (np.maximum(values, 0) + a))  # noqa: B023, E731
        else:
            design = centred * root
            values, vectors = np.linalg.eigh(design @ design.T)
            middle = vectors.T @ (root[:, 0] * (ys - my))
            solve = lambda a: design.T @ (vectors @ (middle / (np.maximum(values, 0) + a)))  # noqa: B023, E731
        for i, a in enumerate(l2s):
            b = solve(a)
            out[i].append(np.concatenate([b, [my - mx @ b]]))
    result = []
    for a, columns in zip(l2s, out):
        table = torch.from_numpy(np.column_stack(columns)).float()
        result.append((float(a), [(table[:-1][None], table[-1:][None])]))
    return result


def fit_logistic(
    task: str, x: np.ndarray, y: np.ndarray, weight: np.ndarray, positive: np.ndarray, classes: int, l2: float,
    start: Layers | None = None,
) -> Layers:  # fmt: skip
    """L-BFGS on the weighted log loss (mean over rows and labels) + l2 |W|^2 / outputs."""
    design, truth = torch.from_numpy(x), torch.from_numpy(y).float()
    rows, per_class = torch.from_numpy(weight).float(), torch.from_numpy(positive).float()
    w = torch.zeros(x.shape[1], classes) if start is None else start[0][0][0].clone()
    b = torch.zeros(1, classes) if start is None else start[0][1][0].clone()
    w.requires_grad_(), b.requires_grad_()
    optimiser = torch.optim.LBFGS(
        [w, b], max_iter=80, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = task_loss(task, design @ w + b, truth, rows, per_class) + l2 * (w * w).sum() / classes
        loss.backward()
        return loss

    optimiser.step(closure)
    return [(w.detach()[None], b.detach()[None])]


def fit_linear(
    task: str,
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    x_valid: np.ndarray,
    y_valid: np.ndarray,
    widths: Sequence[int],
    n_out: int,
    *,
    l2s: Sequence[float] | None = None,
    positive: np.ndarray | None = None,
) -> tuple[Callable[[np.ndarray], np.ndarray], list[dict[str, Any]], Any]:
    """Ridge or logistic regression at every L2; (the best's predict function, what was tried, (standard,
    layers) of the best). Chosen by the task's main score on validation."""
    standard = standardise(x, widths)
    design, checked = standard(x), torch.from_numpy(standard(x_valid))
    if task == "regression":
        path = fit_ridge(design, y, weight) if l2s is None else fit_ridge(design, y, weight, l2s)
    else:
        path, layers = [], None
        ones = np.ones(n_out) if positive is None else positive
        for l2 in sorted(L2_LINEAR if l2s is None else l2s, reverse=True):
            layers = fit_logistic(task, design, y, weight, ones, n_out, l2, layers)
            path.append((l2, layers))
    tried: list[dict[str, Any]] = []
    best = (-np.inf, path[0][1])
    for l2, layers in path:
        out = as_probabilities(task, forward(layers, checked).numpy())
        value = main_score(task, y_valid, out)
        tried.append({"l2": l2, "valid": value})
        if value > best[0]:
            best = (value, layers)
    layers = best[1]

    def predict(rows: np.ndarray) -> np.ndarray:
        return as_probabilities(task, forward(layers, torch.from_numpy(standard(rows))).numpy())

    return predict, tried, (standard, layers)


def fit_mlp(
    task: str,
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    positive: np.ndarray,
    classes: int,
    score: Callable[[Layers], float],
    *,
    hidden: int = 96,
    members: int = 3,
    weight_decay: float = 0.1,
    dropout: float = 0.5,
    epochs: int = 60,
    patience: int = 8,
    lr: float = 2e-3,
    batch: int = 256,
    seed: int = 0,
    tick: Callable[[], None] | None = None,
) -> tuple[Layers, float, int]:
    """(layers, best score, best epoch) of an ensemble trained side by side with AdamW; early stopping on
    `score(layers)` (higher is better), a running average of weights being what is scored and kept."""
    generator = torch.Generator().manual_seed(seed)
    design, truth = torch.from_numpy(x), torch.from_numpy(y).float()
    rows, per_class = torch.from_numpy(weight).float(), torch.from_numpy(positive).float()
    n, width = x.shape
    sizes = [width, hidden, classes]
    parameters = []
    for a, b in zip(sizes, sizes[1:]):
        bound = 1 / math.sqrt(a)
        parameters.append(
            (torch.rand(members, a, b, generator=generator) * 2 - 1).mul_(bound).requires_grad_()
        )
        parameters.append(torch.zeros(members, 1, b).requires_grad_())
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    batch = min(batch, max(16, n // 8))
    steps = math.ceil(n / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps, pct_start=0.1)
    average = [p.detach().clone() for p in parameters]
    best, best_layers, best_epoch, waited = -math.inf, None, 0, 0
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator)
        for at in range(0, n, batch):
            chosen = order[at : at + batch]
            h = torch.baddbmm(parameters[1], design[chosen][None].expand(members, -1, -1), parameters[0])
            keep = torch.rand(h.shape, generator=generator) >= dropout
            h = F.gelu(h) * keep / (1 - dropout)
            out = torch.baddbmm(parameters[3], h, parameters[2])
            losses = [task_loss(task, o, truth[chosen], rows[chosen], per_class) for o in out]
            loss = torch.stack(losses).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            decay = min(0.98, 1 - 1 / (1 + epoch * steps + at // batch))
            with torch.no_grad():
                for kept, now in zip(average, parameters):
                    kept.lerp_(now, 1 - decay)
        layers = [(average[0].clone(), average[1].clone()), (average[2].clone(), average[3].clone())]
        now_score = score(layers)
        if tick is not None:
            tick()
        if now_score > best + 1e-5:
            best, best_layers, best_epoch, waited = now_score, layers, epoch + 1, 0
        else:
            waited += 1
            if waited >= patience:
                break
    assert best_layers is not None
    return best_layers, best, best_epoch

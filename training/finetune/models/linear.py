"""Small models on fixed features that become plain tensors (`bioseq.heads.head`): ridge and logistic regression here,
networks in `network`.

Missing labels (NaN) are masked; rows have weights. Features are standardised on the training rows, and each block is
divided by the square root of its width, so that an L2 penalty weighs blocks, not columns. Blocks that already speak of
the label (`FREE`) are scaled up, so that the penalty hardly touches them (Hsu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import cho_factor, cho_solve

from bioseq.heads.calibration import sigmoid, softmax

Layers = list[tuple[torch.Tensor, torch.Tensor]]
L2_LINEAR = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
L2_RIDGE = tuple(float(v) for v in np.logspace(-4, 2, 13))
BLOCK_GAIN = 4.0
FREE, FREE_GAIN = ("masked_marginal", "homology"), 30.0


@dataclass
class Standard:
    """(x - mean) * scale, float32 [F] each; NaN (an embedding that was not computed) becomes the mean."""

    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.nan_to_num((x - self.mean) * self.scale, nan=0.0).astype(np.float32)


def standardise(
    x: np.ndarray, widths: Sequence[int], gains: Sequence[float] | None = None, even: Sequence[bool] = ()
) -> Standard:
    """From training rows [N, F] made of blocks of these widths. Constant columns get scale 0. The columns of an `even`
    block share one scale: a substitution that few rows have is not believed more than one that many have."""
    mean = np.asarray(np.nanmean(x, axis=0, dtype=np.float64))
    spread = np.asarray(np.nanstd(x, axis=0, dtype=np.float64))
    at = 0
    for w, same in zip(widths, even):
        own = spread[at : at + w]
        if same and own.any():
            spread[at : at + w] = np.where(own > 1e-8, np.sqrt((own**2).sum() / (own > 1e-8).sum()), 0.0)
        at += w
    gain = np.concatenate(
        [np.full(w, g / np.sqrt(max(w, 1))) for w, g in zip(widths, gains or [1.0] * len(widths))]
    )
    scale = np.where(spread > 1e-8, BLOCK_GAIN * gain / np.maximum(spread, 1e-8), 0.0)
    return Standard(mean.astype(np.float32), scale.astype(np.float32))


@dataclass
class Net:
    """Layers of [M, in, out] and [M, 1, out], GELU between; `skip` [M, H, out] leads from the last H inputs straight
    to the outputs."""

    layers: Layers
    skip: torch.Tensor | None = None

    def members(self, x: torch.Tensor) -> torch.Tensor:
        """[M, N, C] of [N, F], as the head does it."""
        h = x[None]
        for i, (weight, bias) in enumerate(self.layers):
            h = F.gelu(h) if i else h
            h = torch.baddbmm(bias, h.expand(len(weight), -1, -1), weight)
        if self.skip is not None:
            h = h + x[:, -self.skip.shape[1] :] @ self.skip
        return h

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.members(x).mean(0)

    def tensors(self) -> dict[str, torch.Tensor]:
        out = {} if self.skip is None else {"skip.weight": self.skip}
        for i, (weight, bias) in enumerate(self.layers):
            out |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
        return out


def stack(nets: Sequence[Net]) -> Net:
    """One net of all members."""
    layers = [
        (torch.cat([n.layers[i][0] for n in nets]), torch.cat([n.layers[i][1] for n in nets]))
        for i in range(len(nets[0].layers))
    ]
    return Net(layers)


def as_probabilities(task: str, out: np.ndarray) -> np.ndarray:
    """Outputs of a linear model or network as `training.finetune.metrics` takes them."""
    if task == "regression":
        return out
    return softmax(out) if task in ("multiclass", "per_residue") else sigmoid(out)


def task_loss(
    task: str, out: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, positive: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted sum of the loss, sum of the weights) over present labels. `y` [N, T] with NaN missing; `positive` [C]
    class weights."""
    if task == "multiclass":
        keep = ~torch.isnan(y[:, 0])
        target = y[keep, 0].long()
        rows = weight[keep] * positive[target]
        return (F.cross_entropy(out[keep], target, reduction="none") * rows).sum(), rows.sum()
    keep = ~torch.isnan(y)
    target = torch.where(keep, y, torch.zeros_like(y))
    if task == "regression":
        each, rows = (out - target) ** 2, weight[:, None].expand_as(target)
    else:
        each = F.binary_cross_entropy_with_logits(out, target, reduction="none")
        rows = weight[:, None] * torch.where(target > 0, positive, torch.ones_like(positive))
    rows = rows * keep
    return (each * rows).sum(), rows.sum()


def mean_loss(parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return parts[0] / parts[1].clamp_min(1e-9)


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
) -> list[tuple[float, Net]]:
    """Closed form for every penalty: min sum_i w_i (y_i - x_i b)^2 / sum w + l2 |b|^2, with intercept, by Cholesky
    factors of the smaller Gram matrix. Each target uses its own labelled rows."""
    live = np.flatnonzero(x.any(0))  # columns of residues that no row has are 0, and so are their weights
    out: list[list[np.ndarray]] = [[] for _ in l2s]
    for j in range(y.shape[1]):
        keep = ~np.isnan(y[:, j])
        w = weight[keep] / weight[keep].sum()
        xs, ys = x[np.ix_(keep, live)].astype(np.float64), y[keep, j]
        mx, my = w @ xs, float(w @ ys)
        root = np.sqrt(w)
        design, target = (xs - mx) * root[:, None], (ys - my) * root
        wide = design.shape[1] > design.shape[0]
        gram = design @ design.T if wide else design.T @ design
        right = target if wide else design.T @ target
        diagonal = gram.diagonal().copy()
        for i, a in enumerate(l2s):
            np.fill_diagonal(gram, diagonal + a)
            solved = cho_solve(cho_factor(gram, check_finite=False), right, check_finite=False)
            b = np.zeros(x.shape[1])
            b[live] = design.T @ solved if wide else solved
            out[i].append(np.concatenate([b, [my - mx @ b[live]]]))
    result = []
    for a, columns in zip(l2s, out):
        table = torch.from_numpy(np.column_stack(columns)).float()
        result.append((float(a), Net([(table[:-1][None], table[-1:][None])])))
    return result


def fit_logistic(
    task: str, x: np.ndarray, y: np.ndarray, weight: np.ndarray, positive: np.ndarray, classes: int, l2: float,
    start: Net | None = None,
) -> Net:  # fmt: skip
    """L-BFGS on the weighted log loss (mean over rows and labels) + l2 |W|^2 / outputs."""
    design, truth = torch.from_numpy(x), torch.from_numpy(y).float()
    rows, per_class = torch.from_numpy(weight).float(), torch.from_numpy(positive).float()
    w = torch.zeros(x.shape[1], classes) if start is None else start.layers[0][0][0].clone()
    b = torch.zeros(1, classes) if start is None else start.layers[0][1][0].clone()
    w.requires_grad_(), b.requires_grad_()
    optimiser = torch.optim.LBFGS(
        [w, b], max_iter=80, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = (
            mean_loss(task_loss(task, design @ w + b, truth, rows, per_class)) + l2 * (w * w).sum() / classes
        )
        loss.backward()
        return loss

    optimiser.step(closure)
    return Net([(w.detach()[None], b.detach()[None])])

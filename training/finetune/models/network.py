"""Ensembles of two-layer networks on fixed features, trained side by side."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from training.finetune.models.linear import Net, mean_loss, task_loss


def fit_network(
    task: str,
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    positive: np.ndarray,
    classes: int,
    score: Callable[[Net], float],
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
) -> tuple[Net, float, int]:
    """(net, best score, best epoch) of an ensemble trained with AdamW; early stopping on `score(net)` (higher is
    better), a running average of weights being what is scored and kept."""
    generator = torch.Generator().manual_seed(seed)
    design, truth = torch.from_numpy(x), torch.from_numpy(y).float()
    rows, per_class = torch.from_numpy(weight).float(), torch.from_numpy(positive).float()
    n, width = x.shape
    parameters = []
    for a, b in ((width, hidden), (hidden, classes)):
        bound = 1 / math.sqrt(a)
        parameters.append(
            (torch.rand(members, a, b, generator=generator) * 2 - 1).mul_(bound).requires_grad_()
        )
        parameters.append(torch.zeros(members, 1, b).requires_grad_())
    # One call for all members and tensors, where rounding may differ from the shipped (multilabel) heads' own loop.
    together = task == "regression"
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=together)
    batch = min(batch, max(16, n // 8))
    steps = math.ceil(n / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps, pct_start=0.1)
    average = [p.detach().clone() for p in parameters]
    best, kept, best_epoch, waited = -math.inf, _net(average), 0, 0
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator)
        for at in range(0, n, batch):
            chosen = order[at : at + batch]
            h = torch.baddbmm(parameters[1], design[chosen][None].expand(members, -1, -1), parameters[0])
            keep = torch.rand(h.shape, generator=generator) >= dropout
            out = torch.baddbmm(parameters[3], F.gelu(h) * keep / (1 - dropout), parameters[2])
            if together:
                loss = _squares(out, truth[chosen], rows[chosen])
            else:
                losses = [mean_loss(task_loss(task, o, truth[chosen], rows[chosen], per_class)) for o in out]
                loss = torch.stack(losses).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            decay = min(0.98, 1 - 1 / (1 + epoch * steps + at // batch))
            with torch.no_grad():
                for mean, now in zip(average, parameters):
                    mean.lerp_(now, 1 - decay)
        net = _net(average)
        value = score(net)
        if value > best + 1e-5:
            best, kept, best_epoch, waited = value, net, epoch + 1, 0
        else:
            waited += 1
            if waited >= patience:
                break
    return kept, best, best_epoch


def _squares(out: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum over members of `mean_loss` of a regression; [M, N, T], [N, T] with NaN missing, [N]."""
    keep = ~torch.isnan(y)
    rows = weight[:, None] * keep
    return ((out - torch.where(keep, y, 0.0)) ** 2 * rows).sum() / rows.sum().clamp_min(1e-9)


def _net(tensors: list[torch.Tensor]) -> Net:
    t = [v.clone() for v in tensors]
    return Net([(t[0], t[1]), (t[2], t[3])])

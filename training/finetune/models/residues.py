"""Per-residue heads: three 1D convolutions over the residues' embeddings and letters, early stopped.

The receptive field is 1 + 2 * (kernel - 1) residues. Proteins of a batch lie in one row with gaps as wide as
the kernels reach, so that none sees another; that is also how the head computes (`bioseq.heads.head`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bioseq.heads.head import residue_inputs

Convolutions = list[tuple[torch.Tensor, torch.Tensor]]
HIDDEN, KERNEL = 64, 11


@dataclass
class ResidueFit:
    convolutions: Convolutions
    mean: np.ndarray
    scale: np.ndarray
    epoch: int
    score: float


class Stack(nn.Module):
    def __init__(self, width: int, classes: int, dropout: float):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(width, HIDDEN, 1),
                nn.Conv1d(HIDDEN, HIDDEN, KERNEL, padding=KERNEL // 2),
                nn.Conv1d(HIDDEN, classes, KERNEL, padding=KERNEL // 2),
            ]
        )
        self.dropout = dropout

    def forward(self, x_FT: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        for i, conv in enumerate(self.convs):
            if i:
                x_FT = F.dropout(F.gelu(x_FT), self.dropout, self.training)
            x_FT = conv(x_FT) * inside
        return x_FT[0].T

    def tensors(self) -> Convolutions:
        return [(c.weight.detach().clone(), c.bias.detach().clone()) for c in self.convs]  # type: ignore[operator]


def lay(inputs: list[torch.Tensor], gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row [1, F, T] of inputs [L_i, F] with gaps of zeros, and the mask [1, 1, T] of residues."""
    empty = torch.zeros(gap, inputs[0].shape[1])
    x = torch.cat([part for i in inputs for part in (i, empty)])
    inside = torch.cat([part for i in inputs for part in (torch.ones(len(i)), torch.zeros(gap))])
    return x.T[None], inside[None, None]


def fit_residues(
    features: list[np.ndarray],
    sequences: list[str],
    states: list[np.ndarray],
    weights: np.ndarray,
    valid: tuple[list[np.ndarray], list[str], list[np.ndarray]],
    classes: int,
    *,
    epochs: int = 15,
    patience: int = 3,
    lr: float = 3e-3,
    batch: int = 12,
    dropout: float = 0.2,
    seed: int = 0,
    tick: Callable[[str], None] | None = None,
) -> ResidueFit:
    """Train on [L_i, D] features and int [L_i] states (-1 masked), stop on the validation proteins' accuracy."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sample = np.concatenate(
        [residue_inputs(f, s) for f, s in zip(features[:300], sequences[:300])], dtype=np.float32
    )
    mean, spread = sample.mean(0), sample.std(0)
    mean[-21:], spread[-21:] = 0.0, 1.0  # letters stay 0 and 1
    scale = np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0).astype(np.float32)

    def inputs(f: np.ndarray, s: str) -> torch.Tensor:
        return torch.from_numpy((residue_inputs(f, s) - mean) * scale)

    model = Stack(sample.shape[1], classes, dropout)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = max(1, -(-len(features) // batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps, pct_start=0.1)
    gap = KERNEL // 2 * 2
    best, kept, best_epoch, waited = -1.0, model.tensors(), 0, 0
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(features), generator=generator).split(batch):
            chosen = rows.tolist()
            x, inside = lay([inputs(features[i], sequences[i]) for i in chosen], gap)
            target = torch.cat(
                [t for i in chosen for t in (torch.from_numpy(states[i]), torch.full((gap,), -1))]
            )
            each = F.cross_entropy(model(x, inside), target, ignore_index=-1, reduction="none")
            row_weight = torch.cat(
                [torch.full((len(states[i]) + gap,), float(weights[i])) for i in chosen]
            ) * (target >= 0)
            loss = (each * row_weight).sum() / row_weight.sum().clamp_min(1e-9)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        model.eval()
        value = accuracy(model, [inputs(f, s) for f, s in zip(*valid[:2])], valid[2], gap)
        if tick is not None:
            tick(f"epoch {epoch + 1}: accuracy {value:.4f} on validation residues")
        if value > best:
            best, kept, best_epoch, waited = value, copy.deepcopy(model.tensors()), epoch + 1, 0
        else:
            waited += 1
            if waited >= patience:
                break
    return ResidueFit(kept, mean.astype(np.float32), scale, best_epoch, best)


@torch.inference_mode()
def accuracy(model: Stack, inputs: list[torch.Tensor], states: list[np.ndarray], gap: int) -> float:
    right = total = 0
    for x, truth in zip(inputs, states):
        called = model(*lay([x], gap))[: len(truth)].argmax(1).numpy()
        right += int((called == truth)[truth >= 0].sum())
        total += int((truth >= 0).sum())
    return right / max(total, 1)

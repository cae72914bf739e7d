"""Per-residue heads: three 1D convolutions over the residues' embeddings and letters, early stopped.

The receptive field is 1 + 2 * (kernel - 1) residues. Proteins of a batch lie in one row with gaps as wide as
the kernels reach, so that none sees another; that is also how the head computes (`bioseq.heads.head`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bioseq.backbones.pooling import EmbedOptions
from bioseq.heads.calibration import softmax
from bioseq.heads.features import Context
from bioseq.heads.head import Head, clean
from bioseq.heads.residues import residue_inputs
from bioseq.homologs.mmseqs import find_mmseqs
from bioseq.inference.predictor import Predictor
from bioseq.specs.finetune import FinetuneSpec
from training.finetune import homologs
from training.finetune.embeddings import embed_cached
from training.finetune.fit import Fit, head_settings, say
from training.tables.labels import Labels
from training.tables.splits import Split

Convolutions = list[tuple[torch.Tensor, torch.Tensor]]
HIDDEN, KERNEL = 64, 11


@dataclass
class ResidueFit:
    convolutions: Convolutions
    mean: np.ndarray
    scale: np.ndarray
    epoch: int
    score: float
    skip: torch.Tensor | None = None


class Stack(nn.Module):
    def __init__(self, width: int, classes: int, dropout: float, block: int):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(width, HIDDEN, 1),
                nn.Conv1d(HIDDEN, HIDDEN, KERNEL, padding=KERNEL // 2),
                nn.Conv1d(HIDDEN, classes, KERNEL, padding=KERNEL // 2),
            ]
        )
        self.dropout, self.skip = dropout, None
        if block:  # the residue block begins as what it says itself: its first columns are log labels
            self.skip = nn.Parameter(torch.eye(block, classes))

    def forward(self, x_FT: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        first_FT = x_FT
        for i, conv in enumerate(self.convs):
            if i:
                x_FT = F.dropout(F.gelu(x_FT), self.dropout, self.training)
            x_FT = conv(x_FT) * inside
        out = x_FT[0].T
        return out if self.skip is None else out + first_FT[0, -len(self.skip) :].T @ self.skip

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
    block: tuple[list[np.ndarray], list[np.ndarray]] | None = None,
    epochs: int = 15,
    patience: int = 3,
    lr: float = 3e-3,
    batch: int = 12,
    dropout: float = 0.2,
    seed: int = 0,
    tick: Callable[[str], None] | None = None,
) -> ResidueFit:
    """Train on [L_i, D] features and int [L_i] states (-1 masked), stop on the validation proteins' accuracy.
    `block` are the residue blocks of the training and the validation proteins."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    extra = block[0] if block else None
    width = extra[0].shape[1] if extra else 0
    some = range(min(300, len(features)))
    sample = np.concatenate(
        [residue_inputs(features[i], sequences[i], extra[i] if extra else None) for i in some]
    )
    mean, spread = sample.mean(0), sample.std(0)
    if width:  # labels stay logs, letters and shares stay between 0 and 1
        mean[-width:], spread[-width:] = 0.0, 1.0
    end = len(mean) - width
    mean[end - 21 : end], spread[end - 21 : end] = 0.0, 1.0
    scale = np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0).astype(np.float32)

    def inputs(f: np.ndarray, s: str, b: np.ndarray | None) -> torch.Tensor:
        return torch.from_numpy((residue_inputs(f, s, b) - mean) * scale)

    model = Stack(sample.shape[1], classes, dropout, width)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = max(1, -(-len(features) // batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps, pct_start=0.1)
    gap = KERNEL // 2 * 2
    checked = [
        inputs(f, t, block[1][i] if block else None) for i, (f, t) in enumerate(zip(valid[0], valid[1]))
    ]
    best, best_epoch, waited = -1.0, 0, 0
    kept, skip = model.tensors(), None
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(features), generator=generator).split(batch):
            chosen = rows.tolist()
            x, inside = lay(
                [inputs(features[i], sequences[i], extra[i] if extra else None) for i in chosen], gap
            )
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
        value = accuracy(model, checked, valid[2], gap)
        if tick is not None:
            tick(f"epoch {epoch + 1}: accuracy {value:.4f} on validation residues")
        if value > best:
            best, kept, best_epoch, waited = value, model.tensors(), epoch + 1, 0
            skip = None if model.skip is None else model.skip.detach().clone()[None]
        else:
            waited += 1
            if waited >= patience:
                break
    return ResidueFit(kept, mean.astype(np.float32), scale, best_epoch, best, skip)


@torch.inference_mode()
def accuracy(model: Stack, inputs: list[torch.Tensor], states: list[np.ndarray], gap: int) -> float:
    right = total = 0
    for x, truth in zip(inputs, states):
        called = model(*lay([x], gap))[: len(truth)].argmax(1).numpy()
        right += int((called == truth)[truth >= 0].sum())
        total += int((truth >= 0).sum())
    return right / max(total, 1)


def fit_residue_head(
    spec: FinetuneSpec,
    split: Split,
    places: dict[str, np.ndarray],
    parts: dict[str, Labels],
    predictor: Predictor,
    *,
    scratch: Path,
) -> Fit:
    """Convolutions on frozen features, stopped and calibrated on the validation proteins."""
    options = EmbedOptions(per_residue=True)
    everything = parts["train"]
    embedded = np.arange(len(everything))
    if spec.max_embedded is not None and spec.max_embedded < len(everything):
        draw = np.random.default_rng(spec.seed).choice(len(everything), spec.max_embedded, replace=False)
        embedded = np.sort(draw)  # the others are searched for homologs alone
    parts = parts | {"train": everything.take(embedded)}
    features = {
        part: embed_cached(
            predictor, some.sequences, ask=options, cache=spec.cache, label=f"embedding the {part} rows"
        )[0]
        for part, some in parts.items()
    }
    train, valid = parts["train"], parts["valid"]
    assert train.residues is not None and valid.residues is not None
    training, links, blocks = None, {}, {}
    if spec.homologs == "auto" and predictor.alphabet.name == "protein":
        if find_mmseqs() is None:
            say("MMseqs2 is not installed: no homologs are searched among the training rows")
        else:
            training = homologs.training_rows(
                everything, scratch / "homologs", unit=None, licence=spec.licence, variants=False
            )
            for part, some in parts.items():
                links[part], blocks[part] = homologs.residue_blocks_cached(
                    [clean(s) for s in some.sequences],
                    training,
                    cache=spec.cache,
                    label=f"homologs of the {part} rows",
                )
    tried: list[dict[str, Any]] = []
    best: tuple[ResidueFit, dict[str, Any], tuple[str, ...]] | None = None
    chosen: tuple[str, ...]
    for chosen in (("embedding",), ("embedding", "homology")):
        if "homology" in chosen and not blocks:
            continue
        got = fit_residues(
            features["train"],
            [clean(s) for s in train.sequences],
            train.residues,
            train.weights,
            (features["valid"], [clean(s) for s in valid.sequences], valid.residues),
            len(train.classes),
            block=(blocks["train"], blocks["valid"]) if "homology" in chosen else None,
            seed=spec.seed,
            tick=say,
        )
        setting = {"model": "convolutions", "hidden": HIDDEN, "kernel": KERNEL, "epochs": got.epoch}
        record = {**setting, "blocks": list(chosen), "valid": round(got.score, 4)}
        tried.append(record)
        if best is None or got.score > best[0].score:
            best = got, record, chosen
    assert best is not None
    got, record, chosen = best
    tensors = {"features.mean": torch.from_numpy(got.mean), "features.scale": torch.from_numpy(got.scale)}
    for i, (weight, bias) in enumerate(got.convolutions):
        tensors |= {f"conv.{i}.weight": weight, f"conv.{i}.bias": bias}
    if got.skip is not None:
        tensors["skip.weight"] = got.skip
    return Fit(
        head_settings(train, "frozen", chosen, Context()),
        tensors,
        features,
        everything,
        "the validation proteins, which also stopped the training, so the figures on the test part are the check",
        chosen=record,
        tried=tried,
        embedded=embedded,
        links=links,
        blocks=blocks,
        training=training,
    )


def outputs_of(fit: Fit, test: Labels) -> list[np.ndarray]:
    """Uncalibrated probabilities on the test part, a list of [L, C]."""
    head = Head(
        "probe", "per_residue", list(test.classes), fit.settings, _plain_tensors(fit), {}, rows=fit.training
    )
    told = fit.blocks["test"] if "homology" in head.blocks else None
    raw = head.raw(fit.features["test"], [clean(s) for s in test.sequences], None, told)
    return [softmax(r.astype(np.float64)) for r in raw]


def _plain_tensors(fit: Fit) -> dict[str, torch.Tensor]:
    width = len(fit.tensors["features.mean"])
    return fit.tensors | {
        "ood.mean": torch.zeros(width),
        "ood.project": torch.zeros(width, 1),
        "ood.grid": torch.zeros(101),
    }

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
from bioseq.heads.features import Context, clean
from bioseq.heads.head import Head
from bioseq.heads.residues import flat_residues, residue_inputs
from bioseq.homologs.mmseqs import find_mmseqs
from bioseq.inference.predictor import Predictor
from bioseq.specs.finetune import PROFILE, FinetuneSpec
from training.finetune import homologs
from training.finetune.embeddings import embed_cached
from training.finetune.fit import Fit, head_settings, say
from training.tables.labels import Labels
from training.tables.splits import Split

Convolutions = list[tuple[torch.Tensor, torch.Tensor]]
HIDDEN, KERNEL = 64, 11
PASSES = 40_000  # proteins seen in all, in 4 to 15 epochs


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


@dataclass
class Proteins:
    """Proteins of one part: cleaned sequences, int [L_i] states (-1 masked), and what the head reads beside the
    letters, where it does: embeddings [L_i, D], profile blocks [L_i, 21], blocks of transferred labels [L_i, B]."""

    sequences: list[str]
    states: list[np.ndarray]
    weights: np.ndarray
    features: list[np.ndarray] | None = None
    profiles: list[np.ndarray] | None = None
    labels: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def inputs(self, i: int) -> np.ndarray:
        parts = [None if p is None else p[i] for p in (self.features, self.profiles, self.labels)]
        return residue_inputs(parts[0], self.sequences[i], *parts[1:])


def fit_residues(
    train: Proteins,
    valid: Proteins,
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
    """Train, and stop on the validation proteins' accuracy."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    skip_width = train.labels[0].shape[1] if train.labels else 0
    sample = np.concatenate([train.inputs(i) for i in range(min(300, len(train)))])
    mean, spread = sample.mean(0), sample.std(0)
    # letters, log-odds, log labels and shares stay what they are
    own = len(mean) - (flat_residues(train.features[0]).shape[1] if train.features else 0)
    mean[-own:], spread[-own:] = 0.0, 1.0
    scale = np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0).astype(np.float32)

    def inputs(part: Proteins, i: int) -> torch.Tensor:
        return torch.from_numpy((part.inputs(i) - mean) * scale)

    model = Stack(sample.shape[1], classes, dropout, skip_width)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = max(1, -(-len(train) // batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps, pct_start=0.1)
    gap = KERNEL // 2 * 2
    checked = [inputs(valid, i) for i in range(len(valid))]
    best, best_epoch, waited = -1.0, 0, 0
    kept, skip = model.tensors(), None
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(train), generator=generator).split(batch):
            chosen = rows.tolist()
            x, inside = lay([inputs(train, i) for i in chosen], gap)
            target = torch.cat(
                [t for i in chosen for t in (torch.from_numpy(train.states[i]), torch.full((gap,), -1))]
            )
            each = F.cross_entropy(model(x, inside), target, ignore_index=-1, reduction="none")
            row_weight = torch.cat(
                [torch.full((len(train.states[i]) + gap,), float(train.weights[i])) for i in chosen]
            ) * (target >= 0)
            loss = (each * row_weight).sum() / row_weight.sum().clamp_min(1e-9)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        model.eval()
        value = accuracy(model, checked, valid.states, gap)
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
    features = {
        part: embed_cached(
            predictor, some.sequences, ask=options, cache=spec.cache, label=f"embedding the {part} rows"
        )[0]
        for part, some in (parts | {"train": everything.take(embedded)}).items()
    }
    texts = {part: [clean(s) for s in some.sequences] for part, some in parts.items()}
    training, links, blocks, profiles = None, {}, {}, {}
    alphabet = predictor.alphabet.name
    found: dict[str, Any] = {"cache": spec.cache}
    if spec.homologs == "auto" and alphabet == "protein":
        if find_mmseqs() is None:
            say("MMseqs2 is not installed: no homologs are searched among the training rows")
        else:
            training = homologs.training_rows(
                everything, scratch / "homologs", unit=None, licence=spec.licence, variants=False
            )
            for part in parts:
                links[part], blocks[part] = homologs.residue_blocks_cached(
                    texts[part], training, label=f"homologs of the {part} rows", **found
                )
    if homologs.wants_profiles(spec, len(everything) + len(parts["valid"]), alphabet):
        for part in parts:
            profiles[part] = homologs.profiles_cached(
                texts[part],
                per_residue=True,
                threads=spec.threads,
                label=f"profiles of the {part} rows",
                **found,
            )

    def proteins(part: str, chosen: tuple[str, ...]) -> Proteins:
        """What a set of blocks reads of a part; all training rows where it does not read embeddings."""
        some = np.arange(len(parts[part]))
        if part == "train" and "embedding" in chosen:
            some = embedded
        rows = parts[part].take(some)
        assert rows.residues is not None

        def of(block: str, values: dict[str, list[np.ndarray]]) -> list[np.ndarray] | None:
            return [values[part][i] for i in some] if block in chosen else None

        return Proteins(
            [texts[part][i] for i in some],
            rows.residues,
            rows.weights,
            features[part] if "embedding" in chosen else None,
            of(PROFILE, profiles),
            of("homology", blocks),
        )

    sets: list[tuple[str, ...]] = [("embedding",), ("embedding", "homology")] if blocks else [("embedding",)]
    if profiles:  # embeddings alone are not worth their time then
        sets = [*sets[-1:], (PROFILE, *sets[-1][1:])]
    tried: list[dict[str, Any]] = []
    best: tuple[ResidueFit, dict[str, Any], tuple[str, ...]] | None = None
    for chosen in sets:
        fitted = proteins("train", chosen)
        got = fit_residues(
            fitted,
            proteins("valid", chosen),
            len(everything.classes),
            epochs=max(4, min(15, PASSES // len(fitted))),
            seed=spec.seed,
            tick=say,
        )
        setting = {"model": "convolutions", "hidden": HIDDEN, "kernel": KERNEL, "epochs": got.epoch}
        record = {**setting, "blocks": list(chosen), "rows": len(fitted), "valid": round(got.score, 4)}
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
        head_settings(everything, "frozen", chosen, Context()),
        tensors,
        features,
        everything,
        "the validation proteins, which also stopped the training, so the figures on the test part are the check",
        chosen=record,
        tried=tried,
        embedded=embedded,
        links=links,
        blocks=blocks,
        profiles=profiles,
        training=training,
    )


def outputs_of(fit: Fit, test: Labels) -> list[np.ndarray]:
    """Uncalibrated probabilities on the test part, a list of [L, C]."""
    head = Head(
        "probe", "per_residue", list(test.classes), fit.settings, _plain_tensors(fit), {}, rows=fit.training
    )
    raw = head.raw(fit.features["test"], [clean(s) for s in test.sequences], fit.told("test"))
    return [softmax(r.astype(np.float64)) for r in raw]


def _plain_tensors(fit: Fit) -> dict[str, torch.Tensor]:
    width = len(fit.tensors["features.mean"])
    return fit.tensors | {
        "ood.mean": torch.zeros(width),
        "ood.project": torch.zeros(width, 1),
        "ood.grid": torch.zeros(101),
    }

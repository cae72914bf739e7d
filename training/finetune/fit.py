"""What travels from a fit to its evaluation and its bundle."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bioseq.heads import features as blocks
from bioseq.heads.features import Context
from bioseq.heads.head import flat_residues
from bioseq.inference.predictor import Predictor
from training.tables import splits
from training.tables.labels import Labels


@dataclass
class Fit:
    """A head before calibration. `features` by part, as the head will get them; `cal_out`, `cal_y` raw outputs
    and labels of rows that it did not train on (per residue flat)."""

    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    features: dict[str, Any]
    cal_out: np.ndarray | None = None
    cal_y: np.ndarray | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    adapter: Path | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    embedded: np.ndarray | None = None  # training rows that have features; None: all


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def n_outputs(labels: Labels) -> int:
    if labels.task in ("multiclass", "per_residue"):
        return len(labels.classes)
    return 1 if labels.task == "binary" else labels.y.shape[1]


def site_context(parts: dict[str, Labels], predictor: Predictor, *, masked_marginal: bool) -> Context | None:
    """For variants of one protein: the wild type (the consensus if none is given), the sites that vary in the
    training and validation rows, and the backbone's masked-marginal log odds."""
    sequences = parts["train"].sequences + parts["valid"].sequences
    wild = parts["train"].wild_type or splits.consensus(sequences + parts["test"].sequences)
    if wild is None or any(len(s) != len(wild) for s in sequences + parts["test"].sequences):
        return None
    sites = tuple(sorted({int(p) for ps in splits.mutated(sequences, wild) for p in ps}))
    odds = None
    if masked_marginal and predictor.encoder.lm_head is not None and len(wild) <= predictor.max_residues:
        say(f"masked marginals of the wild type, {len(wild)} passes")
        odds = np.asarray(predictor.scan(wild, strategy="masked-marginals", homologs="none"), np.float32)
    return Context(wild, sites, odds)


def head_settings(
    parts: dict[str, Labels], method: str, chosen: tuple[str, ...], context: Context | None
) -> dict[str, Any]:
    labels = parts["train"]
    classes = labels.classes if labels.task != "regression" else ()
    settings: dict[str, Any] = {
        "method": method,
        "blocks": list(chosen),
        "pooling": "mean",
        "layers": [-1],
        "targets": list(labels.targets),
        "classes": list(classes),
    }
    if context is not None and any(b in blocks.SITE_BLOCKS for b in chosen):
        settings |= {"wild_type": context.wild_type, "sites": list(context.sites)}
    return settings


def pooled(task: str, features: Any) -> np.ndarray:
    """float32 [N, D] of a part's features."""
    if task == "per_residue":
        return np.stack([flat_residues(f).astype(np.float32).mean(0) for f in features])
    return np.asarray(features, np.float32).reshape(len(features), -1)

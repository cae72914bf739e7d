"""What travels from a fit to its evaluation and its bundle."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bioseq.heads.features import Context
from bioseq.heads.homology import TrainingRows
from bioseq.heads.relatives import Links, Relatives
from bioseq.heads.residues import flat_residues
from bioseq.homologs.mmseqs import find_mmseqs
from bioseq.homologs.reference import open_reference
from bioseq.inference.predictor import Predictor
from bioseq.specs.finetune import PROFILE, SITE_BLOCKS
from training.finetune.models.rows import Held, Rows
from training.tables.labels import Labels
from training.tables.variants import Variants


@dataclass
class Fit:
    """A head before calibration.

    `features` by part, as the head will get them; `cal_out`, `cal_y`, `cal_spread` raw outputs, labels and members'
    spread of rows that it did not train on (per residue flat), `calibrated` says which; `trained` the rows that it was
    fitted on, `rows` and `held` what the baselines get; `links` the hits of each part among `trained`, which are
    `training` in the bundle; `baselines` outputs on the test part of what this method must beat besides.
    """

    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    features: dict[str, Any]
    trained: Labels
    calibrated: str
    cal_out: np.ndarray | None = None
    cal_y: np.ndarray | None = None
    cal_spread: np.ndarray | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    adapter: Path | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    embedded: np.ndarray | None = None  # places in `trained` that have features; None: all
    rows: Rows | None = None
    held: Held | None = None
    links: dict[str, Links] = field(default_factory=dict)
    blocks: dict[str, list[np.ndarray]] = field(default_factory=dict)  # residue blocks by part
    profiles: dict[str, list[np.ndarray]] = field(default_factory=dict)  # profile blocks by part
    training: TrainingRows | None = None
    baselines: dict[str, Any] = field(default_factory=dict)
    relearn: Callable[[np.ndarray, int], np.ndarray] | None = (
        None  # (places in rows, seed) -> outputs on the test part
    )

    def told(self, part: str, links: Links | None = None) -> Relatives:
        """What homologs say of a part's rows; `links` are the hits that may be looked at."""
        return Relatives(links, self.blocks.get(part), self.profiles.get(part))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def n_outputs(labels: Labels) -> int:
    if labels.task in ("multiclass", "per_residue"):
        return len(labels.classes)
    return 1 if labels.task == "binary" else labels.y.shape[1]


def site_context(
    variants: Variants | None,
    seen: np.ndarray,
    predictor: Predictor,
    *,
    masked_marginal: bool,
    homologs: bool = False,
) -> Context:
    """For variants of one protein: the wild type, the sites that vary in the rows `seen`, and the backbone's
    masked-marginal log odds, with `homologs` mixed with what the shipped
    reference set's homologs say. Otherwise the alphabet alone."""
    alphabet = predictor.alphabet.name
    if variants is None:
        return Context(alphabet=alphabet)
    wild = variants.wild_type
    sites = tuple(np.flatnonzero(variants.differs[seen].any(0)).tolist())
    odds = None
    if masked_marginal and predictor.encoder.lm_head is not None and len(wild) <= predictor.max_residues:
        say(f"masked marginals of the wild type, {len(wild)} passes")
        told = "auto" if homologs and alphabet == "protein" and find_mmseqs() else "none"
        odds = np.asarray(predictor.scan(wild, strategy="masked-marginals", homologs=told), np.float32)
    return Context(wild, sites, odds, alphabet)


def head_settings(labels: Labels, method: str, chosen: tuple[str, ...], context: Context) -> dict[str, Any]:
    classes = labels.classes if labels.task != "regression" else ()
    settings: dict[str, Any] = {
        "method": method,
        "blocks": list(chosen),
        "pooling": "mean",
        "layers": [-1],
        "targets": list(labels.targets),
        "classes": list(classes),
    }
    if PROFILE in chosen:
        settings["reference"] = open_reference("default").hash
    if any(b in SITE_BLOCKS for b in chosen):
        settings |= {"wild_type": context.wild_type, "sites": list(context.sites)}
    return settings


def pooled(task: str, features: Any) -> np.ndarray:
    """float32 [N, D] of a part's features."""
    if task == "per_residue":
        return np.stack([flat_residues(f).astype(np.float32).mean(0) for f in features])
    return np.asarray(features, np.float32).reshape(len(features), -1)

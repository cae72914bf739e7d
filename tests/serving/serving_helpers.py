"""Tiny real bundles: a backbone with random weights, and heads of every task on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.bundles.bundle import Bundle, write_bundle
from bioseq.heads.head import NEIGHBOURS

D = CONFIGS["tiny"].d_model
SEQS = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "ACDEFGHIKLMNPQRSTVWY", "mkv*", "GSHMRGEELF" * 12]
CANARY = "WWWCANARYMKTWWW"
TASKS: dict[str, dict[str, Any]] = {
    "stability": {"task": "regression", "targets": ["dg"], "out": 1, "calibration": {"radius": [0.7]}},
    "twin": {
        "task": "regression", "targets": ["km", "kcat"], "out": 2, "calibration": {"radius": [0.7, 0.1]},
    },
    "soluble": {
        "task": "binary", "classes": ["no", "yes"], "out": 1,
        "calibration": {"platt": [[1.0, 0.1]], "thresholds": [0.5]},
    },
    "fold": {
        "task": "multiclass", "classes": ["a", "b", "c"], "out": 3, "calibration": {"temperature": 1.1},
    },
    "localization": {
        "task": "multilabel", "classes": ["nucleus", "membrane"], "out": 2,
        "calibration": {"platt": [[1.0, 0.0], [2.0, 0.1]], "thresholds": [0.5, 0.6]},
    },
    "structure": {
        "task": "per_residue", "classes": ["H", "E", "C"], "out": 3, "calibration": {"temperature": 1.0},
    },
}  # fmt: skip


def make_backbone(folder: Path, *, seed: int = 7, name: str = "tiny") -> Path:
    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(seed))
    save_backbone(
        folder, encoder, name=name, card="# tiny\nRandom.", evidence={"made": "for tests"}, seed=seed
    )
    return folder


def make_head(folder: Path, base: Bundle, name: str, *, seed: int = 3) -> Path:
    spec = TASKS[name]
    rng = np.random.default_rng(seed)
    width = D + 21 if spec["task"] == "per_residue" else D

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    tensors = {
        "features.mean": draw(width) * 0.1,
        "features.scale": torch.ones(width),
        "ood.mean": draw(D) * 0.1,
        "ood.project": draw(D, 8) * 0.2,
        "ood.grid": torch.linspace(0, 3, 101),
        "neighbours.points": draw(5, 8).half(),
    }
    if spec["task"] == "per_residue":
        tensors |= {"conv.0.weight": draw(spec["out"], width, 3) * 0.2, "conv.0.bias": draw(spec["out"])}
    else:
        tensors |= {
            "layers.0.weight": draw(1, width, spec["out"]) * 0.3,
            "layers.0.bias": draw(1, 1, spec["out"]),
        }
    if spec["task"] == "regression":
        tensors |= {"target.scale": torch.full((spec["out"],), 2.0), "target.offset": torch.ones(spec["out"])}
    settings = {"method": "frozen", "blocks": ["embedding"]}
    settings |= {k: spec[k] for k in ("targets", "classes") if k in spec}
    folder.parent.mkdir(parents=True, exist_ok=True)
    ids = folder.parent / f".{folder.name}-{NEIGHBOURS}"
    ids.write_text(json.dumps([f"{name}-{i}" for i in range(5)]))
    write_bundle(
        folder,
        manifest_fields={
            "kind": "head",
            "name": name,
            "alphabet": "protein",
            "base_hash": base.manifest.content_hash,
            "task": spec["task"],
            "labels": list(spec.get("classes") or spec["targets"]),
            "per_residue": spec["task"] == "per_residue",
            "extra": {"head": settings},
            "seed": seed,
        },
        tensors=tensors,
        calibration=spec["calibration"],
        card=f"# {name}",
        evidence={"beats_baseline": True},
        extra_files={NEIGHBOURS: ids},
    )
    ids.unlink()
    return folder


def same(got: Any, want: Any) -> None:
    """Equal, numbers nearly."""
    if isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    elif isinstance(want, dict):
        assert set(got) == set(want)
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, list) and want and isinstance(want[0], float | list | dict):
        assert len(got) == len(want)
        for g, w in zip(got, want):
            same(g, w)
    else:
        assert got == want

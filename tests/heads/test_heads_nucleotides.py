"""Heads on DNA: four letters in every feature, and nothing of amino acids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from heads_tables import write_table

from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.errors import SpecError
from bioseq.heads.head import Head
from bioseq.sequences.alphabet import by_name
from bioseq.specs.finetune import FinetuneSpec

pytest.importorskip("sklearn", reason="the extra [train] is not installed")
from training.finetune.run import finetune


def spec(tmp_path, **options) -> FinetuneSpec:
    a = by_name("dna")
    config = ModelConfig(
        "dna", n_layers=1, d_model=16, n_heads=2, d_ff=32, max_residues=200, vocab_size=len(a), cls_id=a.cls_id,
        pad_id=a.pad_id, eos_id=a.eos_id, mask_id=a.mask_id,
    )  # fmt: skip
    encoder = PackedEncoder(config)
    encoder.init_weights(torch.Generator().manual_seed(0), std=0.2)
    save_backbone(
        tmp_path / "dna", encoder, name="dna", card="# dna", evidence={}, licence="CC0-1.0", alphabet="dna"
    )
    rng = np.random.default_rng(0)
    rows = []
    for i in range(120):
        share = rng.uniform(0.2, 0.8)
        p = np.array([1 - share, share, share, 1 - share]) / 2
        s = "".join(rng.choice(list("ACGT"), rng.integers(40, 60), p=p))
        rows.append(
            {"id": f"d{i}", "cluster": f"c{i}", "sequence": s, "gc": (s.count("G") + s.count("C")) / len(s)}
        )
    values = {
        "labels": str(write_table(tmp_path / "dna.csv", rows)), "targets": ("gc",), "base": str(tmp_path / "dna"),
        "output": str(tmp_path / "head"), "models": ("linear",), "bootstrap": 40, "neighbours": 20, "homologs": "none",
        "threads": 1, "licence": "CC0-1.0",
    }  # fmt: skip
    return FinetuneSpec(**values | options)


def test_features_run_over_four_letters(tmp_path):
    bundle = finetune(spec(tmp_path, features=("composition",)))
    evidence, head = bundle.evidence(), Head.load(bundle)
    assert head.context.alphabet == "dna"
    assert evidence["baselines"]["composition_dipeptides"]["spearman"] > 0.9, "G and C are counted"
    assert not {"properties", "masked_marginal"} & set(evidence["chosen"]["blocks"])


def test_properties_of_amino_acids_are_refused(tmp_path):
    with pytest.raises(SpecError, match="properties"):
        finetune(spec(tmp_path, features=("properties",)))
    assert not (tmp_path / "head").exists()

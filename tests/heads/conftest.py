"""A tiny random backbone, and folders of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> Path:
    from bioseq.backbones.packed.config import ModelConfig
    from bioseq.backbones.packed.encoder import PackedEncoder
    from bioseq.backbones.storage import save_backbone

    encoder = PackedEncoder(ModelConfig("t", n_layers=2, d_model=32, n_heads=4, d_ff=64, max_residues=200))
    encoder.init_weights(torch.Generator().manual_seed(0), std=0.2)
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_backbone(folder, encoder, name="tiny", card="# tiny", evidence={}, licence="CC0-1.0")
    return folder


@pytest.fixture(scope="session")
def model(backbone):
    from bioseq.inference.loading import load

    return load(backbone, threads=1)


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("BIOSEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))

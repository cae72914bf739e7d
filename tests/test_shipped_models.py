"""The shipped models are held to their cards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import bioseq
from bioseq.backbones.importing import export_checkpoint
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.weights import hash_weights
from bioseq.backbones.storage import load_backbone
from bioseq.bundles.bundle import open_bundle
from bioseq.bundles.registry import SHIPPED, Registry

HEADS = ("localization", "target_class", "secondary_structure")


@pytest.fixture(scope="module")
def backbone():  # type: ignore[no-untyped-def]
    return open_bundle(SHIPPED / "default")


def test_default_is_the_shipped_backbone(backbone) -> None:  # type: ignore[no-untyped-def]
    resolved = Registry().resolve("default")
    assert resolved.manifest.content_hash == backbone.manifest.content_hash
    assert (
        backbone.manifest.architecture["d_model"] == 320 and backbone.manifest.architecture["n_layers"] == 6
    )
    assert (backbone.path / "model.safetensors").stat().st_size <= 32 * 2**20


def test_card_says_what_a_reader_needs(backbone) -> None:  # type: ignore[no-untyped-def]
    card, evidence = backbone.card(), backbone.evidence()
    for word in ("tokens", "steps", "seed", "CC-BY-4.0", "Not good for", "unigram", "3-gram", "Swiss-Prot"):
        assert word in card, word
    if not evidence["spec"]["workers"]["gpus"]:
        assert "trained on a CPU" in card
    for name in ("remote", "orphan"):
        reached = evidence["perplexity"][name]["perplexity"]
        assert reached < evidence["baselines"]["unigram"][name]
        assert f"{reached:.2f}" in card


def test_perplexity_on_validation_proteins_is_the_cards_within_1_percent(backbone, data: Path) -> None:  # type: ignore[no-untyped-def]
    from training.pretrain.evaluate import perplexity

    encoder = load_backbone(backbone, dtype=torch.float32)
    for check in backbone.evidence()["check"].values():
        sequences = [r.sequence for r in bioseq.read_fasta(data / check["file"])]
        assert len(sequences) == check["proteins"] == 25
        measured = perplexity(encoder, sequences, seed=0, passes=check["passes"])
        assert measured["residues"] == check["residues"] > 0.25 * sum(map(len, sequences))
        assert measured["perplexity"] == pytest.approx(check["perplexity"], rel=0.01)


def test_transformers_loads_the_export_and_agrees(backbone, data: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from transformers import EsmForMaskedLM, EsmTokenizer

    export_checkpoint(backbone, tmp_path / "hf")
    model = EsmForMaskedLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = EsmTokenizer.from_pretrained(tmp_path / "hf")
    sequences = sorted((r.sequence for r in bioseq.read_fasta(data / "valid_orphan_25.fasta")), key=len)[::8]
    ours = bioseq.load("default")
    for sequence, hidden, logits in zip(
        sequences, ours.embed(sequences, per_residue=True), ours.logits(sequences)
    ):
        with torch.inference_mode():
            reference = model(**tokenizer(sequence, return_tensors="pt"), output_hidden_states=True)
        for mine, theirs in ((hidden, reference.hidden_states[-1]), (logits, reference.logits)):
            other = theirs[0, 1:-1].numpy()
            assert np.linalg.norm(mine - other) / np.linalg.norm(other) <= 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_every_shipped_head_is_of_the_shipped_backbone(name: str, backbone) -> None:  # type: ignore[no-untyped-def]
    computed = hash_weights(ModelConfig.from_dict(backbone.manifest.architecture), backbone.read_tensors())
    head = open_bundle(SHIPPED / name)
    assert head.manifest.kind == "head"
    assert head.manifest.base_weights_hash == backbone.manifest.weights_hash == computed
    assert (
        sum(f.stat().st_size for f in head.path.rglob("*") if f.is_file()) < 6 * 2**20
    )  # the training sequences are most of it
    assert "baseline" in head.card().lower()


def test_shipped_heads_answer(data: Path) -> None:
    model = bioseq.load("default")
    record = next(iter(bioseq.read_fasta(data / "valid_orphan_25.fasta")))
    answer = model.predict([record], heads=list(HEADS))[0]
    assert list(answer) == list(HEADS)
    keys = {"task", "value", "interval", "probabilities", "ood", "ood_percentile", "head", "version"}
    for name, prediction in answer.items():
        assert keys <= set(prediction) and prediction["head"] == name
        assert prediction["ood"] >= 0 and 0 <= prediction["ood_percentile"] <= 1
    assert set(answer["localization"]["probabilities"]) >= {"nucleus", "cytoplasm"}
    assert len(answer["secondary_structure"]["value"]) == len(record.sequence)


def test_nothing_else_ships() -> None:
    assert {p.name for p in SHIPPED.iterdir() if p.is_dir()} == {"default", *HEADS}

"""The parts of the packed encoder that ESM-2 does not have: the second input, the gate, the convolution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bioseq.backbones.importing import export_checkpoint
from bioseq.backbones.packed.config import EVIDENCE_WIDTH, FIRST_LETTER, ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.packed.weights import build_encoder, hash_weights
from bioseq.backbones.storage import load_backbone, save_backbone, weights_hash
from bioseq.errors import BundleError, CheckpointError
from bioseq.sequences.alphabet import protein

PLAIN = ModelConfig("plain", 2, 32, 4, 64)
READING = replace(PLAIN, name="reading", reads_homologs=True, convolution=5)


def random_encoder(config: ModelConfig, seed: int = 0) -> PackedEncoder:
    encoder = PackedEncoder(config)
    draw = torch.Generator().manual_seed(seed)
    encoder.init_weights(draw)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return encoder.eval()


def batch(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, offsets and evidence of sequences of these many tokens; a third of the residues has none."""
    draw = np.random.default_rng(seed)
    rows = [np.r_[0, draw.integers(4, 24, n - 2), 2] for n in lengths]
    evidence = draw.normal(size=(sum(lengths), EVIDENCE_WIDTH)).astype(np.float32)
    evidence[draw.random(len(evidence)) < 0.3] = 0
    cu = np.r_[0, np.cumsum(lengths)].astype(np.int32)
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(cu), torch.from_numpy(evidence)


def run(encoder: PackedEncoder, tokens, cu, evidence) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        hidden = encoder(tokens, cu, int(cu.diff().max()), evidence_TE=evidence)
        return hidden, encoder.logits(hidden, evidence)


def test_with_new_weights_at_zero_it_is_the_plain_encoder() -> None:
    plain = random_encoder(PLAIN)
    state = plain.state_dict()
    new = PackedEncoder(READING).state_dict()
    added = {name: torch.zeros_like(t) for name, t in new.items() if name not in state}
    assert {n.split(".")[-2] for n in added} == {"evidence", "gate", "neighbours", "norm"}
    added["gate.bias"] = torch.tensor([-1e4])  # softplus(-1e4) = 0
    reading = build_encoder(READING, {**state, **added})
    tokens, cu, evidence = batch((9, 30, 3))
    for given in (evidence, torch.zeros_like(evidence), None):
        for ours, theirs in zip(run(reading, tokens, cu, given), run(plain, tokens, cu, None)):
            assert torch.equal(ours, theirs)


def test_without_homologs_evidence_of_zeros_and_none_are_the_same() -> None:
    encoder = random_encoder(READING)
    tokens, cu, evidence = batch((9, 30, 3))
    for zero, none in zip(
        run(encoder, tokens, cu, torch.zeros_like(evidence)), run(encoder, tokens, cu, None)
    ):
        assert torch.equal(zero, none)


def test_a_sequence_does_not_depend_on_its_batch_mates() -> None:
    encoder = random_encoder(READING)
    lengths = (9, 30, 3, 17)
    tokens, cu, evidence = batch(lengths)
    together = run(encoder, tokens, cu, evidence)
    for start, end in zip(cu.tolist(), cu.tolist()[1:]):
        alone = run(
            encoder,
            tokens[start:end],
            torch.tensor([0, end - start], dtype=torch.int32),
            evidence[start:end],
        )
        for a, b in zip(together, alone):
            assert (a[start:end] - b).norm() <= 1e-5 * b.norm()


def test_the_gate_adds_the_log_odds_to_the_letters_logits() -> None:
    encoder = random_encoder(READING)
    tokens, cu, evidence = batch((12, 20))
    hidden, logits = run(encoder, tokens, cu, evidence)
    gate = np.log1p(np.exp((hidden @ encoder.gate.weight.T + encoder.gate.bias).detach().numpy()))
    expected = encoder.logits(hidden).detach().numpy()
    assert sorted(protein().standard_ids) == list(range(FIRST_LETTER, FIRST_LETTER + 20))
    expected[:, 4:24] += gate * evidence.numpy()[:, :20]
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_first_weights_leave_the_gate_at_one() -> None:
    encoder = PackedEncoder(READING)
    encoder.init_weights(torch.Generator().manual_seed(0))
    assert torch.nn.functional.softplus(encoder.gate.bias).item() == pytest.approx(1.0)
    assert not encoder.gate.weight.any()
    assert encoder.layers[0].neighbours.weight.std() > 0


def test_the_counted_parameters_are_those_of_the_module() -> None:
    for config in (PLAIN, READING, replace(PLAIN, convolution=7), replace(PLAIN, reads_homologs=True)):
        assert sum(p.numel() for p in PackedEncoder(config).parameters()) == config.n_parameters


def test_a_plain_encoder_takes_no_evidence_and_widths_are_odd() -> None:
    tokens, cu, evidence = batch((9,))
    plain = random_encoder(PLAIN)
    with pytest.raises(RuntimeError, match="does not read homologs"):
        plain(tokens, cu, 9, evidence_TE=evidence)
    with pytest.raises(CheckpointError, match="convolution is 4; 0 or an odd width"):
        replace(PLAIN, convolution=4)


def test_a_bundle_names_its_reference_set_and_is_not_exported(tmp_path: Path) -> None:
    encoder = random_encoder(READING)
    text = {"name": "reading", "card": "a card", "evidence": {}}
    with pytest.raises(BundleError, match="does not name a reference set"):
        save_backbone(tmp_path / "none", encoder, **text)
    hashes = []
    for name, reference in (("a", "sha256:" + "a" * 64), ("b", "sha256:" + "b" * 64)):
        extra = {"homologs": {"reference": reference, "name": name}}
        bundle = save_backbone(tmp_path / name, encoder, extra=extra, **text)
        hashes.append(weights_hash(bundle))
        assert bundle.manifest.weights_hash == hash_weights(
            READING, encoder.state_dict(), reference=reference
        )
    assert hashes[0] != hashes[1]  # heads made with one set do not fit the same weights with another
    loaded = load_backbone(bundle)
    tokens, cu, evidence = batch((9, 30))
    for a, b in zip(run(loaded, tokens, cu, evidence), run(encoder, tokens, cu, evidence)):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="reading has a second input for homologs"):
        export_checkpoint(bundle, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_ablations_leave_out_the_residual_or_the_letters() -> None:
    tokens, bounds = torch.tensor([0, 5, 9, 14, 2]), torch.tensor([0, 5], dtype=torch.int32)
    other = torch.tensor([0, 6, 9, 14, 2])
    evidence = torch.randn(5, 21)
    for config, gated, lettered in (
        (replace(READING, residual=False), False, True),
        (replace(READING, reads_letters=False), True, False),
    ):
        encoder = PackedEncoder(config).eval()
        encoder.init_weights(torch.Generator().manual_seed(0))
        assert sum(p.numel() for p in encoder.parameters()) == config.n_parameters
        with torch.no_grad():
            first, second = (encoder(t, bounds, 5, evidence_TE=evidence) for t in (tokens, other))
            assert torch.equal(first, second) == (not lettered)
            assert torch.equal(encoder.logits(first), encoder.logits(first, evidence)) == (not gated)

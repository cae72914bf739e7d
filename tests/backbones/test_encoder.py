"""Parity of the packed encoder with transformers' ESM on the same random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM

import bioseq
from bioseq.backbones.packed.config import CONFIGS, ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.sequences.alphabet import protein


def hf_model(shape: str, seed: int = 0) -> EsmForMaskedLM:
    """A transformers model of this shape whose weights, biases and layer norms are all random."""
    c = CONFIGS[shape]
    torch.manual_seed(seed)
    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        intermediate_size=c.d_ff,
        position_embedding_type="rotary",
        token_dropout=True,
        layer_norm_eps=1e-5,
        emb_layer_norm_before=False,
        max_position_embeddings=1026,
    )
    model = EsmForMaskedLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * (0.2 if norm else 0.06) + (1.0 if norm else 0.0))
    return model


def proteins(data: Path, shortest: int, longest: int, count: int) -> list[str]:
    records = [r.sequence for r in bioseq.read_fasta(data / "proteins_30_1000.fasta")]
    chosen = sorted((s for s in records if shortest <= len(s) <= longest), key=len)
    return chosen[:: max(1, len(chosen) // count)][:count]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("shape", ["8m", "35m"])
def test_equals_transformers_on_real_proteins(shape: str, data: Path, tmp_path: Path) -> None:
    model = hf_model(shape)
    model.save_pretrained(tmp_path / "hf")
    ours = bioseq.load(tmp_path / "hf")
    sequences = proteins(data, 30, 1000, 8 if shape == "8m" else 4)
    assert min(map(len, sequences)) < 100 and max(map(len, sequences)) > 300
    masked = list(sequences[0])
    for at in (3, 4, 11):
        masked[at] = "<mask>"
    sequences.append("".join(masked))  # token dropout rescales this one alone

    depth = CONFIGS[shape].n_layers
    layers = tuple(range(depth + 1))
    hidden = ours.embed(sequences, layers=layers, per_residue=True)
    logits = ours.logits(sequences)
    alphabet = protein()
    for sequence, ours_h, ours_l in zip(sequences, hidden, logits):
        ids = alphabet.encode(sequence, masks=True).ids.astype(np.int64)
        tokens = torch.from_numpy(np.r_[0, ids, 2])[None]
        with torch.inference_mode():
            reference = model(tokens, output_hidden_states=True)
        for layer in layers:
            theirs = reference.hidden_states[layer][0, 1:-1].numpy()
            assert relative(ours_h[layer], theirs) <= 1e-5, (layer, len(ids))
        assert relative(ours_l, reference.logits[0, 1:-1].numpy()) <= 1e-5


def test_poolings_equal_numpy_on_transformers_states(data: Path, tmp_path: Path) -> None:
    model = hf_model("8m", seed=1)
    model.save_pretrained(tmp_path / "hf")
    ours = bioseq.load(tmp_path / "hf")
    sequences = proteins(data, 30, 300, 4)
    for i, sequence in enumerate(sequences):
        ids = protein().encode(sequence).ids.astype(np.int64)
        with torch.inference_mode():
            states = model.esm(torch.from_numpy(np.r_[0, ids, 2])[None]).last_hidden_state[0].numpy()
        expected = {"mean": states[1:-1].mean(0), "max": states[1:-1].max(0), "cls": states[0]}
        for pooling, value in expected.items():
            got = ours.embed(sequences, pooling=pooling)
            assert got.dtype == np.float32
            assert relative(got[i], value) <= 1e-5, pooling


def test_layer_names_and_errors() -> None:
    config = ModelConfig("t", 2, 32, 4, 64)
    encoder = PackedEncoder(config).eval()
    encoder.init_weights(torch.Generator().manual_seed(0))
    tokens, cu = torch.tensor([0, 5, 6, 7, 2]), torch.tensor([0, 5], dtype=torch.int32)
    first, last, also_last = encoder(tokens, cu, 5, layers=(0, -1, 2))
    assert torch.equal(last, also_last) and not torch.equal(first, last)
    with pytest.raises(IndexError, match="layer 3 is not there"):
        encoder(tokens, cu, 5, layers=(3,))


def test_published_parameter_counts() -> None:
    """The sizes that ESM-2's own names state, within their rounding."""
    millions = {n: CONFIGS[n].n_parameters / 1e6 for n in ("8m", "35m", "150m", "650m", "3b")}
    stated = {"8m": 7.5, "35m": 33.5, "150m": 148.1, "650m": 651.0, "3b": 2838.0}
    for name, value in stated.items():
        assert millions[name] == pytest.approx(value, rel=0.01), name
    tiny = CONFIGS["tiny"]
    assert sum(p.numel() for p in PackedEncoder(tiny).parameters()) == tiny.n_parameters


def test_checkpointing_gives_the_same_gradients() -> None:
    config = ModelConfig("t", 2, 32, 4, 64)
    encoder = PackedEncoder(config)
    encoder.init_weights(torch.Generator().manual_seed(0))
    tokens, cu = torch.tensor([0, 5, 6, 7, 2, 0, 9, 2]), torch.tensor([0, 5, 8], dtype=torch.int32)
    grads = []
    for encoder.checkpointing in (False, True):
        encoder.zero_grad()
        encoder.logits(encoder(tokens, cu, 5)).logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for a, b in zip(*grads):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for varlen attention")
def test_varlen_equals_float32(data: Path, tmp_path: Path) -> None:
    hf_model("8m").save_pretrained(tmp_path / "hf")
    sequences = proteins(data, 30, 1000, 8)
    exact = bioseq.load(tmp_path / "hf", device="cpu").embed(sequences)
    fast = bioseq.load(tmp_path / "hf", device="cuda", dtype="bfloat16").embed(sequences)
    assert max(relative(a, b) for a, b in zip(fast, exact)) <= 5e-2

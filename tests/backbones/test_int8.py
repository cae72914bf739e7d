"""int8 linear layers: the stated formula, no batch-mates, adapters, and refusals by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bioseq
from bioseq.backbones import lora
from bioseq.backbones.packed import attention, int8
from bioseq.backbones.packed.config import CONFIGS, ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.cli import main
from bioseq.errors import ResourceError, SpecError
from bioseq.inference.predictor import Predictor

needs_int8 = pytest.mark.skipif(int8.supported() is not None, reason=str(int8.supported()))
CPU = torch.device("cpu")
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ" * 3, "ACDEFGHIKLMNPQRSTVWY" * 9, "MKV", "W" * 40]


def random_encoder(config: ModelConfig) -> PackedEncoder:
    encoder = PackedEncoder(config)
    encoder.init_weights(torch.Generator().manual_seed(0), std=0.1)
    return encoder


@needs_int8
@pytest.mark.parametrize("rows", [1, 3, 64, 65, 200])
def test_a_layer_computes_what_its_docstring_says(rows: int) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(48, 40)
    x = torch.randn(rows, 48, dtype=torch.bfloat16)
    x[0] = 0  # a row without a scale
    s = x.abs().amax(1).double().clamp_min(1e-12) / 127
    w = linear.weight.detach().abs().amax(1).double() / 127
    steps = (x.float() / s.float()[:, None]).round().double()
    weights = (linear.weight.detach() / w.float()[:, None]).round().double()
    expected = s[:, None] * w * (steps @ weights.t()) + linear.bias.detach().double()
    found = int8.Int8Linear(linear)(x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-3)
    assert ((found.float() - linear(x.float())).norm() / linear(x.float()).norm()) < 0.02


@needs_int8
def test_results_do_not_depend_on_batch_mates_and_are_near_float32() -> None:
    plain = Predictor(random_encoder(CONFIGS["tiny"]), threads=1)
    small = Predictor(random_encoder(CONFIGS["tiny"]), dtype="int8", threads=1)
    together = small.embed(SEQUENCES)
    alone = np.concatenate([small.embed([s]) for s in SEQUENCES])
    assert np.linalg.norm(together - alone, axis=1).max() <= 2e-2 * np.linalg.norm(alone, axis=1).min()
    expected = plain.embed(SEQUENCES)
    assert (np.linalg.norm(together - expected, axis=1) / np.linalg.norm(expected, axis=1)).max() < 8e-2
    kinds = {type(layer.qkv) for layer in small.encoder.layers}
    assert kinds == {int8.Int8Linear} and small.encoder.layers[0].up.scale.dtype == torch.float32
    assert int8.to_int8(small.encoder, CPU) is small.encoder  # again: nothing is rounded twice
    assert np.array_equal(small.embed(SEQUENCES), together)


@needs_int8
def test_an_adapter_acts_on_int8_layers() -> None:
    shape = lora.LoraShape(rank=2, alpha=4.0, targets=("query", "value", "intermediate.dense"))
    tokens, cu = torch.randint(4, 24, (60,)), torch.tensor([0, 25, 60], dtype=torch.int32)
    found = {}
    for name, make in (("float32", lambda e: e), ("int8", lambda e: int8.to_int8(e, CPU))):
        encoder = make(random_encoder(CONFIGS["tiny"])).eval().requires_grad_(False)
        adapter = lora.LoraAdapter(encoder, shape, generator=torch.Generator().manual_seed(1))
        for i, b in enumerate(adapter.b.values()):
            b.data.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
        lora.attach(encoder, "a", adapter)
        bare = encoder(tokens, cu, 35).float()
        with lora.routed(encoder, [("a", 0, 25), (None, 25, 60)]):
            found[name] = (bare, encoder(tokens, cu, 35).float())
    (bare, tuned), (bare8, tuned8) = found["float32"], found["int8"]
    assert torch.equal(bare8[25:], tuned8[25:])  # no sequence sees another's adapter
    moved, moved8 = tuned[:25] - bare[:25], tuned8[:25] - bare8[:25]
    assert (moved8 - moved).norm() / moved.norm() < 0.2


def test_int8_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(int8, "supported", lambda: "this processor has neither AVX512_VNNI nor AMX")
    save_backbone(tmp_path / "tiny", random_encoder(CONFIGS["tiny"]), name="tiny", card="# tiny\n", evidence={}, licence="CC0-1.0")  # fmt: skip
    with pytest.raises(ResourceError, match="neither AVX512_VNNI nor AMX"):
        bioseq.load(tmp_path / "tiny", dtype="int8")
    (tmp_path / "a.fasta").write_text(">a\nMKV\n")
    told = main(["embed", str(tmp_path / "a.fasta"), "--model", str(tmp_path / "tiny"), "--dtype", "int8", "-o", str(tmp_path / "a.npz")])  # fmt: skip
    assert told == 1 and "Use dtype bfloat16 or float32" in capsys.readouterr().err
    with pytest.raises(SpecError, match="for CPUs"):
        int8.to_int8(random_encoder(CONFIGS["tiny"]), torch.device("cuda"))
    with pytest.raises(SpecError, match="int4"):
        bioseq.load(tmp_path / "tiny", dtype="int4")


@pytest.mark.parametrize("how", ["fused", "float32", "products"])
@pytest.mark.parametrize("length", [1, 7, 90])
def test_every_way_to_attend_gives_the_same(how: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(length)
    lengths = [length, 20]
    q, k, v = (torch.randn(sum(lengths), 4, 16, dtype=torch.bfloat16) for _ in range(3))
    cu = torch.tensor([0, length, sum(lengths)], dtype=torch.int32)
    exact = attention.attend(q.float(), k.float(), v.float(), cu, max(lengths))
    monkeypatch.setattr(attention, "kernel", lambda *_, **__: how)
    found = attention.attend(q, k, v, cu, max(lengths))
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() / exact.norm() < 1e-2


def test_the_way_follows_from_the_processor_and_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"amx": "fused", "avx512_bf16": "products", "": "float32"}
    for processor, how in expected.items():
        monkeypatch.setattr(attention, "processor", lambda processor=processor: processor)
        assert attention.kernel(torch.bfloat16, 64, 350) == how
        assert attention.kernel(torch.float32, 64, 350) == "fused"
        assert attention.kernel(torch.bfloat16, 64, 350, training=True) == "products"
    monkeypatch.setattr(attention, "processor", lambda: "avx512_bf16")
    assert (
        attention.kernel(torch.bfloat16, 16, 350) == attention.kernel(torch.bfloat16, 64, 1000) == "float32"
    )

"""LoRA on the packed encoder against peft on transformers' EsmModel, and against itself in mixed packs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bioseq.backbones import lora as adapters
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.errors import BundleError

CONFIG = ModelConfig("t", n_layers=2, d_model=32, n_heads=4, d_ff=64)


@pytest.fixture
def encoder() -> PackedEncoder:
    torch.manual_seed(0)
    encoder = PackedEncoder(CONFIG).eval()
    encoder.init_weights(torch.Generator().manual_seed(1), std=0.2)
    return encoder


def an_adapter(encoder: PackedEncoder, seed: int, targets=("query", "key", "value"), rank: int = 4):
    shape = adapters.LoraShape(rank, 8.0, adapters.exact_targets(targets))
    adapter = adapters.LoraAdapter(encoder, shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for b in adapter.b.values():
            b.normal_(std=0.3, generator=torch.Generator().manual_seed(seed + 50))
    return adapter.eval()


def tokens(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.cat([torch.tensor([0]), torch.randint(4, 24, (n,), generator=g), torch.tensor([2])])
        for n in lengths
    ]


def packed(encoder, sequences, routes=None):
    cu = np.cumsum([0, *(len(s) for s in sequences)]).astype(np.int32)
    segments = [(r, int(a), int(b)) for r, a, b in zip(routes or [None] * len(sequences), cu, cu[1:])]
    with torch.no_grad(), adapters.routed(encoder, segments):
        out = encoder(torch.cat(sequences), torch.from_numpy(cu), max(map(len, sequences)))
    return [out[a:b] for a, b in zip(cu, cu[1:])]


def worst(a, b) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b))


ALL = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


@pytest.mark.parametrize("targets", [("query", "key", "value"), ALL, ("value", "output.dense")])
def test_peft_loads_the_folder_and_gives_equal_outputs(encoder, tmp_path, targets):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from bioseq.backbones.checkpoints.checkpoint import write_checkpoint

    write_checkpoint(tmp_path / "hf", encoder.config, encoder.state_dict())
    adapter = an_adapter(encoder, 3, targets)
    adapters.save_adapter(adapter, tmp_path / "adapter")
    model = transformers.EsmModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False)
    reference = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    adapters.attach(encoder, "one", tmp_path / "adapter")
    sequences = tokens([7, 20, 3])
    got = packed(encoder, sequences, ["one"] * 3)
    with torch.no_grad():
        want = [
            reference(s[None], attention_mask=torch.ones(1, len(s))).last_hidden_state[0] for s in sequences
        ]
    assert worst(got, want) <= 1e-5
    assert worst(got, packed(encoder, sequences)) > 1e-2  # the adapter does something


def test_reads_what_peft_writes(encoder, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from bioseq.backbones.checkpoints.checkpoint import write_checkpoint

    write_checkpoint(tmp_path / "hf", encoder.config, encoder.state_dict())
    model = transformers.EsmModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], use_rslora=True)
    theirs = peft.get_peft_model(model, config).eval()
    torch.manual_seed(4)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    adapters.attach(encoder, "one", tmp_path / "adapter")
    sequences = tokens([9, 14], seed=2)
    with torch.no_grad():
        want = [theirs(s[None], attention_mask=torch.ones(1, len(s))).last_hidden_state[0] for s in sequences]
    assert worst(packed(encoder, sequences, ["one"] * 2), want) <= 1e-5


def test_mixed_adapters_in_one_pack_equal_each_alone(encoder):
    for i, name in enumerate("abc"):
        adapters.attach(encoder, name, an_adapter(encoder, i, ALL if name == "c" else ("query", "value")))
    sequences = tokens([5, 17, 9, 30, 4, 11])
    routes = ["a", None, "b", "a", "c", None]
    mixed = packed(encoder, sequences, routes)
    alone = [packed(encoder, [s], [r])[0] for s, r in zip(sequences, routes)]
    assert worst(mixed, alone) <= 1e-5


def test_detached_encoder_is_bit_equal_to_one_never_touched(encoder):
    sequences = tokens([6, 12])
    before = packed(encoder, sequences)
    adapters.attach(encoder, "a", an_adapter(encoder, 0))
    attached = packed(encoder, sequences)
    adapters.detach(encoder, "a")
    hooks = sum(len(m._forward_hooks) for m in encoder.modules())
    assert hooks == 0
    for other in (attached, packed(encoder, sequences)):
        assert all(torch.equal(x, y) for x, y in zip(before, other))
    with pytest.raises(KeyError):
        packed(encoder, sequences, ["a", None])


def test_merged_weights_equal_the_adapter(encoder):
    adapter = an_adapter(encoder, 1, ALL)
    adapters.attach(encoder, "a", adapter)
    sequences = tokens([6, 12])
    want = packed(encoder, sequences, ["a", "a"])
    adapters.detach(encoder, "a")
    adapters.merge(encoder, adapter)
    assert worst(packed(encoder, sequences), want) <= 1e-5


def test_missing_spare_and_misshapen_tensors_are_errors(encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = adapters.save_adapter(an_adapter(encoder, 0), tmp_path)
    file = folder / adapters.WEIGHTS
    tensors = load_file(file)
    name = min(tensors)
    for change, word in (
        ({k: v for k, v in tensors.items() if k != name}, "missing tensor"),
        (tensors | {"base_model.model.extra": torch.zeros(1)}, "unknown tensor"),
        (tensors | {name: torch.zeros(1, 1)}, "shape"),
    ):
        save_file(change, file)
        with pytest.raises(BundleError, match=word):
            adapters.load_adapter(encoder, folder)


@pytest.mark.parametrize(
    "key, value",
    [("use_dora", True), ("bias", "all"), ("modules_to_save", ["classifier"]), ("peft_type", "IA3")],
)
def test_what_would_be_served_wrongly_is_refused(encoder, tmp_path, key, value):
    folder = adapters.save_adapter(an_adapter(encoder, 0), tmp_path)
    config = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps(config | {key: value}))
    with pytest.raises(BundleError, match=key):
        adapters.load_adapter(encoder, folder)

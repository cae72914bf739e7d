"""Reading and writing the Hugging Face layout: every variant of a checkpoint that exists, and every fault.

The reference is transformers itself: it writes the checkpoints, and loads what bioseq exports.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bioseq.backbones.checkpoints.checkpoint import load_checkpoint, write_checkpoint
from bioseq.backbones.importing import export_checkpoint, import_checkpoint
from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.storage import load_backbone
from bioseq.bundles.bundle import is_checkpoint, open_bundle
from bioseq.errors import CheckpointError, OutputError
from bioseq.sequences.alphabet import protein

transformers = pytest.importorskip("transformers")


def hf_config(size: str, **changes):
    c = CONFIGS[size]
    settings = {
        "vocab_size": 33,
        "mask_token_id": 32,
        "pad_token_id": 1,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "intermediate_size": c.d_ff,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "layer_norm_eps": 1e-5,
        "emb_layer_norm_before": False,
        "max_position_embeddings": 1026,
    }
    return transformers.EsmConfig(**{**settings, **changes})


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def save_hf(folder: Path, size: str = "tiny", *, lm: bool = True, dtype=torch.float32, **how) -> Path:
    kind = transformers.EsmForMaskedLM if lm else transformers.EsmModel
    model = kind(hf_config(size))
    randomise(model)
    model.to(dtype).save_pretrained(folder, **how)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_hf(tmp_path_factory.mktemp("hf") / "tiny", save_original_format=False)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def edit_tensors(folder: Path, change) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].reshape(-1).view(torch.uint8).equal(b[name].reshape(-1).view(torch.uint8)), name


def round_trip(source: Path, tmp_path: Path):
    bundle = import_checkpoint(source, tmp_path / "bundle", name="x")
    exported = export_checkpoint(open_bundle(bundle.path), tmp_path / "exported")
    assert_same_tensors(all_tensors(source), all_tensors(exported))
    assert (exported / "config.json").read_bytes() == (source / "config.json").read_bytes()
    return bundle, exported


@pytest.mark.parametrize(
    ("size", "lm", "modern"),
    [
        ("tiny", True, True),
        ("tiny", True, False),
        ("tiny", False, True),
        ("tiny", False, False),
        ("8m", True, False),
    ],
)
def test_import_then_export_gives_byte_equal_tensors(tmp_path, size, lm, modern):
    source = save_hf(tmp_path / "hf", size, lm=lm, save_original_format=not modern)
    names = all_tensors(source)
    assert any(n.endswith("LayerNorm.gamma") for n in names) is not modern  # both spellings really occur
    assert any(n.startswith("esm.") for n in names) is lm
    bundle, _ = round_trip(source, tmp_path)
    assert (load_backbone(bundle).lm_head is not None) is lm
    assert bundle.manifest.architecture["name"] == size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stored_dtype_is_kept(tmp_path, dtype):
    source = save_hf(tmp_path / "hf", dtype=dtype)
    bundle, _ = round_trip(source, tmp_path)
    assert bundle.manifest.extra["dtype"] == str(dtype).removeprefix("torch.")
    assert bundle.read_tensors()["layers.0.qkv.weight"].dtype == dtype
    assert load_backbone(bundle).embed_tokens.weight.dtype == torch.float32


def test_sharded_checkpoint(tmp_path):
    source = save_hf(tmp_path / "hf", max_shard_size="100KB")
    assert (source / "model.safetensors.index.json").exists() and not (source / "model.safetensors").exists()
    round_trip(source, tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    source = save_hf(tmp_path / "hf", max_shard_size="100KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_checkpoint(source)


def test_the_index_may_not_lead_out_of_the_folder(folder):
    weights = folder / "model.safetensors"
    weights.rename(folder.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(all_tensors(folder.parent), "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="beside it"):
        load_checkpoint(folder)


def test_query_key_value_are_fused_in_that_order(original):
    theirs, ours = all_tensors(original), load_checkpoint(original).tensors
    for part in ("weight", "bias"):
        stem = "esm.encoder.layer.1.attention.self"
        expected = torch.cat([theirs[f"{stem}.{x}.{part}"] for x in ("query", "key", "value")])
        assert ours[f"layers.1.qkv.{part}"].equal(expected)


def test_unused_tensors_are_kept_and_given_back(folder, tmp_path):
    kept = {
        "esm.embeddings.position_embeddings.weight": torch.randn(1026, 64),
        "esm.embeddings.position_ids": torch.arange(1026)[None],
        "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq": torch.randn(8),
        "esm.encoder.layer.1.attention.self.rotary_embeddings.inv_freq": torch.randn(8),
        "esm.pooler.dense.weight": torch.randn(64, 64),
        "esm.pooler.dense.bias": torch.randn(64),
    }
    edit_tensors(folder, lambda t: t.update(kept))
    bundle, _ = round_trip(folder, tmp_path)
    assert kept.keys() <= load_checkpoint(folder).extras.keys()
    load_backbone(bundle)  # and they do not get in the way


def test_a_stored_decoder_equal_to_the_embeddings_is_tied(folder, tmp_path):
    edit_tensors(
        folder,
        lambda t: t.update({"lm_head.decoder.weight": t["esm.embeddings.word_embeddings.weight"].clone()}),
    )
    bundle, exported = round_trip(folder, tmp_path)
    assert "lm_head.decoder.weight" in all_tensors(exported)
    assert not any("decoder" in name for name in bundle.read_tensors())  # stored once


def test_a_decoder_of_its_own_is_refused(folder):
    edit_tensors(
        folder,
        lambda t: t.update({"lm_head.decoder.weight": t["esm.embeddings.word_embeddings.weight"] + 1e-3}),
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.decoder\.weight differs"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "esm.embeddings.word_embeddings.weight",
        "esm.encoder.layer.1.attention.self.key.bias",
        "esm.encoder.layer.0.LayerNorm.weight",
        "esm.encoder.emb_layer_norm_after.bias",
        "lm_head.dense.weight",
        "lm_head.bias",
    ],
)
def test_a_missing_tensor_is_named(folder, name):
    edit_tensors(folder, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"missing tensor.*{name}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "classifier.dense.weight",
        "esm.encoder.layer.2.output.dense.bias",
        "esm.encoder.layer.0.LayerNorm.gamma",  # beside .weight: one of them is spare
        "esm.embeddings.layer_norm.weight",
        "lm_head.decoder.bias",
    ],
)
def test_a_spare_tensor_is_named(folder, name):
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=f"unknown tensor.*{name}"):
        load_checkpoint(folder)


def test_a_wrong_shape_names_tensor_found_and_expected(folder):
    name = "esm.encoder.layer.0.intermediate.dense.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(255, 64)}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(255, 64\), expected \(256, 64\)"):
        load_checkpoint(folder)


def test_mixed_dtypes_cannot_be_fused(folder):
    name = "esm.encoder.layer.0.attention.self.key.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].half()}))
    with pytest.raises(CheckpointError, match="differ in dtype"):
        load_checkpoint(folder)


def test_integer_weights_are_refused(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.bias": torch.zeros(33, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.bias is torch\.int8"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("position_embedding_type", "relative_key", "position_embedding_type 'relative_key'"),
        ("position_embedding_type", ..., "position_embeddings.weight"),  # transformers reads it as ESM-1b
        ("emb_layer_norm_before", True, "missing tensors: esm.embeddings.layer_norm.weight"),
        ("model_type", "bert", "model_type 'bert'"),
        ("model_type", ..., "model_type None"),
        ("is_folding_model", True, "is_folding_model True"),
        ("rope_theta", 500000.0, "rope_theta 500000.0"),
        ("mask_token_id", 5, "mask_token_id 5"),
        ("vocab_size", 40, "vocab_size 40"),
        ("hidden_size", "64", "hidden_size '64'"),
        ("num_hidden_layers", True, "num_hidden_layers True"),
        ("num_attention_heads", 5, "hidden_size 64"),
    ],
)
def test_a_config_that_is_not_esm2_is_refused_by_key_and_value(folder, key, value, said):
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder)


def test_an_absent_key_means_transformers_default(folder):
    edit_config(folder, token_dropout=..., layer_norm_eps=...)
    config = load_checkpoint(folder).config
    assert config.token_dropout is False and config.layer_norm_eps == 1e-12


def test_vocab_is_checked_if_present(folder):
    tokens = list(protein().tokens)
    (folder / "vocab.txt").write_text("\n".join(tokens))
    assert load_checkpoint(folder).alphabet == "protein"
    tokens[4], tokens[5] = tokens[5], tokens[4]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    with pytest.raises(CheckpointError, match="line 5 is 'A', expected 'L'"):
        load_checkpoint(folder)
    (folder / "vocab.txt").write_text("\n".join(protein().tokens[:-1]))
    with pytest.raises(CheckpointError, match="line 33 is nothing, expected '<mask>'"):
        load_checkpoint(folder)


def test_a_pickle_is_never_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04not even a pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*Convert it"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 4000])
def test_a_truncated_file_is_refused(folder, keep):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep] if keep != 4000 else data[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{broken"])
def test_a_broken_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(folder)


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path)


def test_a_failed_import_leaves_nothing(folder, tmp_path):
    edit_tensors(folder, lambda t: t.pop("lm_head.bias"))
    with pytest.raises(CheckpointError):
        import_checkpoint(folder, tmp_path / "bundle", name="x")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_export_overwrites_nothing(original, tmp_path):
    checkpoint = load_checkpoint(original)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        write_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.tensors)
    write_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.tensors, force=True)
    assert is_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("imported", [True, False])
def test_transformers_loads_what_is_exported(original, tmp_path, imported):
    """Model, masked LM and tokenizer; an imported checkpoint and one that never was Hugging Face's."""
    checkpoint = load_checkpoint(original)
    kept = {"layout": checkpoint.layout, "extras": checkpoint.extras} if imported else {}
    out = write_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.tensors, **kept)
    theirs, info = transformers.EsmForMaskedLM.from_pretrained(out, output_loading_info=True)
    # made anew by transformers, and unused by the forward pass
    unused = ("contact_head", "inv_freq")
    assert [k for k in info["missing_keys"] if not any(u in k for u in unused)] == []
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    reference = transformers.EsmForMaskedLM.from_pretrained(original)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(tokenizer).__name__ == "EsmTokenizer"
    ids = tokenizer("MKTAYIAK<mask>RQ", return_tensors="pt")
    assert ids["input_ids"][0, 0] == 0 and ids["input_ids"][0, 9] == 32 and ids["input_ids"][0, -1] == 2
    with torch.no_grad():
        assert torch.equal(theirs.eval()(**ids).logits, reference.eval()(**ids).logits)
    _, info = transformers.EsmModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert [k for k in info["missing_keys"] if not any(u in k for u in unused)] == []


def test_encoder_and_hash_of_a_checkpoint(original, folder):
    first, same = load_checkpoint(original), load_checkpoint(folder)
    assert first.weights_hash == same.weights_hash and first.weights_hash.startswith("sha256:")
    edit_tensors(folder, lambda t: t["lm_head.bias"].add_(1e-3))
    assert load_checkpoint(folder).weights_hash != first.weights_hash
    state = first.encoder.state_dict()
    assert sorted(state) == sorted(first.tensors)
    assert all(state[name].equal(tensor) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("alphabet", ["dna", "rna"])
def test_another_alphabet_needs_and_gets_its_vocabulary(tmp_path, alphabet):
    from dataclasses import replace

    from bioseq.backbones.packed.encoder import PackedEncoder
    from bioseq.sequences.alphabet import by_name

    tokens = by_name(alphabet)
    config = replace(CONFIGS["tiny"], vocab_size=len(tokens), mask_id=tokens.mask_id, pad_id=tokens.pad_id)
    tensors = PackedEncoder(config).state_dict()
    out = write_checkpoint(tmp_path / "out", config, tensors, alphabet=alphabet)
    assert load_checkpoint(out).alphabet == alphabet
    assert load_checkpoint(out).config == config
    (out / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match="vocab_size 22"):
        load_checkpoint(out)

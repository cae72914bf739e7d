"""ESM-1b and ESM-2 as transformers' `EsmModel` and `EsmForMaskedLM` have them.

ESM-2: Lin et al. 2023, doi 10.1126/science.ade2574. ESM-1b: Rives et al. 2021, doi 10.1073/pnas.2016239118: learned
positions, which bound the length, and a norm of the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from bioseq.backbones.checkpoints.layout import Row, norms
from bioseq.backbones.checkpoints.reading import Reader, compare_vocabulary
from bioseq.backbones.packed.config import CONFIGS, ModelConfig
from bioseq.errors import CheckpointError
from bioseq.sequences import alphabet as alphabets

NAME, MODEL_TYPE, PREFIX = "ESM", "esm", "esm."
DECODER = "lm_head.decoder.weight"  # a copy of the embeddings, where it is stored

# Never used by ESM-2's forward pass (rotary positions, no pooling), but present in published checkpoints.
EXTRA = re.compile(
    r"^(esm\.)?(embeddings\.position_embeddings\.weight|embeddings\.position_ids"
    r"|(encoder\.layer\.(\d+|\*)\.attention\.self\.)?rotary_embeddings\.inv_freq"
    r"|pooler\..+|contact_head\..+)$"
)
_LAYER = {  # in our encoder -> in Hugging Face's layer
    "attn_norm": "attention.LayerNorm",
    "out": "attention.output.dense",
    "ffn_norm": "LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def rows(config: ModelConfig, *, lm_head: bool) -> Iterator[Row]:
    """Every tensor of the encoder, in the order of the model."""
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    sizes: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,), "out": (d, d), "ffn_norm": (d,), "up": (f, d), "down": (d, f),
    }  # fmt: skip
    yield Row("embed_tokens.weight", ("embeddings.word_embeddings.weight",), (v, d))
    if config.positions == "learned":
        table = (config.max_residues + 4, d)
        yield Row("embed_positions.weight", ("embeddings.position_embeddings.weight",), table)
    if config.embed_norm:
        yield from norms("embed_norm", "embeddings.layer_norm", d)
    for i in range(config.n_layers):
        layer = f"encoder.layer.{i}"
        for part in ("weight", "bias"):
            names = tuple(f"{layer}.attention.self.{x}.{part}" for x in ("query", "key", "value"))
            yield Row(f"layers.{i}.qkv.{part}", names, (d, d) if part == "weight" else (d,))
        for ours, theirs in _LAYER.items():
            shape = sizes[ours]
            if len(shape) == 1:
                yield from norms(f"layers.{i}.{ours}", f"{layer}.{theirs}", d)
                continue
            yield Row(f"layers.{i}.{ours}.weight", (f"{layer}.{theirs}.weight",), shape)
            yield Row(f"layers.{i}.{ours}.bias", (f"{layer}.{theirs}.bias",), shape[:1])
    yield from norms("final_norm", "encoder.emb_layer_norm_after", d)
    if lm_head:
        yield Row("lm_head.dense.weight", ("lm_head.dense.weight",), (d, d))
        yield Row("lm_head.dense.bias", ("lm_head.dense.bias",), (d,))
        yield from norms("lm_head.norm", "lm_head.layer_norm", d)
        yield Row("lm_head.bias", ("lm_head.bias",), (v,))


def is_extra(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor though no result uses it."""
    used = config.positions == "learned" and name.endswith("position_embeddings.weight")
    return not used and EXTRA.match(name) is not None


def find_alphabet(tokens: list[str] | None, where: str, raw: dict[str, Any]) -> str:
    """The alphabet's name, from the vocabulary, or by its size."""
    known = {name: alphabets.by_name(name).tokens for name in ("protein", "dna", "rna")}
    size = raw.get("vocab_size")
    if tokens is None:
        if size == len(known["protein"]):  # the nucleic alphabets are alike in size: they need vocab.txt
            return "protein"
        raise CheckpointError(
            f"config.json has vocab_size {size!r}; ESM-2's is 33.",
            hint="Add vocab.txt if this is another alphabet.",
        )
    for name, theirs in known.items():
        if tuple(tokens) == theirs:
            if size != len(theirs):
                raise CheckpointError(
                    f"config.json has vocab_size {size!r}, {where} has {len(theirs)} tokens."
                )
            return name
    compare_vocabulary(tokens, known["protein"], where, "ESM-2")
    raise AssertionError("unreachable: the vocabularies differ somewhere")


def read_config(raw: dict[str, Any], alphabet: str) -> ModelConfig:
    """`ModelConfig` of a config.json. A key that is absent means transformers' default, which is often not
    ESM-2's: position_embedding_type "absolute", token_dropout false, layer_norm_eps 1e-12."""
    read = Reader(raw, NAME)
    read.only(is_folding_model=False, is_decoder=False, add_cross_attention=False, hidden_act="gelu")
    positions = raw.get("position_embedding_type", "absolute")
    if positions not in ("rotary", "absolute"):
        raise read.refuse("position_embedding_type", positions, "'rotary' and 'absolute' are read")
    if positions == "rotary":
        read.plain_rotation()
    tokens = alphabets.by_name(alphabet)
    for key, value in (("pad_token_id", tokens.pad_id), ("mask_token_id", tokens.mask_id)):
        if raw.get(key) not in (None, value):
            raise read.refuse(key, raw[key], f"the {alphabet} alphabet's is {value}")
    sizes = read.sizes()
    table = read.get("max_position_embeddings", 1026, int)
    if positions == "absolute" and table < 5:
        raise read.refuse("max_position_embeddings", table, "no residue has a place")
    named = [c.name for c in CONFIGS.values() if all(getattr(c, key) == n for key, n in sizes.items())]
    return ModelConfig(
        name=named[0] if named and positions == "rotary" else f"{sizes['n_layers']}x{sizes['d_model']}",
        **sizes,
        vocab_size=len(tokens),
        pad_id=tokens.pad_id,
        mask_id=tokens.mask_id,
        cls_id=tokens.cls_id,
        eos_id=tokens.eos_id,
        token_dropout=read.get("token_dropout", False, bool, type(None)) or False,
        layer_norm_eps=float(read.get("layer_norm_eps", 1e-12, int, float)),
        positions="learned" if positions == "absolute" else "rotary",
        max_residues=table - 4 if positions == "absolute" else 1022,
        embed_norm=read.get("emb_layer_norm_before", False, bool, type(None)) or False,
    )


def write_config(
    config: ModelConfig, *, lm_head: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """config.json of an encoder that was not imported. Rotary positions set no limit to the length, so
    there max_position_embeddings only follows ESM-2's habit (1,022 residues -> 1,026)."""
    return {
        "architectures": ["EsmForMaskedLM" if lm_head else "EsmModel"],
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "emb_layer_norm_before": config.embed_norm,
        "eos_token_id": config.eos_id,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": config.d_model,
        "initializer_range": 0.02,
        "intermediate_size": config.d_ff,
        "is_folding_model": False,
        "layer_norm_eps": config.layer_norm_eps,
        "mask_token_id": config.mask_id,
        "max_position_embeddings": config.max_residues + 4,
        "model_type": "esm",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "pad_token_id": config.pad_id,
        "position_embedding_type": "absolute" if config.positions == "learned" else "rotary",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "token_dropout": config.token_dropout,
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }

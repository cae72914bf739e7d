"""ESM Cambrian (ESM-C) as transformers' `EsmcModel` and `EsmcForMaskedLM` have it.

EvolutionaryScale 2024, "ESM Cambrian: Revealing the mysteries of proteins with unsupervised learning". Its vocabulary is
ESM-2's, with `|` (a break between chains) for `<null_1>`, in a table of 64 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bioseq.backbones.checkpoints.layout import Row, norms
from bioseq.backbones.checkpoints.reading import Reader, compare_vocabulary
from bioseq.backbones.packed.config import ModelConfig
from bioseq.sequences.alphabet import protein

NAME, MODEL_TYPE, PREFIX = "ESM-C", "esmc", "esmc."


def rows(config: ModelConfig, *, lm_head: bool) -> Iterator[Row]:
    """Every tensor of the encoder, in the order of the model."""
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    yield Row("embed_tokens.weight", ("embed_tokens.weight",), (v, d))
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"layers.{i}.self_attn"
        yield from norms(f"{ours}.attn_norm", f"layers.{i}.input_layernorm", d)
        yield Row(f"{ours}.qkv.weight", tuple(f"{theirs}.{x}_proj.weight" for x in "qkv"), (d, d))
        yield from norms(f"{ours}.q_norm", f"{theirs}.q_norm", d, bias=False)
        yield from norms(f"{ours}.k_norm", f"{theirs}.k_norm", d, bias=False)
        yield Row(f"{ours}.out.weight", (f"{theirs}.o_proj.weight",), (d, d))
        yield from norms(f"{ours}.ffn_norm", f"layers.{i}.post_attention_layernorm", d)
        both = (f"layers.{i}.mlp.gate_proj.weight", f"layers.{i}.mlp.up_proj.weight")
        yield Row(f"{ours}.up.weight", both, (f, d))
        yield Row(f"{ours}.down.weight", (f"layers.{i}.mlp.down_proj.weight",), (d, f))
    yield from norms("final_norm", "norm", d, bias=False)
    if lm_head:
        yield Row("lm_head.dense.weight", ("lm_head.dense.weight",), (d, d))
        yield Row("lm_head.dense.bias", ("lm_head.dense.bias",), (d,))
        yield from norms("lm_head.norm", "lm_head.layer_norm", d)
        yield Row("lm_head.decoder", ("lm_head.decoder.weight",), (v, d))
        yield Row("lm_head.bias", ("lm_head.decoder.bias",), (v,))


def is_extra(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor though no result uses it."""
    return name.endswith(("rotary_emb.inv_freq", "rotary_emb.original_inv_freq"))


def find_alphabet(tokens: list[str] | None, where: str, raw: dict[str, Any]) -> str:
    """Protein; raises `CheckpointError` for another vocabulary."""
    if tokens is not None:
        ours = protein().tokens
        given = ["<null_1>" if token == "|" else token for token in tokens[: len(ours)]]
        compare_vocabulary(given, ours, where, NAME)
    return "protein"


def read_config(raw: dict[str, Any], alphabet: str) -> ModelConfig:
    """`ModelConfig` of a config.json."""
    read = Reader(raw, NAME)
    read.plain_rotation()
    tokens = protein()
    read.only(
        hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
        pad_token_id=tokens.pad_id, bos_token_id=tokens.cls_id, eos_token_id=tokens.eos_id, mask_token_id=tokens.mask_id,
    )  # fmt: skip
    sizes = read.sizes()
    read.only(
        head_dim=sizes["d_model"] // sizes["n_heads"], num_key_value_heads=sizes["n_heads"]
    )  # no grouped queries
    vocabulary = read.get("vocab_size", 64, int)
    if vocabulary < len(tokens):
        raise read.refuse("vocab_size", vocabulary, f"at least {len(tokens)} tokens are needed")
    return ModelConfig(
        name=f"esmc-{sizes['n_layers']}x{sizes['d_model']}",
        **sizes,
        vocab_size=vocabulary,
        token_dropout=False,
        max_residues=read.get("max_position_embeddings", 2048, int) - 2,
        qk_norm=True,
        bias=False,
        final_norm_bias=False,
        activation="swiglu",
        branch_divisor=(sizes["n_layers"] / 36) ** 0.5,
        tied=False,
    )


def write_config(
    config: ModelConfig, *, lm_head: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """config.json of an encoder that was not imported."""
    return {
        "architectures": ["EsmcForMaskedLM" if lm_head else "EsmcModel"],
        "attention_bias": False,
        "bos_token_id": config.cls_id,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": config.eos_id,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "mask_token_id": config.mask_id,
        "max_position_embeddings": config.max_residues + 2,
        "mlp_bias": False,
        "model_type": MODEL_TYPE,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "pad_token_id": config.pad_id,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }

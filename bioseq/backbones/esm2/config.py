"""config.json and vocab.txt of the Hugging Face ESM-2 layout <-> `ModelConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bioseq.backbones.packed.config import CONFIGS, ModelConfig
from bioseq.errors import CheckpointError
from bioseq.sequences import alphabet as alphabets
from bioseq.specs.reading import parse


def read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent} has no {file.name}.", hint="Give a Hugging Face model folder."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}.") from error


def parse_json(text: str, file: Path) -> dict[str, Any]:
    data = parse(text, str(file), error=CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is not a JSON object.")
    return data


def find_alphabet(path: Path, raw: dict[str, Any]) -> str:
    """The alphabet's name, from vocab.txt (or config.json's vocab_list), or by the vocabulary's size."""
    known = {name: alphabets.by_name(name).tokens for name in ("protein", "dna", "rna")}
    tokens: list[str] | None = None
    where = "vocab.txt"
    if (path / "vocab.txt").exists():
        tokens = [line.strip() for line in read_text(path / "vocab.txt").splitlines()]
        while tokens and not tokens[-1]:
            tokens.pop()
    elif isinstance(raw.get("vocab_list"), list):
        tokens, where = [str(t) for t in raw["vocab_list"]], "config.json's vocab_list"
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
    expected = known["protein"]
    for i in range(max(len(tokens), len(expected))):
        found = repr(tokens[i]) if i < len(tokens) else "nothing"
        wanted = repr(expected[i]) if i < len(expected) else "nothing"
        if found != wanted:
            raise CheckpointError(
                f"{where} line {i + 1} is {found}, expected {wanted}.",
                hint="The tokens must be ESM-2's, in order.",
            )
    raise AssertionError("unreachable: the vocabularies differ somewhere")


def from_hf_config(raw: dict[str, Any], alphabet: str) -> ModelConfig:
    """`ModelConfig` of a config.json. A key that is absent means transformers' default, which is often not
    ESM-2's: position_embedding_type "absolute", token_dropout false, layer_norm_eps 1e-12."""

    def refuse(key: str, value: Any, need: str) -> CheckpointError:
        return CheckpointError(
            f"config.json has {key} {value!r}; {need}.", hint="Only ESM-2 checkpoints are read."
        )

    def get(key: str, default: Any, *kinds: type) -> Any:
        value = raw.get(key, default)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            raise refuse(key, value, f"{' or '.join(k.__name__ for k in kinds)} is needed")
        return value

    if raw.get("model_type") != "esm":
        raise refuse("model_type", raw.get("model_type"), "bioseq reads 'esm'")
    if raw.get("position_embedding_type", "absolute") != "rotary":
        value = raw.get("position_embedding_type", "absolute")
        raise refuse("position_embedding_type", value, "ESM-2's is 'rotary'")
    for key in ("emb_layer_norm_before", "is_folding_model", "is_decoder", "add_cross_attention"):
        if raw.get(key) not in (None, False):
            raise refuse(key, raw[key], "ESM-2's is false")
    rope: dict[str, Any] = {"rope_theta": raw.get("rope_theta", 10000.0)}
    for key in ("rope_parameters", "rope_scaling"):
        rope.update(raw.get(key) or {})
    if rope["rope_theta"] != 10000.0:
        raise refuse("rope_theta", rope["rope_theta"], "ESM-2's is 10000")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise refuse("rope_type", rope.get("rope_type", rope.get("type")), "ESM-2's is 'default'")
    tokens = alphabets.by_name(alphabet)
    for key, value in (("pad_token_id", tokens.pad_id), ("mask_token_id", tokens.mask_id)):
        if raw.get(key) not in (None, value):
            raise refuse(key, raw[key], f"the {alphabet} alphabet's is {value}")
    sizes = {
        "n_layers": get("num_hidden_layers", 12, int),
        "d_model": get("hidden_size", 768, int),
        "n_heads": get("num_attention_heads", 12, int),
        "d_ff": get("intermediate_size", 3072, int),
    }
    if (
        min(sizes.values()) < 1
        or sizes["d_model"] % sizes["n_heads"]
        or sizes["d_model"] // sizes["n_heads"] % 2
    ):
        raise refuse(
            "hidden_size",
            sizes["d_model"],
            f"it must be an even multiple of num_attention_heads ({sizes['n_heads']}), and all sizes positive",
        )
    named = [c.name for c in CONFIGS.values() if all(getattr(c, key) == n for key, n in sizes.items())]
    return ModelConfig(
        name=named[0] if named else f"{sizes['n_layers']}x{sizes['d_model']}",
        **sizes,
        vocab_size=len(tokens),
        pad_id=tokens.pad_id,
        mask_id=tokens.mask_id,
        cls_id=tokens.cls_id,
        eos_id=tokens.eos_id,
        token_dropout=get("token_dropout", False, bool, type(None)) or False,
        layer_norm_eps=float(get("layer_norm_eps", 1e-12, int, float)),
    )


def to_hf_config(
    config: ModelConfig, *, lm_head: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """config.json of an encoder that was not imported. Rotary positions set no limit to the length, so
    max_position_embeddings only follows ESM-2's habit (1,022 residues -> 1,026)."""
    return {
        "architectures": ["EsmForMaskedLM" if lm_head else "EsmModel"],
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "emb_layer_norm_before": False,
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
        "position_embedding_type": "rotary",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "token_dropout": config.token_dropout,
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }

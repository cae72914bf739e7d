"""AMPLIFY as its authors publish it (Fournier et al. 2024, doi 10.1101/2024.09.23.614603; chandar-lab/AMPLIFY).

RMSNorm, SwiGLU, no biases, rotary positions that turn neighbouring numbers, a plain matrix to the logits. Its
vocabulary is another, and lacks the letters X, U, Z and O. It is brought into the protein alphabet's order when a
checkpoint is read, and back when one is written: a letter that it lacks has the embedding of its <unk>, and a logit so low
that its probability is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bioseq.backbones.checkpoints.layout import Row, norms
from bioseq.backbones.checkpoints.reading import Reader
from bioseq.backbones.packed.config import ModelConfig
from bioseq.errors import CheckpointError
from bioseq.sequences.alphabet import protein

NAME, MODEL_TYPE, PREFIX = "AMPLIFY", "AMPLIFY", ""
ABSENT = -1e4  # a logit that no softmax sees, and that every dtype holds
_OURS = {"<bos>": "<cls>", "|": "<null_1>"}
BY_TOKEN = ("embed_tokens.weight", "lm_head.decoder", "lm_head.bias")


def inner_width(intermediate_size: int) -> int:
    """Width of a feed-forward block: two thirds of what config.json has, rounded up to a multiple of 8."""
    return -(-int(2 * intermediate_size / 3) // 8) * 8


def rows(config: ModelConfig, *, lm_head: bool) -> Iterator[Row]:
    """Every tensor of the encoder, in the order of the model."""
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    yield Row("embed_tokens.weight", ("encoder.weight",), (v, d))
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"transformer_encoder.{i}"
        yield from norms(f"{ours}.attn_norm", f"{theirs}.attention_norm", d, bias=False)
        yield Row(f"{ours}.qkv.weight", tuple(f"{theirs}.{x}.weight" for x in "qkv"), (d, d))
        yield Row(f"{ours}.out.weight", (f"{theirs}.wo.weight",), (d, d))
        yield from norms(f"{ours}.ffn_norm", f"{theirs}.ffn_norm", d, bias=False)
        yield Row(f"{ours}.up.weight", (f"{theirs}.ffn.w12.weight",), (2 * f, d))
        yield Row(f"{ours}.down.weight", (f"{theirs}.ffn.w3.weight",), (d, f))
    yield from norms("final_norm", "layer_norm_2", d, bias=False)
    if lm_head:
        yield Row("lm_head.decoder", ("decoder.weight",), (v, d))
        yield Row("lm_head.bias", ("decoder.bias",), (v,))


def is_extra(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor though no result uses it."""
    return name == "freqs_cis"


def find_alphabet(tokens: list[str] | None, where: str, raw: dict[str, Any]) -> str:
    """Protein; raises `CheckpointError` for a vocabulary that cannot be brought into its order."""
    if tokens is None:
        raise CheckpointError(
            f"{NAME} needs its vocabulary.", hint="Put tokenizer.json or vocab.txt beside config.json."
        )
    if raw.get("vocab_size", 27) != len(tokens):
        raise CheckpointError(
            f"config.json has vocab_size {raw.get('vocab_size')!r}, {where} has {len(tokens)} tokens."
        )
    _places(tokens)
    return "protein"


def read_config(raw: dict[str, Any], alphabet: str) -> ModelConfig:
    """`ModelConfig` of a config.json, its vocabulary already that of the protein alphabet."""
    read = Reader(raw, NAME)
    read.only(
        rms_norm=True, att_bias=False, ffn_bias=False, layer_norm_after_embedding=False, layer_norm_before_last_layer=True,
    )  # fmt: skip
    act = raw.get("hidden_act", "SwiGLU")
    if str(act).lower() != "swiglu":
        raise read.refuse("hidden_act", act, "AMPLIFY's is 'SwiGLU'")
    sizes = read.sizes()
    sizes["d_ff"] = inner_width(sizes["d_ff"])
    return ModelConfig(
        name=f"amplify-{sizes['n_layers']}x{sizes['d_model']}",
        **sizes,
        vocab_size=len(protein()),
        token_dropout=False,
        layer_norm_eps=float(read.get("norm_eps", 1e-5, int, float)),
        max_residues=read.get("max_length", 2048, int) - 2,
        norm="rms",
        final_norm_bias=False,
        bias=False,
        activation="swiglu",
        rotary_pairs=True,
        tied=False,
        dense_head=False,
    )


def write_config(
    config: ModelConfig, *, lm_head: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Raises `CheckpointError`: config.json does not hold every inner width, so only imported ones are written."""
    raise CheckpointError("an AMPLIFY backbone that was not imported cannot be exported.")


def _places(vocabulary: Sequence[str]) -> list[int]:
    """The protein alphabet's id of each token. Raises `CheckpointError`."""
    tokens = protein().tokens
    names = [_OURS.get(token, token) for token in vocabulary]
    if odd := [v for v, name in zip(vocabulary, names) if name not in tokens]:
        raise CheckpointError(f"{NAME}'s vocabulary has {odd[0]!r}, which no protein has here.")
    if lack := [t for t in ("<cls>", "<eos>", "<mask>", "<unk>", *protein().standard) if t not in names]:
        raise CheckpointError(f"{NAME}'s vocabulary lacks {lack[0]!r}.")
    return [tokens.index(name) for name in names]


def to_alphabet(tensors: Mapping[str, Tensor], vocabulary: Sequence[str]) -> dict[str, Tensor]:
    """The tensors with the rows of tokens in the protein alphabet's order."""
    places, out = _places(vocabulary), dict(tensors)
    for name in BY_TOKEN:
        if (theirs := tensors.get(name)) is None:
            continue
        fill = theirs[vocabulary.index("<unk>")] if name == BY_TOKEN[0] else torch.zeros_like(theirs[0])
        if name == BY_TOKEN[2]:
            fill = torch.full_like(theirs[0], ABSENT)
        ours = fill.expand(len(protein()), *theirs.shape[1:]).clone()
        ours[places] = theirs
        out[name] = ours
    return out


def from_alphabet(tensors: Mapping[str, Tensor], vocabulary: Sequence[str]) -> dict[str, Tensor]:
    """`to_alphabet` undone."""
    places = _places(vocabulary)
    return {k: v[places] if k in BY_TOKEN else v for k, v in tensors.items()}

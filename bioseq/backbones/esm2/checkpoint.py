"""The Hugging Face layout of ESM-2: reading and writing it without loss.

Concept: a checkpoint folder holds `config.json`, the tensors in safetensors (one file, or shards with an
index) and perhaps `vocab.txt`. Reading gives the packed encoder's own tensors (query, key and value fused
into `qkv`, rows in that order), plus everything needed to write the same tensors back: `Layout` remembers how
they were spelt, and `extras` the tensors that ESM-2 carries and never uses. Tensors keep their dtype.

What is read: `EsmForMaskedLM` (prefix "esm.") and `EsmModel` (no prefix); both spellings of a layer norm's
weight and bias; the LM head's decoder absent or equal to the embeddings (it is tied); no LM head at all.
Anything else missing, spare or of another shape is a `CheckpointError` that names the tensor.

Architecture: Lin et al. 2023, doi 10.1126/science.ade2574; layout: transformers' modeling_esm.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bioseq.backbones.esm2.config import find_alphabet, from_hf_config, parse_json, read_text, to_hf_config
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.packed.weights import build_encoder, hash_weights
from bioseq.errors import CheckpointError, OutputError
from bioseq.output import atomic_folder
from bioseq.sequences import alphabet as alphabets
from bioseq.specs.reading import build, plain

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Never used by ESM-2's forward pass (rotary positions, no pooling), but present in published checkpoints.
_EXTRA = re.compile(
    r"^(esm\.)?(embeddings\.position_embeddings\.weight|embeddings\.position_ids"
    r"|(encoder\.layer\.(\d+|\*)\.attention\.self\.)?rotary_embeddings\.inv_freq"
    r"|pooler\..+|contact_head\..+)$"
)
_DECODER = "lm_head.decoder.weight"
_OLD_SPELLING = {"weight": "gamma", "bias": "beta"}
_LAYER = {  # in our encoder -> in Hugging Face's layer; a layer norm is marked by "norm" in our name
    "attn_norm": "attention.LayerNorm",
    "out": "attention.output.dense",
    "ffn_norm": "LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Layout:
    """How a checkpoint was spelt. `old_norms` are the Hugging Face names of the layer norms written as
    gamma/beta; `decoder` says that the tied decoder was stored too; `config` is config.json's text."""

    config: str
    prefix: str = "esm."
    decoder: bool = False
    old_norms: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layout:
        return build(cls, data, error=CheckpointError, where="the kept Hugging Face layout")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read. `tensors` have the packed encoder's names, `extras` Hugging Face's."""

    config: ModelConfig
    alphabet: str
    tensors: dict[str, torch.Tensor]
    layout: Layout
    extras: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def lm_head(self) -> bool:
        return "lm_head.bias" in self.tensors

    @cached_property
    def encoder(self) -> PackedEncoder:
        """The packed encoder in float32, in evaluation mode."""
        return build_encoder(self.config, self.tensors)

    @cached_property
    def weights_hash(self) -> str:
        """That of a bundle made from this checkpoint."""
        return hash_weights(self.config, self.tensors)


# ---------------------------------------------------------------------------------------------------- names


def _plan(
    config: ModelConfig, *, lm_head: bool
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...], bool]]:
    """(our name, Hugging Face names without prefix, shape of each, is a layer norm) in the order of the model."""
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    sizes: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "out": (d, d),
        "ffn_norm": (d,),
        "up": (f, d),
        "down": (d, f),
    }
    yield "embed_tokens.weight", ("embeddings.word_embeddings.weight",), (v, d), False
    for i in range(config.n_layers):
        layer = f"encoder.layer.{i}"
        for part in ("weight", "bias"):
            names = tuple(f"{layer}.attention.self.{x}.{part}" for x in _QKV)
            yield f"layers.{i}.qkv.{part}", names, (d, d) if part == "weight" else (d,), False
        for ours, theirs in _LAYER.items():
            shape = sizes[ours]
            yield f"layers.{i}.{ours}.weight", (f"{layer}.{theirs}.weight",), shape, len(shape) == 1
            yield f"layers.{i}.{ours}.bias", (f"{layer}.{theirs}.bias",), shape[:1], len(shape) == 1
    for part in ("weight", "bias"):
        yield f"final_norm.{part}", (f"encoder.emb_layer_norm_after.{part}",), (d,), True
    if lm_head:
        yield "lm_head.dense.weight", ("lm_head.dense.weight",), (d, d), False
        yield "lm_head.dense.bias", ("lm_head.dense.bias",), (d,), False
        yield "lm_head.norm.weight", ("lm_head.layer_norm.weight",), (d,), True
        yield "lm_head.norm.bias", ("lm_head.layer_norm.bias",), (d,), True
        yield "lm_head.bias", ("lm_head.bias",), (v,), False


def _spelt(name: str, prefix: str, old: bool) -> str:
    stem, _, part = name.rpartition(".")
    name = f"{stem}.{_OLD_SPELLING[part]}" if old else name
    return name if name.startswith("lm_head.") else prefix + name


# --------------------------------------------------------------------------------------------------- reading


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a Hugging Face ESM-2 folder; tensors in their stored dtype, on the CPU. Raises `CheckpointError`."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder.",
            hint="Give a Hugging Face model folder: config.json and model.safetensors.",
        )
    text = read_text(path / "config.json")
    raw = parse_json(text, path / "config.json")
    alphabet = find_alphabet(path, raw)
    config = from_hf_config(raw, alphabet)
    found = _read_tensors(path)
    prefix = "esm." if any(name.startswith("esm.") for name in found) else ""
    extras = {name: found.pop(name) for name in list(found) if _EXTRA.match(name)}
    lm_head = any(name.startswith("lm_head.") for name in found)
    decoder = found.pop(_DECODER, None)

    tensors: dict[str, torch.Tensor] = {}
    old_norms: set[str] = set()
    missing: list[str] = []
    for ours, theirs, shape, norm in _plan(config, lm_head=lm_head):
        parts = []
        for name in theirs:
            key, old = _spelt(name, prefix, False), _spelt(name, prefix, True) if norm else None
            if old is not None and key not in found and old in found:
                key = old
                old_norms.add(old.rpartition(".")[0])
            if key not in found:
                missing.append(key)
                continue
            parts.append(_checked(key, found.pop(key), shape))
        if len(parts) != len(theirs):
            continue
        if len({part.dtype for part in parts}) > 1:
            kinds = ", ".join(f"{_spelt(n, prefix, False)} {p.dtype}" for n, p in zip(theirs, parts))
            raise CheckpointError(f"query, key and value differ in dtype: {kinds}.", hint="Store them alike.")
        tensors[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    _complain(path, missing, sorted(found))

    embeddings = tensors["embed_tokens.weight"]
    if decoder is not None:
        _checked(_DECODER, decoder, tuple(embeddings.shape))
        if not torch.equal(decoder.to(embeddings.dtype), embeddings) or decoder.dtype != embeddings.dtype:
            raise CheckpointError(
                f"{_DECODER} differs from the embeddings; ESM-2's decoder is tied to them.",
                hint="bioseq reads tied checkpoints only.",
            )
    elif lm_head and raw.get("tie_word_embeddings") is False:
        raise CheckpointError(f"tensor missing: {_DECODER} (config.json has tie_word_embeddings false).")
    layout = Layout(text, prefix, decoder is not None, tuple(sorted(old_norms)))
    return Checkpoint(config, alphabet, tensors, layout, extras)


def _complain(path: Path, missing: list[str], spare: list[str]) -> None:
    said = []
    for what, names in (("missing", missing), ("unknown", spare)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            said.append(f"{what} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:5])}{more}")
    if said:
        raise CheckpointError(
            f"{path} is not an ESM-2 checkpoint; {'; '.join(said)}.",
            hint="bioseq reads transformers' EsmModel and EsmForMaskedLM; config.json must fit the tensors.",
        )


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}.",
            hint="config.json and the tensors do not belong together.",
        )
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"tensor {name} is {tensor.dtype}; float32, float16 and bfloat16 are read.")
    return tensor


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if (path / WEIGHTS).is_file():
        return _load(path / WEIGHTS)
    if not (path / INDEX).is_file():
        pickled = sorted(
            p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        )
        if pickled:
            raise CheckpointError(
                f"{path} has no {WEIGHTS}; {pickled[0]} is a pickle, which can run code and is never opened.",
                hint="Convert it where you trust it: EsmForMaskedLM.from_pretrained(DIR).save_pretrained(NEW).",
            )
        raise CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}.")
    weight_map = parse_json(read_text(path / INDEX), path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map.")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX} names {shard!r}; a shard is a .safetensors file beside it.")
        if not (path / shard).is_file():
            raise CheckpointError(f"{path}: shard {shard} is missing.", hint="Copy the folder whole.")
        for name, tensor in _load(path / shard).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name} lies in two shards.")
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{path}: tensor {name} lies in {shard}, but {INDEX} lists it elsewhere."
                )
            tensors[name] = tensor
    for name in sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(f"{path}: missing tensor: {name} ({INDEX} lists it in {weight_map[name]}).")
    return tensors


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(
            file, framework="pt"
        ):  # the header first: a truncated file is refused before it is mapped
            pass
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {file}: {error}.", hint="The file may be cut short: copy it again."
        ) from error


# --------------------------------------------------------------------------------------------------- writing


def to_hf_tensors(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    layout: Layout | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The packed encoder's tensors under Hugging Face's names: exactly those that were read, if `layout` and
    `extras` are a checkpoint's, else `EsmForMaskedLM`'s (`EsmModel`'s without an LM head)."""
    lm_head = "lm_head.bias" in tensors
    layout = layout or Layout("", "esm." if lm_head else "")
    old = set(layout.old_norms)
    out: dict[str, torch.Tensor] = {}
    for ours, theirs, _, norm in _plan(config, lm_head=lm_head):
        if ours not in tensors:
            raise CheckpointError(f"the encoder lacks tensor {ours}.")
        parts = tensors[ours].detach().cpu().chunk(len(theirs))
        for name, part in zip(theirs, parts):
            stem = _spelt(name, layout.prefix, False).rpartition(".")[0]
            out[_spelt(name, layout.prefix, norm and stem in old)] = part.clone(
                memory_format=torch.contiguous_format
            )
    if layout.decoder:
        out[_DECODER] = tensors["embed_tokens.weight"].detach().cpu().clone()
    out.update(extras or {})
    return out


def write_checkpoint(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    alphabet: str = "protein",
    layout: Layout | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
    force: bool = False,
) -> Path:
    """Write a folder that transformers' EsmModel, EsmForMaskedLM and EsmTokenizer load. An imported
    checkpoint (`layout`, `extras`) gets its own config.json and the same tensors back, byte for byte.
    Raises `OutputError` if `path` exists (without `force`) or cannot be written, `CheckpointError` for an
    encoder with parts that ESM-2 does not have."""
    path = Path(path)
    for has, part in (
        (config.reads_homologs, "a second input for homologs"),
        (config.convolution, "convolutions"),
    ):
        if has:
            raise CheckpointError(
                f"{config.name} has {part}, which transformers' ESM does not have; it would compute other results.",
                hint="Use the bundle with bioseq, or export a backbone without it.",
            )
    hf = to_hf_tensors(config, tensors, layout=layout, extras=extras)
    if layout is not None:
        text = layout.config
    else:
        dtype = tensors["embed_tokens.weight"].dtype
        raw = to_hf_config(config, lm_head="lm_head.bias" in tensors, dtype=dtype)
        text = json.dumps(raw, indent=2) + "\n"
    special = {f"{t}_token": f"<{t}>" for t in ("cls", "eos", "mask", "pad", "unk")}
    tokenizer = {"clean_up_tokenization_spaces": False, **special, "tokenizer_class": "EsmTokenizer"}
    with atomic_folder(path, force=force) as folder:
        (folder / "config.json").write_text(text, "utf-8")
        (folder / "vocab.txt").write_text("\n".join(alphabets.by_name(alphabet).tokens) + "\n", "utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n", "utf-8")
        try:
            # transformers refuses a file without this metadata
            save_file(hf, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OutputError(f"cannot write {path}: {error}.", hint="Check the free space.") from error
    return path

"""Checkpoint folders in Hugging Face's layout: reading and writing them without loss.

Concept: a checkpoint folder holds `config.json`, the tensors in safetensors (one file, or shards with an
index) and perhaps a vocabulary. Reading gives the packed encoder's own tensors (query, key and value fused
into `qkv`, rows in that order), plus everything needed to write the same tensors back: `Layout` remembers how
they were spelt, and `extras` the tensors that the model carries and never uses. Tensors keep their dtype.

What is read: the families of `FAMILIES`, by config.json's model_type, with the prefix of a model with an LM head or
without; both spellings of a norm's weight and bias; a tied decoder absent or equal to the embeddings; no LM head at
all. Anything else missing, spare or of another shape is a `CheckpointError` that names the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bioseq.backbones.checkpoints import amplify, esm, esmc
from bioseq.backbones.checkpoints.layout import Family, Layout
from bioseq.backbones.checkpoints.reading import parse_json, read_text, read_vocabulary
from bioseq.backbones.checkpoints.tensors import WEIGHTS, checked, read_tensors
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.packed.weights import build_encoder, hash_weights
from bioseq.errors import CheckpointError, OutputError
from bioseq.output import atomic_folder
from bioseq.sequences import alphabet as alphabets

FAMILIES: dict[str, Family] = {f.MODEL_TYPE: f for f in (esm, esmc, amplify)}
_OLD_SPELLING = {"weight": "gamma", "bias": "beta"}


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


def _spelt(name: str, prefix: str, old: bool) -> str:
    stem, _, part = name.rpartition(".")
    name = f"{stem}.{_OLD_SPELLING[part]}" if old else name
    return name if name.startswith("lm_head.") else prefix + name


# --------------------------------------------------------------------------------------------------- reading


def read_config(path: Path) -> tuple[Family, ModelConfig, str, tuple[str, ...]]:
    """(family, shape, alphabet, vocabulary where it is in another order) of a folder's config.json and vocabulary.
    Raises `CheckpointError` for what the packed encoder does not compute."""
    raw = parse_json(read_text(path / "config.json"), path / "config.json")
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"config.json has model_type {raw.get('model_type')!r}; {', '.join(map(repr, FAMILIES))} are read.",
            hint="See docs/backbones.md for the families that bioseq knows.",
        )
    tokens, where = read_vocabulary(path, raw)
    alphabet = family.find_alphabet(tokens, where, raw)
    vocabulary = tuple(tokens or ()) if family is amplify else ()
    return family, family.read_config(raw, alphabet), alphabet, vocabulary


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a folder; tensors in their stored dtype, on the CPU. Raises `CheckpointError`."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder.",
            hint="Give a Hugging Face model folder: config.json and model.safetensors.",
        )
    family, config, alphabet, vocabulary = read_config(path)
    text = read_text(path / "config.json")
    found = read_tensors(path)
    prefix = family.PREFIX if any(name.startswith(family.PREFIX) for name in found) else ""
    extras = {name: found.pop(name) for name in list(found) if family.is_extra(name, config)}
    lm_head = any(name.startswith(("lm_head.", "decoder.")) for name in found)
    decoder = found.pop(esm.DECODER, None) if config.tied else None

    tensors: dict[str, torch.Tensor] = {}
    old_norms: set[str] = set()
    missing: list[str] = []
    for ours, theirs, shape, norm in family.rows(config, lm_head=lm_head):
        if vocabulary and shape[0] == config.vocab_size and ours in amplify.BY_TOKEN:
            shape = (len(vocabulary), *shape[1:])
        parts = []
        for name in theirs:
            key, old = _spelt(name, prefix, False), _spelt(name, prefix, True) if norm else None
            if old is not None and key not in found and old in found:
                key = old
                old_norms.add(old.rpartition(".")[0])
            if key not in found:
                missing.append(key)
                continue
            parts.append(checked(key, found.pop(key), shape))
        if len(parts) != len(theirs):
            continue
        if len({part.dtype for part in parts}) > 1:
            kinds = ", ".join(f"{_spelt(n, prefix, False)} {p.dtype}" for n, p in zip(theirs, parts))
            raise CheckpointError(f"parts of one matrix differ in dtype: {kinds}.", hint="Store them alike.")
        tensors[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    _complain(path, family.NAME, missing, sorted(found))

    embeddings = tensors["embed_tokens.weight"]
    if decoder is not None:
        checked(esm.DECODER, decoder, tuple(embeddings.shape))
        if not torch.equal(decoder.to(embeddings.dtype), embeddings) or decoder.dtype != embeddings.dtype:
            raise CheckpointError(
                f"{esm.DECODER} differs from the embeddings; {family.NAME}'s decoder is tied to them.",
                hint="bioseq reads tied checkpoints only.",
            )
    elif config.tied and lm_head and json.loads(text).get("tie_word_embeddings") is False:
        raise CheckpointError(f"tensor missing: {esm.DECODER} (config.json has tie_word_embeddings false).")
    if vocabulary:
        tensors = amplify.to_alphabet(tensors, vocabulary)
    layout = Layout(text, prefix, decoder is not None, tuple(sorted(old_norms)), vocabulary)
    return Checkpoint(config, alphabet, tensors, layout, extras)


def _complain(path: Path, family: str, missing: list[str], spare: list[str]) -> None:
    said = []
    for what, names in (("missing", missing), ("unknown", spare)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            said.append(f"{what} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:5])}{more}")
    if said:
        raise CheckpointError(
            f"{path} is not an {family} checkpoint; {'; '.join(said)}.",
            hint="config.json must fit the tensors.",
        )


# --------------------------------------------------------------------------------------------------- writing


def to_hf_tensors(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    layout: Layout | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The packed encoder's tensors under Hugging Face's names: exactly those that were read, if `layout` and
    `extras` are a checkpoint's, else those of the family's class with an LM head (or without)."""
    family = _family(config)
    lm_head = "lm_head.bias" in tensors
    layout = layout or Layout("", family.PREFIX if lm_head else "")
    if layout.vocabulary:
        tensors = amplify.from_alphabet(tensors, layout.vocabulary)
    old = set(layout.old_norms)
    out: dict[str, torch.Tensor] = {}
    for ours, theirs, _, norm in family.rows(config, lm_head=lm_head):
        if ours not in tensors:
            raise CheckpointError(f"the encoder lacks tensor {ours}.")
        parts = tensors[ours].detach().cpu().chunk(len(theirs))
        for name, part in zip(theirs, parts):
            stem = _spelt(name, layout.prefix, False).rpartition(".")[0]
            out[_spelt(name, layout.prefix, norm and stem in old)] = part.clone(
                memory_format=torch.contiguous_format
            )
    if layout.decoder:
        out[esm.DECODER] = tensors["embed_tokens.weight"].detach().cpu().clone()
    out.update(extras or {})
    return out


def _family(config: ModelConfig) -> Family:
    return {"esm": esm, "esmc": esmc, "amplify": amplify}[config.family]


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
    """Write a folder that the family's own classes load, such as transformers' EsmForMaskedLM and EsmTokenizer. An imported
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
        raw = _family(config).write_config(config, lm_head="lm_head.bias" in tensors, dtype=dtype)
        text = json.dumps(raw, indent=2) + "\n"
    special = {f"{t}_token": f"<{t}>" for t in ("cls", "eos", "mask", "pad", "unk")}
    tokenizer = {
        "clean_up_tokenization_spaces": False,
        **special,
        "tokenizer_class": f"{config.family.capitalize()}Tokenizer",
    }
    with atomic_folder(path, force=force) as folder:
        (folder / "config.json").write_text(text, "utf-8")
        tokens = (layout.vocabulary if layout else ()) or alphabets.by_name(alphabet).tokens
        if config.family != "esmc":  # transformers' EsmcTokenizer has its vocabulary in its code
            (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
        if config.family == "esm":
            (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")
        if config.family != "amplify":
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n", "utf-8")
        try:
            # transformers refuses a file without this metadata
            save_file(hf, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OutputError(f"cannot write {path}: {error}.", hint="Check the free space.") from error
    return path

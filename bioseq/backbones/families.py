"""Whichever family a checkpoint folder or a bundle is of: one way to its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bioseq.backbones.checkpoints import checkpoint as packed
from bioseq.backbones.checkpoints.reading import parse_json, read_text, read_vocabulary
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.weights import build_encoder
from bioseq.backbones.protocol import Backbone
from bioseq.errors import ArtefactError, CheckpointError
from bioseq.sequences.alphabet import Alphabet, by_name

if TYPE_CHECKING:
    from bioseq.backbones.padded.checkpoint import PaddedCheckpoint
    from bioseq.backbones.padded.config import PaddedConfig


def open_checkpoint(path: str | Path) -> packed.Checkpoint | PaddedCheckpoint:
    """Read a Hugging Face folder. Raises `CheckpointError`."""
    path = Path(path)
    if path.is_dir() and _is_padded(path):
        from bioseq.backbones.padded.checkpoint import load_padded

        return load_padded(path)
    return packed.load_checkpoint(path)


def check_config(path: Path) -> None:
    """Refuse what `open_checkpoint` would refuse by config.json and vocabulary. Raises `CheckpointError`."""
    if _is_padded(path):
        from bioseq.backbones.padded.checkpoint import read_config

        read_config(path, parse_json(read_text(path / "config.json"), path / "config.json"))
    else:
        packed.read_config(path)


def _is_padded(path: Path) -> bool:
    from bioseq.backbones.padded.checkpoint import FAMILIES, claims

    raw = parse_json(read_text(path / "config.json"), path / "config.json")
    if raw.get("model_type") not in (*FAMILIES, *packed.FAMILIES):
        known = ", ".join(sorted({*FAMILIES, *packed.FAMILIES}))
        raise CheckpointError(
            f"config.json has model_type {raw.get('model_type')!r}; bioseq reads {known}.",
            hint="docs/backbones.md lists the families.",
        )
    return claims(raw, read_vocabulary(path, raw)[0])


def build(
    config: ModelConfig | PaddedConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    error: type[ArtefactError] = CheckpointError,
) -> Backbone:
    """An encoder in evaluation mode. Raises `error` naming the tensor at fault."""
    if isinstance(config, ModelConfig):
        return build_encoder(config, tensors, dtype=dtype, device=device, error=error)
    from bioseq.backbones.padded.checkpoint import build_padded

    return build_padded(config, tensors, dtype=dtype, device=device, error=error)


def alphabet_of(name: str, config: Any) -> Alphabet:
    """The alphabet, with the letters that the family reads as X."""
    alphabet = by_name(name)
    more = tuple((letter, "X") for letter in config.read_as_x)
    return replace(alphabet, aliases=alphabet.aliases + more) if more else alphabet

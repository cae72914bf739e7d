"""A manifest's `architecture` -> the shape of a backbone, whichever kind it is. No torch here."""

from __future__ import annotations

from typing import Any

from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.padded.config import PaddedConfig


def shape_of(architecture: dict[str, Any]) -> ModelConfig | PaddedConfig:
    """Raises `CheckpointError` for keys that no kind has."""
    kind = PaddedConfig if "settings" in architecture else ModelConfig
    return kind.from_dict(architecture)

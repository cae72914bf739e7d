"""What a family's reader gives: the places of its tensors, and how a checkpoint was spelt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from bioseq.backbones.packed.config import ModelConfig
from bioseq.errors import CheckpointError
from bioseq.specs.reading import build, plain


class Row(NamedTuple):
    """A tensor of the packed encoder, the checkpoint's names of its parts (without prefix), the shape of each part, and
    whether it is a norm's."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    norm: bool = False


def norms(ours: str, theirs: str, width: int, *, bias: bool = True) -> Iterator[Row]:
    """The rows of a norm."""
    for part in ("weight", "bias") if bias else ("weight",):
        yield Row(f"{ours}.{part}", (f"{theirs}.{part}",), (width,), norm=True)


@dataclass(frozen=True)
class Layout:
    """How a checkpoint was spelt. `old_norms` are the Hugging Face names of the layer norms written as
    gamma/beta; `decoder` says that the tied decoder was stored too; `config` is config.json's text; `vocabulary`
    the tokens, where they are not in the alphabet's order."""

    config: str
    prefix: str = "esm."
    decoder: bool = False
    old_norms: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layout:
        return build(cls, data, error=CheckpointError, where="the kept Hugging Face layout")


class Family(Protocol):
    """A module that reads one family of checkpoints."""

    NAME: str
    MODEL_TYPE: str  # in config.json
    PREFIX: str  # of the encoder's tensors in a checkpoint with an LM head

    def find_alphabet(self, tokens: list[str] | None, where: str, raw: dict[str, Any]) -> str: ...
    def read_config(self, raw: dict[str, Any], alphabet: str) -> ModelConfig: ...
    def write_config(
        self, config: ModelConfig, *, lm_head: bool = True, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]: ...
    def rows(self, config: ModelConfig, *, lm_head: bool) -> Iterator[Row]: ...
    def is_extra(self, name: str, config: ModelConfig) -> bool: ...

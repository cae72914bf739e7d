"""From hidden states to embeddings, always float32. All poolings but `cls` leave special tokens out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bioseq.backbones.protocol import Shape
from bioseq.errors import SpecError

Pooling = Literal["mean", "max", "cls"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """What to keep of the hidden states: a pooling of some layers, or every residue of them.

    Layer 0 is the embedding, -1 the last layer after the final layer norm.
    """

    pooling: Pooling = "mean"
    layers: tuple[int, ...] = (-1,)
    per_residue: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise SpecError(f"{self.pooling!r} is not one of {', '.join(POOLINGS)}.", field="pooling")
        if not self.layers:
            raise SpecError("at least one layer is needed.", field="layers")

    def check(self, shape: Shape) -> None:
        """Raise `SpecError` for a layer or a pooling that a backbone of this shape does not have."""
        for layer in self.layers:
            if not -shape.n_layers - 1 <= layer <= shape.n_layers:
                raise SpecError(
                    f"layer {layer} is not there; this model has 0 to {shape.n_layers}.", field="layers"
                )
        if self.pooling == "cls" and not self.per_residue and not shape.has_cls:
            raise SpecError(
                f"{shape.name} has no token before the sequence, so nothing to pool by 'cls'.",
                field="pooling",
                hint="Use mean or max.",
            )


def pool(hidden_LD: Tensor, pooling: str) -> Tensor:
    """float32 [D] of one sequence's hidden states, <cls> first and <eos> last."""
    if pooling == "cls":
        return hidden_LD[0].float()
    residues_LD = hidden_LD[1:-1].float()
    return residues_LD.mean(0) if pooling == "mean" else residues_LD.amax(0)


def reduce(hidden: dict[int, Tensor], options: EmbedOptions) -> Tensor:
    """float32: [D], or [layers, D] for several layers; per residue [L, D] or [layers, L, D]."""
    if options.per_residue:
        parts = [hidden[layer][1:-1].float() for layer in options.layers]
    else:
        parts = [pool(hidden[layer], options.pooling) for layer in options.layers]
    return parts[0] if len(parts) == 1 else torch.stack(parts)

"""What a backbone is: the one contract that inference, heads and training rely on.

A backbone is a module. It takes a row of tokens of a residue alphabet, sequence after sequence, each between <cls> and
<eos>, and gives hidden states of every place of that row. How it makes its own tokens of residues (letters in another
order, k-mers), which special tokens it knows, and whether it pads, is its own business: outside a residue is a token.
So windows, pooling, heads, screening and the service are the same for every family.

- A result does not depend on the other sequences of the row: relative error <= 1e-5 in float32, <= 2e-2 in bfloat16.
- A family without a <cls> of its own (`config.has_cls` false) gives zeros there; pooling by `cls` is refused.
- A residue that several tokens cover has the mean of their states; residues under one token share its state.
- Its tensors and `config` have a hash (`weights_hash`), by which heads, stores and caches know it.

Legend: T tokens of the row, N sequences, D width, V letters of the alphabet, E columns of evidence, K chosen rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn


class Shape(Protocol):
    """What is known of a backbone without its weights; the manifest holds it as `architecture`."""

    @property
    def name(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_residues(self) -> int: ...
    @property
    def reads_homologs(self) -> bool: ...
    @property
    def has_cls(self) -> bool: ...
    @property
    def read_as_x(self) -> str: ...
    @property
    def n_parameters(self) -> int: ...
    def flops_per_token(self, length: float, *, lm_head: bool = False) -> float: ...
    def to_dict(self) -> dict[str, Any]: ...


class Backbone(nn.Module):
    """`config`, its shape; `lm_head`, None for one that can embed only."""

    config: Any  # a Shape; each kind has more
    lm_head: nn.Module | None

    def forward(
        self,
        tokens_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        layers: tuple[int, ...] = (-1,),
        evidence_TE: Tensor | None = None,
        rows_K: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Hidden states [T, D] of one layer, or a tuple of them in the order of `layers`: 0 is the embedding, -1 (or
        n_layers) the last. `tokens_T` int64 [T], `cu_seqlens` int32 [N+1]. IndexError for a layer that is not there."""
        raise NotImplementedError

    def logits(self, hidden_TD: Tensor, evidence_TE: Tensor | None = None) -> Tensor:
        """Logits [T, V] of last-layer hidden states. RuntimeError for a backbone without a language-model head."""
        raise NotImplementedError

    def check(self, ids: np.ndarray) -> None:
        """Raise a `SequenceError` for residues (ids [L]) that this backbone cannot take in one pass."""


def places(layers: Sequence[int], depth: int) -> list[int]:
    """Layers counted from 0. Raises IndexError."""
    wanted = []
    for layer in layers:
        place = layer + depth + 1 if layer < 0 else layer
        if not 0 <= place <= depth:
            raise IndexError(f"layer {layer} is not there; this model has 0 to {depth}")
        wanted.append(place)
    return wanted

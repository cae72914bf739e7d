"""The units that travel through the predictor: what is asked of a sequence, and what came of it.

Legend: P places asked for, L residues of a sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bioseq.backbones.pooling import EmbedOptions
from bioseq.heads.relatives import Relatives
from bioseq.inference.batching import SPECIAL_TOKENS, Window, taper


@dataclass(slots=True)
class Query:
    """What is asked of one sequence, prepared. `ids` uint8 [L] residues (mask tokens allowed), no special tokens.

    `logits_at`: None, "all", or int64 places of residues. `cover` are the windows that will be computed,
    `overlap` their overlap. `routes` are the passes it takes: the bare trunk (None) and one for each head
    with weights of its own. `nearest`: training examples to name beside each prediction. `members`: give what
    each member of a head's ensemble says. `known`: the embedding as `embed` asks for it, where it was computed before
    with this predictor's settings; a query that asks for no more of the bare trunk is not computed again. `evidence` float32 [L, E]:
    what the homologs say, for a backbone that reads them, and `homologs` their number; filled in by the predictor
    unless `reads` is false. `told`: what homologs say of the sequence to heads, by head, where it was found before.
    `part_of`: a query whose homologs these residues have, from its residue `start` on.
    """

    ids: np.ndarray
    sequence: str
    embed: EmbedOptions | None = None
    logits_at: str | np.ndarray | None = None
    heads: tuple[str, ...] = ()
    nearest: int = 0
    members: bool = False
    known: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    cover: list[Window] = field(default_factory=list)
    overlap: int = 0
    routes: tuple[str | None, ...] = (None,)
    evidence: np.ndarray | None = None
    homologs: int | None = None
    reads: bool = True
    told: Mapping[str, Relatives] = field(default_factory=dict)
    part_of: Query | None = None
    start: int = 0

    @property
    def tokens(self) -> int:
        """Packed tokens that this query costs, over windows and routes."""
        return len(self.routes) * sum(w.end - w.start + SPECIAL_TOKENS for w in self.cover)


@dataclass(slots=True)
class Result:
    """What came of a `Query`: float32 `embedding`, float32 `logits` [P, V], `predictions` by head, what was
    done to the sequence on the way (`notes`), and how many homologs the backbone read (None: it reads none)."""

    embedding: np.ndarray | None = None
    logits: np.ndarray | None = None
    predictions: dict[str, dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    homologs: int | None = None

    @property
    def told(self) -> tuple[str, ...]:
        """`notes`, and what was read, in words."""
        return self.notes if self.homologs is None else (*self.notes, f"{self.homologs} homologs read")


@dataclass(frozen=True, slots=True)
class Segment:
    query: int
    route: str | None
    window: int


@dataclass(slots=True)
class Part:
    """What one segment gave: reduced at once, or kept whole (float32) until its sibling windows are there."""

    segment: Segment
    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    embedding: np.ndarray | None = None
    features: dict[str, np.ndarray] = field(default_factory=dict)


def logit_rows(query: Query, route: str | None, window: Window) -> np.ndarray:
    """Residues of this window whose logits are computed; all of them where windows are merged later."""
    if route is not None or query.logits_at is None:
        return np.empty(0, dtype=np.int64)
    if isinstance(query.logits_at, str) or len(query.cover) > 1:
        return np.arange(window.end - window.start, dtype=np.int64)
    return np.asarray(query.logits_at, dtype=np.int64)


def merge(parts: list[Part], query: Query) -> tuple[dict[int, Tensor], Tensor | None]:
    """Average windows with a linear taper; <cls> is the first window's, <eos> the last one's."""
    weights = [torch.from_numpy(w) for w in taper(query.cover, query.overlap)]
    hidden: dict[int, Tensor] = {}
    for layer, first in parts[0].hidden.items():
        merged = first.new_zeros((len(query.ids) + SPECIAL_TOKENS, first.shape[1]))
        merged[0], merged[-1] = first[0], parts[-1].hidden[layer][-1]
        for part, window, weight in zip(parts, query.cover, weights):
            inner = part.hidden[layer][1:-1]
            merged[window.start + 1 : window.end + 1] += inner * weight.to(inner.device)[:, None]
        hidden[layer] = merged
    if parts[0].logits is None:
        return hidden, None
    logits = parts[0].logits.new_zeros((len(query.ids), parts[0].logits.shape[1]))
    for part, window, weight in zip(parts, query.cover, weights):
        assert part.logits is not None
        logits[window.start : window.end] += part.logits * weight.to(logits.device)[:, None]
    if not isinstance(query.logits_at, str):
        logits = logits[torch.as_tensor(np.asarray(query.logits_at, dtype=np.int64), device=logits.device)]
    return hidden, logits

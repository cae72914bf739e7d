"""Token-budget planning and packed batches. Pure integers: no torch here.

A packed batch is one row of tokens, sequence after sequence, with `cu_seqlens` (N+1 offsets) telling where
each begins. There is no padding. A plan is a pure function of the lengths and the budget, never of worker
count or timing, so that a run killed and resumed computes the same batches.

Legend: T tokens of a batch, N sequences of a batch, L residues of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bioseq.errors import SequenceTooLongError

SPECIAL_TOKENS = 2  # <cls> and <eos> around every sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens_T int64 [T]; cu_seqlens int32 [N+1]; index int64 [N], places in the caller's list."""

    tokens: np.ndarray
    cu_seqlens: np.ndarray
    index: np.ndarray

    @property
    def n_tokens(self) -> int:
        return int(self.cu_seqlens[-1])

    @property
    def max_seqlen(self) -> int:
        return int(np.diff(self.cu_seqlens).max())

    def __len__(self) -> int:
        return len(self.index)


def plan(
    lengths: Sequence[int] | np.ndarray, budget: int, *, max_items: int | None = None, sort: bool = True
) -> list[np.ndarray]:
    """Group items so that no group holds more than `budget` tokens; int64 places, every item exactly once.

    `lengths` are tokens an item (special tokens included). With `sort`, longest first and ties by place, so
    that a batch's lengths are alike and the largest batch runs first. Raises `SequenceTooLongError` for an
    item over the budget, ValueError for a length below 1.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return []
    if lengths.min() < 1:
        raise ValueError(
            f"item {int(lengths.argmin())} has {int(lengths.min())} tokens; at least 1 is needed"
        )
    longest = int(lengths.argmax())
    if lengths[longest] > budget:
        raise SequenceTooLongError(
            f"{int(lengths[longest])} tokens do not fit a batch of {budget}.",
            index=longest,
            hint="Raise the token budget, or let long sequences be windowed or truncated.",
        )
    order = np.lexsort((np.arange(len(lengths)), -lengths)) if sort else np.arange(len(lengths))
    groups: list[np.ndarray] = []
    start, total = 0, 0
    limit = max_items or len(lengths)
    sizes = lengths[order].tolist()
    for at, size in enumerate(sizes):
        if total + size > budget or at - start >= limit:
            groups.append(order[start:at])
            start, total = at, 0
        total += size
    groups.append(order[start:])
    return groups


def pack(ids: Sequence[np.ndarray], index: np.ndarray, *, cls_id: int, eos_id: int) -> Batch:
    """Lay the residues of `ids[i] for i in index` in one row, each between <cls> and <eos>."""
    lengths = np.fromiter((len(ids[i]) for i in index), dtype=np.int64, count=len(index)) + SPECIAL_TOKENS
    cu = np.zeros(len(index) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu[1:])
    tokens = np.empty(int(cu[-1]), dtype=np.int64)
    tokens[cu[:-1]] = cls_id
    tokens[cu[1:] - 1] = eos_id
    for i, start, end in zip(index.tolist(), cu[:-1].tolist(), cu[1:].tolist()):
        tokens[start + 1 : end - 1] = ids[i]
    return Batch(tokens, cu, np.asarray(index, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Window:
    """Residues [start, end) of a longer sequence."""

    start: int
    end: int


def windows(length: int, size: int, overlap: int) -> list[Window]:
    """Cover `length` residues with windows of `size` that overlap by at least `overlap`; the last one ends at
    the end and is as long as the others. A sequence that fits is one window."""
    if not 0 <= overlap < size:
        raise ValueError(f"overlap {overlap} must lie in [0, {size})")
    if length <= size:
        return [Window(0, length)]
    starts = list(range(0, length - size, size - overlap))
    return [Window(s, s + size) for s in starts] + [Window(length - size, length)]


def taper(cover: list[Window], overlap: int) -> list[np.ndarray]:
    """Weights of each window's residues, float32 [L_w], summing to 1 over the windows at every residue.

    Linear over the overlap: a residue near a window's inner edge, where the context is short, counts little.
    """
    length = cover[-1].end
    total = np.zeros(length, dtype=np.float64)
    raw = []
    for w in cover:
        weight = np.ones(w.end - w.start, dtype=np.float64)
        ramp = np.arange(1, overlap + 1) / (overlap + 1)
        if w.start > 0 and overlap:
            weight[:overlap] = ramp
        if w.end < length and overlap:
            weight[-overlap:] = np.minimum(weight[-overlap:], ramp[::-1])
        raw.append(weight)
        total[w.start : w.end] += weight
    return [(weight / total[w.start : w.end]).astype(np.float32) for weight, w in zip(raw, cover)]

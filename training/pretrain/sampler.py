"""Which proteins make up the global batch of a step: a pure function of (seed, step), never stored.

Concept: every worker computes the same global batch from the seed and the step number, then takes its own
share of it. So the order does not depend on the number of workers, a run resumes on another number, and a
step that is computed twice after a failure is the same step.

Two orders:

- **uniform**: an epoch is a seeded permutation of all records. Laid end to end in that order, the tokens are
  cut into windows of equal width, at least `tokens_per_step`; a record belongs to the window in which it
  begins. As no record is longer than a window, no window is empty and every epoch has the same number of
  steps, so that any step is found without walking there. Each record is seen once an epoch.
- **cluster**: each step draws clusters uniformly with replacement and one member of each, until the tokens
  are reached (as ESM-2 drew UniRef50 clusters and their UniRef90 members; Lin et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from bioseq.errors import InputError, SpecError
from bioseq.inference.batching import SPECIAL_TOKENS, plan
from training.corpus.draws import CROP, DRAW, ORDER, stream


@dataclass(frozen=True, slots=True)
class Items:
    """A global batch. `records` int64 [N]: corpus indices; `starts` int64 [N]: first residue of the crop;
    `lengths` int64 [N]: residues of the crop. A record's place in the batch names its masking stream."""

    records: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens an item, <cls> and <eos> included; int64 [N]."""
        return self.lengths + SPECIAL_TOKENS


class Lengths(Protocol):
    """What the sampler needs of a corpus. `cluster_order` lists the records cluster by cluster,
    `cluster_starts` [C+1] tells where each cluster begins in it; both None without clusters."""

    lengths: np.ndarray
    cluster_order: np.ndarray | None
    cluster_starts: np.ndarray | None


class Sampler:
    """`batch(step)` for any step >= 0. `crop` is the longest stretch of residues taken of a record; the
    stretch is drawn anew at every visit."""

    def __init__(
        self,
        corpus: Lengths,
        *,
        seed: int,
        tokens_per_step: int,
        crop: int,
        order: Literal["uniform", "cluster"] = "uniform",
    ):
        if len(corpus.lengths) == 0:
            raise InputError("the corpus is empty.", hint="Prepare one with at least one sequence.")
        if crop < 1:
            raise SpecError(f"at least 1 residue is needed, not {crop}.", field="crop")
        self.corpus, self.seed, self.crop, self.order = corpus, seed, crop, order
        self.tokens_per_step = tokens_per_step
        longest = min(int(corpus.lengths.max()), crop) + SPECIAL_TOKENS
        if longest > tokens_per_step:
            raise SpecError(
                f"{tokens_per_step} tokens do not hold the longest sequence ({longest} tokens).",
                field="tokens_per_step",
                hint="Raise it, or set a smaller crop.",
            )
        if order == "cluster" and corpus.cluster_order is None:
            raise SpecError(
                "cluster-balanced sampling needs a corpus with clusters.",
                field="sampling",
                hint="Prepare the corpus with --clusters, or set sampling=uniform.",
            )
        self._total = int(np.minimum(corpus.lengths, crop).sum()) + SPECIAL_TOKENS * len(corpus.lengths)
        self.steps_per_epoch = max(1, self._total // tokens_per_step)  # a nominal one with clusters
        self._epoch = lru_cache(maxsize=2)(self._cut)

    def batch(self, step: int) -> Items:
        """The global batch of a step."""
        if self.order == "cluster":
            records = self._drawn(step)
        else:
            epoch, window = divmod(step, self.steps_per_epoch)
            order, bounds = self._epoch(epoch)
            records = order[bounds[window] : bounds[window + 1]]
        full = np.asarray(self.corpus.lengths[records], dtype=np.int64)
        lengths = np.minimum(full, self.crop)
        draw = stream(self.seed, CROP, step).random(len(records))
        starts = np.minimum((draw * (full - lengths + 1)).astype(np.int64), full - lengths)
        return Items(records, starts, lengths)

    def _cut(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = stream(self.seed, ORDER, epoch).permutation(len(self.corpus.lengths))
        tokens = np.minimum(self.corpus.lengths[order], self.crop).astype(np.int64) + SPECIAL_TOKENS
        begins = np.cumsum(tokens) - tokens
        # Window k is [k * total / n, (k + 1) * total / n), in integers.
        edges = -(-np.arange(self.steps_per_epoch + 1, dtype=np.int64) * self._total // self.steps_per_epoch)
        return order, np.searchsorted(begins, edges, side="left")

    def _drawn(self, step: int) -> np.ndarray:
        order, starts = self.corpus.cluster_order, self.corpus.cluster_starts
        assert order is not None and starts is not None
        generator = stream(self.seed, DRAW, step)
        clusters = len(starts) - 1
        kept: list[np.ndarray] = []
        used, full = 0, False
        while not full:
            draw = generator.random((256, 2))
            which = np.minimum((draw[:, 0] * clusters).astype(np.int64), clusters - 1)
            first, size = starts[which], starts[which + 1] - starts[which]
            records = np.asarray(order[first + np.minimum((draw[:, 1] * size).astype(np.int64), size - 1)])
            tokens = np.minimum(self.corpus.lengths[records], self.crop).astype(np.int64) + SPECIAL_TOKENS
            after = used + np.cumsum(tokens)
            fits = int(np.searchsorted(after, self.tokens_per_step, side="right"))
            full = fits < len(records)
            kept.append(records[:fits])
            used = int(after[fits - 1]) if fits else used
        return np.concatenate(kept)


def share(tokens: np.ndarray, rank: int, world: int, budget: int) -> list[np.ndarray]:
    """The micro-batches of one of `world` workers: places in the global batch, none over `budget` tokens.

    Longest first, each to the worker with the fewest tokens so far, ties to the lowest rank. All workers get
    the same number of micro-batches, as collective operations need; a worker with fewer has empty ones at
    the end. Together the workers hold every place exactly once. Raises `SequenceTooLongError`.
    """
    load = np.zeros(world, dtype=np.int64)
    mine: list[list[int]] = [[] for _ in range(world)]
    for place in np.lexsort((np.arange(len(tokens)), -tokens)).tolist():
        at = int(load.argmin())
        mine[at].append(place)
        load[at] += tokens[place]
    groups = []
    for places in mine:
        own = np.array(sorted(places), dtype=np.int64)
        groups.append([own[g] for g in plan(tokens[own], budget)])
    count = max(map(len, groups))
    empty = np.zeros(0, dtype=np.int64)
    return groups[rank] + [empty] * (count - len(groups[rank]))

"""From a step number to the micro-batches of one worker: sample, share out, mask, pack.

Everything here is a pure function of (spec, corpus, step, rank, world); masks depend on the place in the
global batch, so not on the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bioseq.backbones.packed.config import EVIDENCE_WIDTH
from bioseq.errors import SpecError
from bioseq.inference.batching import SPECIAL_TOKENS, pack
from bioseq.sequences.alphabet import Alphabet, by_name
from bioseq.sequences.masking import corrupt, mask
from bioseq.specs.pretrain import PretrainSpec
from training.corpus.corpus import Corpus
from training.corpus.draws import MASK, STRAND, VIEW, stream
from training.corpus.homologs import ALL, THINNED
from training.pretrain.sampler import Sampler, share


@dataclass
class Micro:
    """A packed micro-batch. `tokens` int64 [T] with masks in place; `cu_seqlens` int32 [N+1]; `places` int64
    [K], where predictions are wanted; `targets` int64 [K], the true ids. K is 0 in the empty micro-batch of a
    worker that has fewer of them than the others."""

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    places: Tensor
    targets: Tensor
    evidence: Tensor | None = None

    def to(self, device: torch.device) -> Micro:
        if device.type == "cpu":
            return self
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Micro:
        """In memory that a GPU reads without waiting for the processor."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Micro:
        tokens, cu_seqlens, places, targets = map(
            change, (self.tokens, self.cu_seqlens, self.places, self.targets)
        )
        evidence = None if self.evidence is None else change(self.evidence)
        return Micro(tokens, cu_seqlens, self.max_seqlen, places, targets, evidence)


@dataclass
class Step:
    """One worker's part of a step. `records` are the corpus indices of the whole global batch."""

    step: int
    micros: list[Micro]
    records: np.ndarray
    tokens: int
    mean_length: float

    def pin_memory(self) -> Step:
        return replace(self, micros=[m.pin_memory() for m in self.micros])


class Batches:
    def __init__(self, spec: PretrainSpec, corpus: Corpus):
        self.spec, self.corpus = spec, corpus
        self.alphabet: Alphabet = by_name(spec.alphabet)
        self.sampler = Sampler(
            corpus,
            seed=spec.seed,
            tokens_per_step=spec.tokens_per_step,
            crop=spec.crop,
            order=spec.sampling,
        )
        longest = min(int(corpus.lengths.max()), spec.crop) + SPECIAL_TOKENS
        if longest > spec.micro_tokens:
            raise SpecError(
                f"{spec.micro_tokens} tokens do not hold the longest sequence ({longest} tokens).",
                field="micro_tokens",
                hint="Raise it, or set a smaller crop.",
            )

    def step(self, step: int, rank: int = 0, world: int = 1) -> Step:
        """The micro-batches of a worker at a step."""
        items = self.sampler.batch(step)
        sizes = items.tokens
        micros = [
            self._pack(step, items, group) for group in share(sizes, rank, world, self.spec.micro_tokens)
        ]
        return Step(step, micros, items.records, int(sizes.sum()), float((sizes**2).sum() / sizes.sum()))

    def _pack(self, step: int, items: Any, group: np.ndarray) -> Micro:
        a = self.alphabet
        none = np.zeros(0, dtype=np.int64)
        masked, places, targets, evidence = [], [none], [none], []
        begin = 1
        for place in group.tolist():
            record, start, length = (int(x[place]) for x in (items.records, items.starts, items.lengths))
            ids = self.corpus.residues(record, start, length)
            if self.spec.reverse_complement and stream(self.spec.seed, STRAND, step, place).random() < 0.5:
                ids = a.reverse_complement(ids)
            generator = stream(self.spec.seed, MASK, step, place)
            how, letters = self.spec.masking, a.standard_ids
            seen = self._homologs(step, place, record, start, length)
            if seen is None:
                out, chosen = mask(ids, generator, mask_id=a.mask_id, letters=letters, how=how)
            else:  # only what was hidden from the search may be asked for
                chosen, rows = seen
                fate = generator.random(len(chosen))
                out = corrupt(ids, chosen, fate, mask_id=a.mask_id, letters=letters, how=how)
                evidence.append((begin, rows))
            masked.append(out)
            places.append(chosen + begin)
            targets.append(ids[chosen].astype(np.int64))
            begin += length + SPECIAL_TOKENS
        # a worker that has nothing to do gets an empty sequence
        batch = pack(masked or [none], np.arange(max(len(masked), 1)), cls_id=a.cls_id, eos_id=a.eos_id)
        return Micro(
            torch.from_numpy(batch.tokens),
            torch.from_numpy(batch.cu_seqlens),
            batch.max_seqlen,
            torch.from_numpy(np.concatenate(places)),
            torch.from_numpy(np.concatenate(targets)),
            self._evidence(len(batch.tokens), evidence),
        )

    def _homologs(
        self, step: int, place: int, record: int, start: int, length: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """(hidden residues, evidence) of an item that is shown with homologs; None for one without."""
        if not self.spec.model.reads_homologs:
            return None
        evidence, shares = self.corpus.evidence, self.spec.homologs
        assert evidence is not None
        turn, which = stream(self.spec.seed, VIEW, step, place).random(2)
        if turn < shares.none:
            return None
        view = THINNED if turn < shares.none + shares.thinned else ALL
        return evidence.of(record, int(which * evidence.maskings), view, start, length)

    def _evidence(self, tokens: int, parts: list[tuple[int, np.ndarray]]) -> Tensor | None:
        if not self.spec.model.reads_homologs:
            return None
        rows = np.zeros((tokens, EVIDENCE_WIDTH), dtype=np.float32)
        for begin, part in parts:
            rows[begin : begin + len(part)] = part
        return torch.from_numpy(rows)


class _Steps(torch.utils.data.Dataset[Step]):
    def __init__(self, make: Callable[[int], Step]):
        self.make = make

    def __getitem__(self, step: int) -> Step:
        return self.make(step)


def prefetch(make: Callable[[int], Step], first: int, end: int, *, workers: int) -> Iterator[Step]:
    """`make(step)` for steps first to end - 1, prepared ahead by `workers` processes (0: none). An error of
    `make` is raised where its step would have come."""
    if workers == 0:
        return map(make, range(first, end))
    return iter(
        torch.utils.data.DataLoader(
            _Steps(make),
            batch_size=None,
            sampler=range(first, end),
            num_workers=workers,
            prefetch_factor=2,
            pin_memory=torch.cuda.is_available(),
        )
    )

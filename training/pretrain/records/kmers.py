"""The baseline of nucleotide models: Markov models of order 0 to K, smoothed from order to order.

p_k(x | c_1 .. c_k) = (n(c_1 .. c_k x) + a_k p_{k-1}(x | c_1 .. c_{k-1})) / (n(c_1 .. c_k) + a_k), where p_{-1} is uniform
(MacKay & Peto 1995, doi 10.1017/S1351324900000218). The strength a_k of each order is the best of a grid of powers
of two on a share of the training records whose counts are left out. With counts of this kind a higher order is hardly
ever worse, where plain frequencies break down.

Contexts are true neighbours at given `offsets`, nearest first: (-1, -2, ...) is the causal model, (-1, 1, -2, 2, ...)
sees both sides. With `phases` = 3 the counts are apart by place in the codon, for coding sequences that begin with
their first codon. A masked model is given neither true neighbours (one nucleotide in seven is hidden) nor the frame.
Letters that are not standard, and what lies outside of the sequence, are a fifth letter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bioseq.sequences.alphabet import Alphabet
from training.corpus.corpus import Corpus
from training.corpus.draws import ORDER, stream

ORDERS = 8
CAUSAL = tuple(-i for i in range(1, ORDERS + 1))
_SYMBOLS = 5
_OTHER = 4
_HELD_OUT, _HELD_MOST = 0.01, 500
_STRENGTHS = 2.0 ** np.arange(0, 17)
_PART = 1 << 22  # nucleotides counted at once


class Kmers:
    """Fit on ids of records; `held` records choose the strengths and are not counted. `offsets` [K]."""

    def __init__(
        self,
        alphabet: Alphabet,
        train: Iterable[np.ndarray],
        held: Sequence[np.ndarray],
        *,
        offsets: Sequence[int] = CAUSAL,
        phases: int = 1,
    ):
        self.offsets, self.phases = tuple(offsets), phases
        self._symbol = np.full(256, _OTHER, dtype=np.uint8)
        self._symbol[alphabet.standard_ids] = np.arange(len(alphabet.standard))
        top = np.zeros(phases * _SYMBOLS ** (len(self.offsets) + 1), dtype=np.int64)
        for part in _parts(train):
            context, phase, letter = self._coded(part)
            key = (phase * _SYMBOLS ** len(self.offsets) + context) * _SYMBOLS + letter
            top += np.bincount(key, minlength=len(top))
        counts = top.astype(np.int32).reshape(phases, -1, _SYMBOLS)
        self._counts = [counts]  # by order
        for k in reversed(range(len(self.offsets))):
            # the farthest neighbour has the largest stride
            counts = counts.reshape(phases, _SYMBOLS, _SYMBOLS**k, _SYMBOLS).sum(1, dtype=np.int32)
            self._counts.insert(0, counts)
        self.strengths: list[float] = []
        for _ in self._counts:
            losses = [self._losses(held, [*self.strengths, a])[-1] for a in _STRENGTHS]
            self.strengths.append(float(_STRENGTHS[int(np.argmin(losses))]))

    def _coded(self, members: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(context code, phase, letter) of all nucleotides of all members, int64 each."""
        reach = max((abs(o) for o in self.offsets), default=0)
        wall = np.full(reach, _OTHER, dtype=np.uint8)
        pieces: list[np.ndarray] = [wall]
        for ids in members:
            pieces += [self._symbol[ids], wall]
        flat = np.concatenate(pieces)
        lengths = np.array([len(ids) for ids in members], dtype=np.int64)
        begins = reach + np.cumsum(lengths + reach) - lengths - reach
        at = np.concatenate([np.arange(b, b + n) for b, n in zip(begins.tolist(), lengths.tolist())])
        context = np.zeros(len(at), dtype=np.int64)
        for j, offset in enumerate(self.offsets):
            context += flat[at + offset].astype(np.int64) * _SYMBOLS**j
        phase = (at - np.repeat(begins, lengths)) % self.phases
        return context, phase, flat[at].astype(np.int64)

    def _losses(self, members: Sequence[np.ndarray], strengths: Sequence[float]) -> list[float]:
        """Nats a nucleotide of order 0 .. len(strengths) - 1."""
        totals, count = np.zeros(len(strengths)), 0
        for part in _parts(members):
            context, phase, letter = self._coded(part)
            p = np.full((len(letter), _SYMBOLS), 1.0 / _SYMBOLS)
            for k, strength in enumerate(strengths):
                n = self._counts[k][phase, context % _SYMBOLS**k]
                p = (n + strength * p) / (n.sum(1, keepdims=True) + strength)
                totals[k] -= np.log(p[np.arange(len(letter)), letter]).sum()
            count += len(letter)
        return (totals / count).tolist()

    def perplexities(self, members: Sequence[np.ndarray]) -> list[float]:
        """Of order 0 .. K over all nucleotides of the members."""
        return [math.exp(loss) for loss in self._losses(members, self.strengths)]


def _parts(members: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    part: list[np.ndarray] = []
    size = 0
    for ids in members:
        part.append(ids)
        size += len(ids)
        if size >= _PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def dealt(corpus: Corpus, *, seed: int = 0) -> tuple[Callable[[], Iterator[np.ndarray]], list[np.ndarray]]:
    """(the records to count, anew at each call; the records that choose the strengths)."""
    order = stream(seed, ORDER, 0, 1).permutation(len(corpus))
    size = min(max(1, int(len(order) * _HELD_OUT)), _HELD_MOST)
    rest = np.sort(order[size:] if len(order) > size else order)
    return lambda: (corpus.residues(int(r)) for r in rest), [corpus.residues(int(r)) for r in order[:size]]


def kmer_baselines(corpus: Corpus, alphabet: Alphabet, *, seed: int = 0) -> dict[str, Any]:
    """{"unigram": {set: perplexity}, "kmers": {"1" .. "8": {set: perplexity}}, "kmer_strengths": [of each order]}."""
    sets = {name: members for name, members in corpus.sets().items() if members}
    if not sets:
        return {}
    train, held = dealt(corpus, seed=seed)
    model = Kmers(alphabet, train(), held)
    found = {name: model.perplexities(members) for name, members in sets.items()}
    return {
        "unigram": {name: p[0] for name, p in found.items()},
        "kmers": {str(k): {name: p[k] for name, p in found.items()} for k in range(1, ORDERS + 1)},
        "kmer_strengths": model.strengths,
    }

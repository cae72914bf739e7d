"""Baselines that a trained model must beat: unigram, and an interpolated residue 3-gram.

The 3-gram model is causal: p(x_i | x_{i-2}, x_{i-1}) = w3 p3 + w2 p2 + w1 p1 + w0 / V, counts from the
training residues, weights fitted by EM (Jelinek & Mercer 1980) on a share of the training records whose
counts are left out. It is scored on the same residues as a masked model's whole protocol, where every residue
of the set is chosen once: each residue given its two true left neighbours (the begin of the protein counts as
one). So it sees two neighbours that are never masked, and nothing else; a masked model sees both sides, with
one residue in seven hidden.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from training.corpus.corpus import Corpus
from training.corpus.draws import ORDER, stream

_HELD_OUT = 0.01
_BEGIN = 0  # <cls> stands before the first residue


def unigram(corpus: Corpus, members: list[np.ndarray]) -> float:
    """Perplexity of the training residues' frequencies over a set."""
    share = corpus.frequencies() + 1e-9
    tokens = np.concatenate(members)
    padded = np.full(256, 1e-9)
    padded[: len(share)] = share / share.sum()
    return math.exp(-np.log(padded[tokens]).mean())


def _contexts(members: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x_{i-2}, x_{i-1}, x_i) of all residues of all members."""
    rows = [np.concatenate((np.array([_BEGIN, _BEGIN], dtype=np.uint8), ids)) for ids in members]
    return (
        np.concatenate([r[:-2] for r in rows]),
        np.concatenate([r[1:-1] for r in rows]),
        np.concatenate([r[2:] for r in rows]),
    )


class Trigram:
    """Fit on a corpus; `vocabulary` is the alphabet's size."""

    def __init__(self, corpus: Corpus, *, vocabulary: int, seed: int = 0, max_records: int = 0):
        size = vocabulary
        order = stream(seed, ORDER, 0, 1).permutation(len(corpus))
        if max_records:
            order = order[:max_records]
        held = order[: max(1, int(len(order) * _HELD_OUT))]
        self.size = size
        counts = np.zeros(size**3, dtype=np.int64)
        rest = np.sort(order[len(held) :] if len(order) > len(held) else order)
        for part in np.array_split(rest, max(1, len(rest) // 20000)):
            a, b, c = _contexts([corpus.residues(int(r)) for r in part])
            counts += np.bincount((a.astype(np.int64) * size + b) * size + c, minlength=size**3)
        cube = counts.reshape(size, size, size).astype(np.float64)
        self.p3 = _rows(cube)
        self.p2 = _rows(cube.sum(0))
        self.p1 = _rows(cube.sum((0, 1)))
        self.weights = np.full(4, 0.25)
        parts = self._parts([corpus.residues(int(r)) for r in held])
        for _ in range(50):
            joint = parts * self.weights
            self.weights = (joint / joint.sum(1, keepdims=True)).mean(0)

    def _parts(self, members: list[np.ndarray]) -> np.ndarray:
        a, b, c = _contexts(members)
        return np.stack(
            (self.p3[a, b, c], self.p2[b, c], self.p1[c], np.full(len(c), 1.0 / self.size)), axis=1
        )

    def perplexity(self, members: list[np.ndarray]) -> float:
        return math.exp(-np.log(self._parts(members) @ self.weights).mean())


def _rows(counts: np.ndarray) -> np.ndarray:
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)


def baselines(corpus: Corpus, *, vocabulary: int, seed: int = 0) -> dict[str, Any]:
    """{"unigram": {set: perplexity}, "trigram": {set: perplexity}, "trigram_weights": [w3, w2, w1, w0]}."""
    sets = {name: members for name, members in corpus.sets().items() if members}
    if not sets:
        return {}
    model = Trigram(corpus, vocabulary=vocabulary, seed=seed)
    return {
        "unigram": {name: unigram(corpus, members) for name, members in sets.items()},
        "trigram": {name: model.perplexity(members) for name, members in sets.items()},
        "trigram_weights": model.weights.tolist(),
    }

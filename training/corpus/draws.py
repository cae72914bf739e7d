"""Seeded random numbers, and which residues the perplexity protocol hides.

Random numbers come from Philox with the counter words (0, place, step, purpose): counter-based, so any place of any
step can be drawn alone (Salmon et al. 2011, doi 10.1145/2063384.2063405).
"""

from __future__ import annotations

import hashlib

import numpy as np

# Purposes keep the streams of one seed apart.
ORDER, DRAW, CROP, MASK, EVAL, HIDE, THIN, VIEW, STRAND = range(9)
PASSES = 7


def stream(seed: int, purpose: int, step: int = 0, place: int = 0) -> np.random.Generator:
    """The random numbers of one place of one step; independent of all others of the same seed."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, place, step, purpose]))


def chosen(ids: np.ndarray, seed: int) -> list[np.ndarray]:
    """The places chosen in each pass, PASSES arrays that hold each place of `ids` once (some may be empty)."""
    key = int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
    order = stream(seed, EVAL, 0, key).permutation(len(ids))
    return [np.sort(order[p::PASSES]) for p in range(PASSES)]

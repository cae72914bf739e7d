"""BLOSUM62 (Henikoff & Henikoff 1992, doi 10.1073/pnas.89.22.10915) as scores and as probabilities.

Residues in the order of `LETTERS`. Scores are half-bits; the joint frequencies are the scores' inverse under the
background below, scaled until rows and columns sum to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

# The matrix's own background frequencies, Robinson & Robinson-like, from the BLOCKS database.
_FREQUENCIES = (
    "0.0742 0.0247 0.0536 0.0543 0.0474 0.0741 0.0262 0.0680 0.0581 0.0989 "
    "0.0249 0.0446 0.0386 0.0343 0.0516 0.0573 0.0508 0.0729 0.0132 0.0322"
)
BACKGROUND = np.array([float(x) for x in _FREQUENCIES.split()])
BACKGROUND /= BACKGROUND.sum()
_ROWS = """
 4  0 -2 -1 -2  0 -2 -1 -1 -1 -1 -2 -1 -1 -1  1  0  0 -3 -2
 0  9 -3 -4 -2 -3 -3 -1 -3 -1 -1 -3 -3 -3 -3 -1 -1 -1 -2 -2
-2 -3  6  2 -3 -1 -1 -3 -1 -4 -3  1 -1  0 -2  0 -1 -3 -4 -3
-1 -4  2  5 -3 -2  0 -3  1 -3 -2  0 -1  2  0  0 -1 -2 -3 -2
-2 -2 -3 -3  6 -3 -1  0 -3  0  0 -3 -4 -3 -3 -2 -2 -1  1  3
 0 -3 -1 -2 -3  6 -2 -4 -2 -4 -3  0 -2 -2 -2  0 -2 -3 -2 -3
-2 -3 -1  0 -1 -2  8 -3 -1 -3 -2  1 -2  0  0 -1 -2 -3 -2  2
-1 -1 -3 -3  0 -4 -3  4 -3  2  1 -3 -3 -3 -3 -2 -1  3 -3 -1
-1 -3 -1  1 -3 -2 -1 -3  5 -2 -1  0 -1  1  2  0 -1 -2 -3 -2
-1 -1 -4 -3  0 -4 -3  2 -2  4  2 -3 -3 -2 -2 -2 -1  1 -2 -1
-1 -1 -3 -2  0 -3 -2  1 -1  2  5 -2 -2  0 -1 -1 -1  1 -1 -1
-2 -3  1  0 -3  0  1 -3  0 -3 -2  6 -2  0  0  1  0 -3 -4 -2
-1 -3 -1 -1 -4 -2 -2 -3 -1 -3 -2 -2  7 -1 -2 -1 -1 -2 -4 -3
-1 -3  0  2 -3 -2  0 -3  1 -2  0  0 -1  5  1  0 -1 -2 -2 -1
-1 -3 -2  0 -3 -2  0 -3  2 -2 -1  0 -2  1  5 -1 -1 -3 -3 -2
 1 -1  0  0 -2  0 -1 -2  0 -2 -1  1 -1  0 -1  4  1 -2 -3 -2
 0 -1 -1 -1 -2 -2 -2 -1 -1 -1 -1  0 -1 -1 -1  1  5  0 -2 -2
 0 -1 -3 -2 -1 -3 -3  3 -2  1  1 -3 -2 -2 -3 -2  0  4 -3 -1
-3 -2 -4 -3  1 -2 -2 -3 -3 -2 -1 -4 -4 -2 -3 -3 -2 -3 11  2
-2 -2 -3 -2  3 -3  2 -1 -2 -1 -1 -2 -3 -1 -2 -2 -2 -1  2  7
"""
BLOSUM62 = np.array(_ROWS.split(), dtype=np.int64).reshape(20, 20)


@cache
def _joint() -> np.ndarray:
    joint = np.outer(BACKGROUND, BACKGROUND) * 2.0 ** (BLOSUM62 / 2)
    for _ in range(200):
        joint *= (BACKGROUND / joint.sum(1))[:, None]
        joint = (joint + joint.T) / 2
    return joint


@cache
def spectrum() -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [20] (clipped above 1e-6) and vectors [20, 20] of the symmetric form D^-1/2 J D^-1/2."""
    root = np.sqrt(BACKGROUND)
    values, vectors = np.linalg.eigh(_joint() / np.outer(root, root))
    return np.maximum(values, 1e-6), vectors


def conditional() -> np.ndarray:
    """P(a | x) of BLOSUM62, float64 [20 x, 20 a]; rows sum to 1."""
    return _joint() / BACKGROUND[:, None]


def evolved(times: Sequence[float]) -> np.ndarray:
    """P_t(a | x), float64 [B, 20 x, 20 a]: `conditional` to the power t, entries at least 1e-6. Reversible under
    the background: P_t(x | a) / background(x) is the same as P_t(a | x) / background(a)."""
    return _evolved(tuple(float(t) for t in times))


@cache
def _evolved(times: tuple[float, ...]) -> np.ndarray:
    values, vectors = spectrum()
    root = np.sqrt(BACKGROUND)
    power = values[None] ** np.array(times)[:, None]
    symmetric = np.einsum("ij,bj,kj->bik", vectors, power, vectors)
    return np.maximum(symmetric * (root[None] / root[:, None])[None], 1e-6)

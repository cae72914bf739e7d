"""Made-up proteins for the tests of this room."""

from __future__ import annotations

import numpy as np

LETTERS = list("LAGVSERTIDPKQNFYMHWC")


def proteins(count: int, seed: int, low: int = 20, high: int = 90) -> list[str]:
    """Random sequences, none twice."""
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(LETTERS, size=draw.integers(low, high))) for _ in range(count)]

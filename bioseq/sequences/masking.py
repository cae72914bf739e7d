"""BERT-style masking: 80 % mask, 10 % random letter, 10 % kept, all decided by one uniform draw a token.

Concept: one number u in [0, 1) is drawn for every maskable token. `u < rate` chooses the token, and where u
falls inside [0, rate) decides its fate: the first 80 % of that interval become `<mask>`, the next 10 % a
random letter (which one is again read from u, so that no second draw shifts the stream), the last 10 % stay.
Successive overwrites, a common fault, give 81/9/10 instead.

The generator is explicit. Pretraining hands in one that depends on (seed, step, place in the global batch)
alone, so a token's fate does not depend on the worker that computes it (`training.pretrain.sampler.stream`).

Devlin et al. 2019 (arXiv 1810.04805), Lin et al. 2023 (doi 10.1126/science.ade2574): rate 0.15.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bioseq.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """`rate` of the residues are chosen; `mask` and `random` are shares of the chosen, the rest is kept."""

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.rate < 1.0:
            raise SpecError(f"{self.rate} is not between 0 and 1 (exclusive).", field="masking.rate")
        for name in ("mask", "random"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise SpecError(f"{getattr(self, name)} is not between 0 and 1.", field=f"masking.{name}")
        if self.mask + self.random > 1.0 + 1e-9:
            raise SpecError(
                f"mask and random are shares of the chosen residues; {self.mask} + {self.random} is over 1.",
                field="masking.random",
            )


def mask(
    ids: np.ndarray,
    generator: np.random.Generator,
    *,
    mask_id: int,
    letters: np.ndarray,
    how: Masking = Masking(),
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt the residues `ids` [L] (no special tokens).

    Returns the corrupted ids [L], same dtype, and the chosen places int64 [K], ascending; the targets are
    `ids[places]`. `letters` are the ids that a random replacement is drawn from, uniformly. Exactly L uniform
    draws are taken from `generator`.
    """
    draw = generator.random(len(ids))
    places = np.flatnonzero(draw < how.rate)
    fate = draw[places] / how.rate  # uniform in [0, 1) given that the residue was chosen
    return corrupt(ids, places, fate, mask_id=mask_id, letters=letters, how=how), places


def corrupt(
    ids: np.ndarray, places: np.ndarray, fate: np.ndarray, *, mask_id: int, letters: np.ndarray, how: Masking
) -> np.ndarray:
    """`ids` [L] with the chosen `places` [K] masked, replaced or kept, as their `fate` [K] in [0, 1) says."""
    out = ids.copy()
    out[places[fate < how.mask]] = mask_id
    if how.random > 0:
        swapped = (fate >= how.mask) & (fate < how.mask + how.random)
        share = (fate[swapped] - how.mask) / how.random
        out[places[swapped]] = letters[np.minimum((share * len(letters)).astype(np.int64), len(letters) - 1)]
    return out

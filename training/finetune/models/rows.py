"""The rows that a head is fitted and chosen on, and the rows that it is measured on, as blocks of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bioseq.heads import features as blocks
from bioseq.heads.features import Context
from training.tables.dealing import Folds

Transfer = Callable[[np.ndarray], np.ndarray]
"""From places of rows that may be looked at to the homology block of all rows [N, H]."""


@dataclass
class Rows:
    """What a fit needs: pooled embeddings [N, D], cleaned sequences, y [N, T], weights [N]; `folds` to choose by;
    `refit` says that the chosen model is fitted on all rows, else it is the first fold's. `homology` gives the
    block of the sequences' homologs, `profile` [N, W] is their profile block; `groups`
    [N] tells which rows are resampled together (None: each alone)."""

    embeddings: np.ndarray
    sequences: list[str]
    y: np.ndarray
    weight: np.ndarray
    folds: Folds
    refit: bool = False
    context: Context = field(default_factory=Context)
    homology: Transfer | None = None
    profile: np.ndarray | None = None
    groups: np.ndarray | None = None

    @property
    def trained(self) -> np.ndarray:
        """Places of the rows that the final model is fitted on."""
        return np.arange(len(self.y)) if self.refit else self.folds[0][0]

    @property
    def out_of_fold(self) -> np.ndarray:
        """Places of the rows that a fit which did not see them gives outputs for, in order of the folds."""
        return np.concatenate([v for _, v in self.folds])

    def take(self, places: np.ndarray, folds: Folds) -> Rows:
        """Some of the rows, to be cross-validated and fitted on all of them."""
        homology, whole = None, self.homology
        if whole is not None:
            homology = lambda allowed: whole(places[allowed])[places]  # noqa: E731
        return Rows(
            self.embeddings[places],
            [self.sequences[i] for i in places],
            self.y[places],
            self.weight[places],
            folds,
            True,
            self.context,
            homology,
            None if self.profile is None else self.profile[places],
            None if self.groups is None else self.groups[places],
        )


@dataclass
class Held:
    """The test part, as fits and baselines see it; `homology` as in `Rows`, from places of the rows fitted on."""

    embeddings: np.ndarray
    sequences: list[str]
    homology: Transfer | None = None
    profile: np.ndarray | None = None

    def matrix(self, chosen: tuple[str, ...], context: Context, allowed: np.ndarray) -> np.ndarray:
        """The chosen blocks, where the rows `allowed` may be looked at; float32 [N, F]."""
        homology = self.homology(allowed) if "homology" in chosen and self.homology is not None else None
        parts = columns(chosen, self.embeddings, self.sequences, context, homology, self.profile)
        return np.concatenate(parts, axis=1, dtype=np.float32)


def columns(
    chosen: tuple[str, ...],
    embeddings: np.ndarray,
    sequences: list[str],
    context: Context,
    homology: np.ndarray | None = None,
    profile: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The blocks, [N, width] each."""
    given = {"embedding": embeddings.reshape(len(embeddings), -1), "homology": homology, "profile": profile}
    out = []
    for b in chosen:
        block = given.get(b) if b in given else blocks.compute(b, sequences, context)
        assert block is not None, b
        out.append(block)
    return out

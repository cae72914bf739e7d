"""What homologs say of sequences to one head. It is found before the head computes, so that a service can search in
another process than the one that holds the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bioseq.heads.homology import Links


@dataclass
class Relatives:
    """Of N sequences: `links`, the hits among the head's training rows; `labels`, for a head per residue the block
    [L_i, C + 21] of labels copied along the alignments; `profiles`, the profile block of each: [L_i, 21] per residue,
    else [W]. None where the head does not read it."""

    links: Links | None = None
    labels: list[np.ndarray] | None = None
    profiles: list[np.ndarray] | None = None

    def take(self, places: np.ndarray) -> Relatives:
        """Those of some of the sequences, in the order of `places`."""

        def some(rows: list[np.ndarray] | None) -> list[np.ndarray] | None:
            return None if rows is None else [rows[i] for i in places.tolist()]

        links = None if self.links is None else self.links.take(places)
        return Relatives(links, some(self.labels), some(self.profiles))


def joined(parts: Sequence[Relatives]) -> Relatives:
    """Those of the sequences of all parts, in order; the parts belong to one head."""

    def rows(name: str) -> list[np.ndarray] | None:
        each = [getattr(p, name) for p in parts]
        return None if not each or each[0] is None else [row for part in each for row in part]

    links = [p.links for p in parts if p.links is not None]
    return Relatives(Links.joined(links) if links else None, rows("labels"), rows("profiles"))

"""What homologs say of sequences to one head. It is found before the head computes, so that a service can search in
another process than the one that holds the model. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bioseq.bundles.manifest import Manifest
from bioseq.errors import BioseqError

if TYPE_CHECKING:
    from bioseq.bundles.index import Entry
    from bioseq.bundles.registry import Registry

NEAR = 0.95
FOLDER = "homologs"  # of the training rows' sequences in a bundle


@dataclass
class Links:
    """Hits of N queries, flat: `owner` int64 [P] which query, `keys` int64 [P] which training row; best first."""

    count: int
    owner: np.ndarray
    keys: np.ndarray
    bits: np.ndarray
    identity: np.ndarray
    coverage: np.ndarray

    def only(self, keep: np.ndarray) -> Links:
        return Links(self.count, *(a[keep] for a in self.arrays()))

    def take(self, queries: np.ndarray) -> Links:
        """The hits of these queries, numbered anew in their order."""
        place = np.full(self.count, -1)
        place[queries] = np.arange(len(queries))
        keep = np.flatnonzero(place[self.owner] >= 0)
        keep = keep[np.argsort(place[self.owner[keep]], kind="stable")]
        some = self.only(keep)
        return Links(len(queries), place[some.owner], *some.arrays()[1:])

    @classmethod
    def joined(cls, parts: Sequence[Links]) -> Links:
        """The hits of the queries of all parts, numbered on."""
        first = np.cumsum([0, *(p.count for p in parts)])
        columns = zip(*((p.owner + at, *p.arrays()[1:]) for p, at in zip(parts, first)))
        return cls(int(first[-1]), *(np.concatenate(column) for column in columns))

    def each(self) -> list[Links]:
        """Those of each query alone."""
        cuts = np.searchsorted(self.owner, np.arange(self.count + 1))
        return [
            Links(1, np.zeros(b - a, np.int64), *(x[a:b] for x in self.arrays()[1:]))
            for a, b in zip(cuts, cuts[1:])
        ]

    def distant(self) -> Links:
        """Without near-identical rows."""
        return self.only(self.identity <= NEAR)

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.owner, self.keys, self.bits, self.identity, self.coverage


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

    def each(self, count: int) -> list[Relatives]:
        """Those of each of the `count` sequences alone."""
        links = [None] * count if self.links is None else self.links.each()
        return [
            Relatives(
                links[i],
                None if self.labels is None else [self.labels[i]],
                None if self.profiles is None else [self.profiles[i]],
            )
            for i in range(count)
        ]


def joined(parts: Sequence[Relatives]) -> Relatives:
    """Those of the sequences of all parts, in order; the parts belong to one head."""

    def rows(name: str) -> list[np.ndarray] | None:
        each = [getattr(p, name) for p in parts]
        return None if not each or each[0] is None else [row for part in each for row in part]

    links = [p.links for p in parts if p.links is not None]
    return Relatives(Links.joined(links) if links else None, rows("labels"), rows("profiles"))


def searches(manifest: Manifest) -> bool:
    """Whether the head of this manifest reads homologs."""
    return f"{FOLDER}/manifest.json" in manifest.files or reads_profiles(manifest)


def reads_profiles(manifest: Manifest) -> bool:
    """Whether the head of this manifest reads profiles of homologs."""
    return "profile" in ((manifest.extra.get("head") or {}).get("blocks") or ())


def remove(registry: Registry, ref: str) -> Entry:
    """`Registry.remove`, and with a head the search database that this computer made of its training rows, unless
    another registered version has the same rows."""
    from bioseq.homologs.database import remove_database

    def rows(entry: Entry) -> str | None:
        name = f"{FOLDER}/manifest.json"
        with suppress(BioseqError, OSError, ValueError, KeyError):  # a damaged bundle can be removed too
            if entry.kind == "head" and name in registry.manifest(entry).files:
                return json.loads(registry.file(entry, name))["hash"]
        return None

    own = next((rows(e) for e in registry.entries() if e.ref == ref), None)
    removed = registry.remove(ref)
    if own is not None and own not in map(rows, registry.entries()):
        remove_database(own)
    return removed

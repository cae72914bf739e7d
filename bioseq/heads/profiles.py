"""Profile blocks: what homologs in the shipped reference set allow, as inputs of a head: `Profile.columns` per residue,
or `pooled_profile` per protein.

The search is one recipe for training and for use: one round, with hits above 95 % identity left out, so that a block
does not depend on whether the protein itself is in the reference set. It reads no labels. Where no homolog has a
residue, the block says what the sequence says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bioseq.errors import BundleError
from bioseq.heads.homology import LETTERS
from bioseq.homologs.door import Homologs
from bioseq.homologs.hits import encode
from bioseq.homologs.matrix import BACKGROUND
from bioseq.homologs.profile import Profile
from bioseq.homologs.reference import open_reference
from bioseq.homologs.settings import SearchSettings

SEARCH = SearchSettings(sensitivity=7.5, iterations=1, exclude_above_identity=0.95)
_ENDS = (20, 60)


def find_profiles(
    sequences: Sequence[str], *, threads: int | None = None, cache: bool = True
) -> list[Profile]:
    """Profiles of cleaned sequences."""
    return Homologs("default", settings=SEARCH, threads=threads, cache=cache, quiet=True).profiles(sequences)


def check_reference(head: str, wanted: str) -> None:
    """Raise `BundleError` where the head was made with another reference set than the one that ships."""
    found = open_reference("default").hash
    if found != wanted:
        raise BundleError(
            f"head {head} reads profiles from reference set {wanted[:19]}...; this bioseq ships {found[:19]}...",
            code="homologs.wrong_hash",
            hint="Make the head again with this version: bioseq finetune.",
        )


def pooled_profile(profile: Profile) -> np.ndarray:
    """float32 [504]: shares of the residues over the protein and its homologs; the same of the first 20, first 60, last
    20 and last 60 columns; of pairs of neighbouring columns; log10(1 + homologs), log10(1 + effective number), share of
    columns that homologs cover, and mean information of a column in nats."""
    own = (encode(profile.query)[:, None] == np.arange(LETTERS)).astype(np.float64)
    total = own + profile.counts
    share = total / np.maximum(total.sum(1, keepdims=True), 1e-9)
    parts = [share, *(part for n in _ENDS for part in (share[:n], share[-n:]))]
    means = [part.sum(0) / max(part.sum(), 1e-9) for part in parts]
    pairs = share[:-1].T @ share[1:]
    information = np.sum(share * np.log(np.maximum(share, 1e-9) / BACKGROUND), axis=1)
    told = [
        np.log10(1 + profile.n_homologs),
        np.log10(1 + profile.neff),
        float((profile.depth > 0).mean()) if len(profile) else 0.0,
        float(information.mean()) if len(profile) else 0.0,
    ]
    return np.concatenate([*means, pairs.ravel() / max(pairs.sum(), 1e-9), told]).astype(np.float32)


POOLED_WIDTH = LETTERS * (1 + 2 * len(_ENDS)) + LETTERS**2 + 4

"""Profiles: which residues a protein's relatives allow at each of its places.

Concept: `profile` answers, for every place, "what stands here, as far as the homologs and the rest of the query
tell?". The query's own residue at that place is not used, so the answer is the same whether it is hidden or not.
Three estimates are mixed:

1. the background: residue frequencies of proteins, drawn towards the query's own composition, near places most;
2. the counts: residues of the hits at that column, each sequence weighted by the inverse of the number of hits
   that are 80 % identical to it (Henikoff's idea in the form of Morcos et al. 2011) and by how near it is to the
   query, with substitution pseudocounts (Henikoff & Henikoff 1996) that fade as 1 / (evidence + beta);
3. the star: relatives as leaves around the query, each having evolved from it for a time that its identity tells,
   so that log p(a) = log background(a) + damped sum of log P_t(x | a) / background(x).

P_t is BLOSUM62's joint frequencies (Henikoff & Henikoff 1992) raised to a power t. The strengths are in
`parameters.json`, fitted once to residues hidden in clusters held out of the data (`training.release.fit_profile`).

Axes: L places, N hits, B classes of identity to the query, 20 residues in the order of `LETTERS`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bioseq.homologs.database import LETTERS, OTHER
from bioseq.homologs.hits import Hits, encode
from bioseq.homologs.matrix import BACKGROUND, evolved
from bioseq.specs.reading import build, parse

MAX_SEQUENCES = 1000  # sequences that are weighted; more add time and little else
_REACH = 96  # places over which local composition is taken


@dataclass(frozen=True, slots=True)
class ProfileParameters:
    """Strengths of the three estimates; `edges` part identities into the B classes of the [B] tuples."""

    edges: tuple[float, ...]
    global_strength: float
    query_strength: float
    local_strength: float
    local_scale: float
    count_weight: tuple[float, ...]
    count_time: tuple[float, ...]
    beta: float
    background_strength: float
    star_weight: tuple[float, ...]
    star_time: tuple[float, ...]
    star_damping: float
    mix: tuple[float, float, float]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> ProfileParameters:
        return build(cls, parse(text, "the profile's parameters"))


@cache
def default_parameters() -> ProfileParameters:
    """Those that are shipped."""
    return ProfileParameters.from_json((Path(__file__).parent / "parameters.json").read_text())


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """What the homologs of one query say. `query` has X where a residue was hidden.

    log_probs float32 [L, 20], natural logarithms, each row sums to 1 as probabilities; counts float32 [L, 20],
    weighted residues of the hits; depth float32 [L], their sum; n_homologs, hits; neff, the number of effective
    sequences (sum of the sequence weights), 0 without homologs.
    """

    query: str
    log_probs: np.ndarray
    counts: np.ndarray
    depth: np.ndarray
    n_homologs: int
    neff: float

    def __len__(self) -> int:
        return len(self.query)

    @property
    def probs(self) -> np.ndarray:
        return np.exp(self.log_probs)

    def columns(self) -> np.ndarray:
        """float32 [L, 21], what a network is given: log-odds of the residues against the background, and log(1 + depth).
        Zero where no homolog has a residue."""
        out = np.zeros((len(self), len(LETTERS) + 1), dtype=np.float32)
        out[:, :-1] = self.log_probs - np.log(BACKGROUND)
        out[:, -1] = np.log1p(self.depth)
        out[self.depth <= 0] = 0.0
        return out

    def save(self, path: str | Path) -> None:
        """A compact file: half precision, compressed. `load_profile` reads it."""
        np.savez_compressed(
            path,
            query=np.frombuffer(self.query.encode(), np.uint8),
            log_probs=self.log_probs.astype(np.float16),
            counts=self.counts.astype(np.float16),
            numbers=np.array([self.n_homologs, self.neff]),
        )


def load_profile(path: str | Path) -> Profile:
    with np.load(path, allow_pickle=False) as found:
        counts = found["counts"].astype(np.float32)
        n, neff = found["numbers"]
        query = found["query"].tobytes().decode()
        return Profile(
            query, found["log_probs"].astype(np.float32), counts, counts.sum(1), int(n), float(neff)
        )


def sequence_weights(aligned: np.ndarray, *, identity: float = 0.8) -> np.ndarray:
    """1 / (hits that share at least this part of a hit's residues, itself among them), float64 [N].

    `aligned` uint8 [N, L]. A fragment is weighed down by a whole sequence that holds it, not the other way round.
    """
    count, length = aligned.shape
    if not count:
        return np.zeros(0)
    known = aligned < OTHER
    width = -(-length // 64) * 8  # bytes of a row, whole words

    def packed(bits: np.ndarray) -> np.ndarray:
        out = np.zeros((count, width), dtype=np.uint8)
        out[:, : -(-length // 8)] = np.packbits(bits, axis=1)
        return out.view(np.uint64)

    there = packed(known)
    planes = [packed((aligned >> k) & 1) for k in range(5)]
    own = known.sum(1)
    near = np.empty(count)
    block = max(1, 400_000 // (count * there.shape[1]))
    for start in range(0, count, block):
        rows = slice(start, min(start + block, count))
        differ = planes[0][rows, None] ^ planes[0][None]
        for plane in planes[1:]:
            differ |= plane[rows, None] ^ plane[None]
        same = np.bitwise_count(~differ & there[rows, None] & there[None]).sum(2, dtype=np.int64)
        near[rows] = (same >= identity * own[rows, None] - 1e-9).sum(1)
    return 1.0 / near


def binned_counts(
    hits: Hits, edges: tuple[float, ...], weights: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """(weighted residues of the hits by column and class of identity, float64 [L, B, 20]; their effective number)."""
    length, classes = len(hits.query), len(edges) + 1
    some = slice(
        None
    )  # of an alignment deeper than that, rows at equal steps, so that far ones are among them
    if len(hits) > MAX_SEQUENCES:
        some = np.linspace(0, len(hits) - 1, MAX_SEQUENCES).astype(np.int64)  # type: ignore[assignment]
    aligned, which = hits.aligned[some], np.searchsorted(edges, hits.identity[some])
    weights = sequence_weights(aligned) if weights is None else weights
    hit, column = np.nonzero(aligned < OTHER)
    flat = (column * classes + which[hit]) * 20 + aligned[hit, column]
    counts = np.bincount(flat, weights[hit], minlength=length * classes * 20)
    return counts.reshape(length, classes, 20), float(weights.sum())


def composition(query: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(residues of the rest of the query; the same, fading as exp(-distance / scale)): float64 [L, 20] each.
    A place's own residue is in neither."""
    codes = encode(query)
    ones = np.zeros((len(codes), 20))
    known = codes < OTHER
    ones[np.flatnonzero(known), codes[known]] = 1.0
    kernel = np.exp(-np.arange(1, _REACH + 1) / scale)
    both = np.concatenate([kernel[::-1], [0.0], kernel])
    size = len(codes) + len(both)
    spread = np.fft.rfft(ones, size, axis=0) * np.fft.rfft(both, size)[:, None]
    local = np.fft.irfft(spread, size, axis=0)[_REACH : _REACH + len(codes)]
    return ones.sum(0) - ones, np.maximum(local, 0.0)


def profile(hits: Hits, parameters: ProfileParameters | None = None) -> Profile:
    """The profile of a query from its hits; without hits it is the background of the query's composition."""
    p = parameters or default_parameters()
    counts_LBa, neff = binned_counts(hits, p.edges)
    whole, local = composition(hits.query, p.local_scale)
    background = p.global_strength * BACKGROUND + p.query_strength * whole + p.local_strength * local
    background /= background.sum(1, keepdims=True)
    depth = counts_LBa.sum((1, 2))
    n = depth[:, None]
    flat = counts_LBa.reshape(len(n), -1)

    w = np.asarray(p.count_weight)
    weighted = counts_LBa * w[:, None]
    total = weighted.sum((1, 2))[:, None]
    seen = weighted.sum(1)
    expected = flat @ (w[:, None, None] * evolved(p.count_time)).reshape(-1, 20) / np.maximum(total, 1e-12)
    strength = p.background_strength
    share = np.where(total > 0, seen / np.maximum(total, 1e-12), 0.0)
    counted = (total * share + p.beta * expected + strength * background) / (
        total + p.beta * (total > 0) + strength
    )

    ratio = np.log(evolved(p.star_time) / BACKGROUND)  # [B, x, a]; symmetric, the matrix being reversible
    pull = flat @ (np.asarray(p.star_weight)[:, None, None] * ratio).reshape(-1, 20)
    star = np.log(background) + pull * (1 + n) ** -p.star_damping
    star = np.exp(star - star.max(1, keepdims=True))
    star /= star.sum(1, keepdims=True)

    a, b, c = p.mix
    counts_share = 1 / (1 + np.exp(-(a + b * np.log1p(n) + c * np.log1p(neff))))
    probs = counts_share * counted + (1 - counts_share) * star
    return Profile(
        hits.query,
        np.log(probs).astype(np.float32),
        counts_LBa.sum(1).astype(np.float32),
        depth.astype(np.float32),
        len(hits),
        neff,
    )


__all__ = [
    "LETTERS",
    "Profile",
    "ProfileParameters",
    "binned_counts",
    "composition",
    "default_parameters",
    "load_profile",
    "profile",
    "sequence_weights",
]

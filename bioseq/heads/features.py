"""Numbers that a head computes from the sequence itself, to stand beside the embedding.

With few labels, plain sequence features added to a model's embedding or likelihood are hard to beat
("augmented models", Hsu et al. 2022, doi 10.1038/s41587-021-01146-5). Each block is a pure function of one
sequence (and, for tables of one length, of sites and a wild type kept in the head), so a result never
depends on batch-mates. Numbers are those of proteins; for DNA and RNA the blocks run over four letters, and
what is known of amino acids alone (properties, BLOSUM62) is left out.

| block | numbers | what |
|---|---|---|
| composition | 21 | share of each standard residue; log10 of the length |
| dipeptide | 400 | share of each ordered pair of neighbours |
| gapped | 1200 | the same for pairs with 1, 2 and 3 residues between them |
| terminal | 80 | composition of the first 20, first 60, last 20 and last 60 residues (targeting signals) |
| onehot | 20 a site | residue at each varied site (one-length tables) |
| pairs | 400 a pair of sites | residue pairs at the varied sites (at most 8 sites) |
| properties | 8 a site | physical properties of the residue at each varied site |
| mutations | 3 | substitutions from the wild type: count, count > 2, BLOSUM62 sum |
| masked_marginal | 1 | sum over substitutions of the backbone's masked-marginal log odds (Meier et al. 2021) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations

import numpy as np

from bioseq.errors import SequenceError
from bioseq.specs.finetune import FEATURE_BLOCKS, ORDER_BLOCKS, SITE_BLOCKS

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
BY_ALPHABET = {"protein": LETTERS, "dna": "ACGT", "rna": "ACGU"}
PROTEIN_ONLY = ("properties",)  # hydropathy, helix propensity and so on mean nothing for a nucleotide


def clean(sequence: str) -> str:
    """Upper case, final stop dropped, mask tokens as X: what feature blocks read."""
    return sequence.replace("<mask>", "X").upper().rstrip("*")


def kept(sequences: Sequence[str], lengths: Sequence[int] = ()) -> list[str]:
    """Cleaned sequences, cut to the residues that were computed where `lengths` says so."""
    texts = [clean(s) for s in sequences]
    return [t[:n] for t, n in zip(texts, lengths, strict=True)] if len(lengths) else texts


@lru_cache(maxsize=8)
def _table(letters: str) -> np.ndarray:
    code = np.full(256, len(letters), dtype=np.int64)
    for i, letter in enumerate(letters):
        code[ord(letter)] = code[ord(letter.lower())] = i
    return code


_GAPS = (1, 2, 3)
_ENDS = (20, 60)

# Kyte & Doolittle 1982 hydropathy; Zamyatnin 1972 volume (A^3); charge at pH 7; Grantham 1974 polarity;
# Chou & Fasman 1978 helix and strand propensities; aromatic; beta-branched. Order of LETTERS.
_PROPERTIES = np.array(
    [
        [1.8, 2.5, -3.5, -3.5, 2.8, -0.4, -3.2, 4.5, -3.9, 3.8, 1.9, -3.5, -1.6, -3.5, -4.5, -0.8, -0.7, 4.2, -0.9, -1.3],
        [88.6, 108.5, 111.1, 138.4, 189.9, 60.1, 153.2, 166.7, 168.6, 166.7, 162.9, 114.1, 112.7, 143.8, 173.4, 89.0, 116.1, 140.0, 227.8, 193.6],
        [0, 0, -1, -1, 0, 0, 0.1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
        [8.1, 5.5, 13.0, 12.3, 5.2, 9.0, 10.4, 5.2, 11.3, 4.9, 5.7, 11.6, 8.0, 10.5, 10.5, 9.2, 8.6, 5.9, 5.4, 6.2],
        [1.42, 0.70, 1.01, 1.51, 1.13, 0.57, 1.00, 1.08, 1.16, 1.21, 1.45, 0.67, 0.57, 1.11, 0.98, 0.77, 0.83, 1.06, 1.08, 0.69],
        [0.83, 1.19, 0.54, 0.37, 1.38, 0.75, 0.87, 1.60, 0.74, 1.30, 1.05, 0.89, 0.55, 1.10, 0.93, 0.75, 1.19, 1.70, 1.37, 1.47],
        [0, 0, 0, 0, 1, 0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0],
    ]
).T  # fmt: skip
PROPERTIES = ((_PROPERTIES - _PROPERTIES.mean(0)) / _PROPERTIES.std(0)).astype(np.float32)
PROPERTIES = np.vstack([PROPERTIES, np.zeros((1, PROPERTIES.shape[1]), np.float32)])


@lru_cache(maxsize=1)
def _blosum62() -> np.ndarray:
    """BLOSUM62 (Henikoff & Henikoff 1992), int [21, 21] in the order of LETTERS, 0 for other letters."""
    from Bio.Align import substitution_matrices

    matrix = substitution_matrices.load("BLOSUM62")
    out = np.zeros((21, 21), dtype=np.float32)
    for i, a in enumerate(LETTERS):
        for j, b in enumerate(LETTERS):
            out[i, j] = matrix[a, b]
    return out


def codes(sequence: str, letters: str = LETTERS) -> np.ndarray:
    """Place of every residue in `letters`, int64 [L]; len(letters) for any other letter."""
    return _table(letters)[np.frombuffer(sequence.encode("latin-1", "replace"), dtype=np.uint8)]


@dataclass(frozen=True)
class Context:
    """What blocks need beside a sequence: the `alphabet`; for a one-length table zero-based varied `sites`, the
    `wild_type`, and `odds`, float32 [L, letters], log p(residue) - log p(wild type) at each place with that place
    masked."""

    wild_type: str = ""
    sites: tuple[int, ...] = ()
    odds: np.ndarray | None = field(default=None, compare=False)
    alphabet: str = "protein"

    @property
    def letters(self) -> str:
        return BY_ALPHABET[self.alphabet]

    @property
    def absent(self) -> tuple[str, ...]:
        """Blocks that make no sense for this alphabet."""
        return () if self.alphabet == "protein" else PROTEIN_ONLY


def _flat(sequences: Sequence[str], letters: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = np.fromiter((len(s) for s in sequences), dtype=np.int64, count=len(sequences))
    return codes("".join(sequences), letters), np.repeat(np.arange(len(sequences)), lengths), lengths


def _shares(keys: np.ndarray, owner: np.ndarray, n: int, width: int) -> np.ndarray:
    counts = np.bincount(owner * width + keys, minlength=n * width).reshape(n, width).astype(np.float32)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def _pairs_at(sequences: Sequence[str], distance: int, letters: str) -> np.ndarray:
    k = len(letters)
    code, owner, _ = _flat(sequences, letters)
    a, b = code[:-distance], code[distance:]
    keep = (owner[:-distance] == owner[distance:]) & (a < k) & (b < k)
    return _shares(a[keep] * k + b[keep], owner[:-distance][keep], len(sequences), k * k)


def _composition(sequences: Sequence[str], letters: str) -> np.ndarray:
    k = len(letters)
    code, owner, lengths = _flat(sequences, letters)
    keep = code < k
    shares = _shares(code[keep], owner[keep], len(sequences), k)
    return np.column_stack([shares, np.log10(np.maximum(lengths, 1)).astype(np.float32)])


def _terminal(sequences: Sequence[str], letters: str) -> np.ndarray:
    parts = []
    for size in _ENDS:
        for ends in ([s[:size] for s in sequences], [s[-size:] for s in sequences]):
            parts.append(_composition(ends, letters)[:, :-1])
    return np.column_stack(parts)


def _at_sites(sequences: Sequence[str], context: Context) -> np.ndarray:
    want = len(context.wild_type)
    for index, sequence in enumerate(sequences):
        if len(sequence) != want:
            raise SequenceError(
                f"{len(sequence)} residues; this head was made from variants of one protein of {want} residues.",
                index=index,
                hint="Give full-length variants, substitutions only, or use a head for any protein.",
            )
    if not sequences:
        return np.zeros((0, len(context.sites)), dtype=np.int64)
    flat = codes("".join(sequences), context.letters).reshape(len(sequences), want)
    return flat[:, list(context.sites)]


def _site_block(block: str, sequences: Sequence[str], context: Context) -> np.ndarray:
    at = _at_sites(sequences, context)
    n, k = len(sequences), len(context.letters)
    if block == "onehot":
        return np.eye(k + 1, dtype=np.float32)[at][:, :, :k].reshape(n, -1)
    if block == "properties":
        return PROPERTIES[at].reshape(n, -1)
    if block == "pairs":
        if len(context.sites) > 8:
            raise ValueError(f"pairs of {len(context.sites)} sites are too many; at most 8")
        out = []
        for i, j in combinations(range(len(context.sites)), 2):
            good = (at[:, i] < k) & (at[:, j] < k)
            pair = np.where(good, at[:, i] * k + at[:, j], 0)
            out.append(np.eye(k * k, dtype=np.float32)[pair] * good[:, None])
        return np.column_stack(out) if out else np.zeros((n, 0), np.float32)
    # Sites are where the table varied; substitutions elsewhere count too.
    full = _at_sites(sequences, replace(context, sites=tuple(range(len(context.wild_type)))))
    wild = codes(context.wild_type, context.letters)
    changed = full != wild
    if block == "mutations":
        count = changed.sum(1)
        rows = [count, count > 2]
        if context.alphabet == "protein":
            rows.append((_blosum62()[full, wild] * changed).sum(1))
        return np.column_stack(rows).astype(np.float32)
    if context.odds is None:
        raise ValueError("the masked_marginal block needs the backbone's log odds")
    odds = np.column_stack([context.odds, np.zeros(len(wild), np.float32)])
    return (odds[np.arange(len(wild)), full] * changed).sum(1, keepdims=True).astype(np.float32)


@lru_cache(maxsize=16)
def _order_block(block: str, sequences: tuple[str, ...], letters: str) -> np.ndarray:
    # Cached: many heads that share a batch ask for the same blocks of the same sequences.
    if block == "composition":
        out = _composition(sequences, letters)
    elif block == "dipeptide":
        out = _pairs_at(sequences, 1, letters)
    elif block == "gapped":
        out = np.column_stack([_pairs_at(sequences, gap + 1, letters) for gap in _GAPS])
    else:
        out = _terminal(sequences, letters)
    out.setflags(write=False)
    return out


def compute(block: str, sequences: Sequence[str], context: Context) -> np.ndarray:
    """One block, float32 [N, width]. Raises `SequenceError` where a site block meets another length."""
    if block in context.absent:
        raise KeyError(f"the block {block!r} is for proteins, not for {context.alphabet}")
    if block in ORDER_BLOCKS:
        if not sequences:
            return np.zeros((0, width(block, context)), np.float32)
        return _order_block(block, tuple(sequences), context.letters)
    if block in SITE_BLOCKS:
        return _site_block(block, sequences, context)
    raise KeyError(f"unknown feature block {block!r}; known are {', '.join(FEATURE_BLOCKS)}")


def width(block: str, context: Context) -> int:
    """Numbers in a block."""
    sites, k = len(context.sites), len(context.letters)
    return {
        "composition": k + 1,
        "dipeptide": k * k,
        "gapped": k * k * len(_GAPS),
        "terminal": 2 * k * len(_ENDS),
        "onehot": k * sites,
        "pairs": k * k * sites * (sites - 1) // 2,
        "properties": PROPERTIES.shape[1] * sites,
        "mutations": 3 if context.alphabet == "protein" else 2,
        "masked_marginal": 1,
    }[block]

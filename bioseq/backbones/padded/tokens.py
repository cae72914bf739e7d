"""Residues of the alphabet -> a family's own tokens, and states of tokens -> states of residues.

Legend: L residues of a sequence, n tokens of it (special ones left out), k letters of a word, D width.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from bioseq.backbones.padded.config import PaddedConfig
from bioseq.errors import EmptySequenceError, SequenceTooLongError
from bioseq.sequences.alphabet import dna, protein, rna

UNKNOWN = 3  # <unk> in every alphabet


@cache
def _tables(config: PaddedConfig) -> tuple[np.ndarray, np.ndarray]:
    """By id of the alphabet: the family's token, and the place among the letters of words (-1: none)."""
    ids = np.asarray(config.ids, dtype=np.int64)
    other = ids[
        protein().id("X") if len(ids) == len(protein()) else dna().id("N")
    ]  # of letters that it lacks
    ids = np.where(ids < 0, other if other >= 0 else ids[UNKNOWN], ids)
    letters = np.full(len(ids), -1, dtype=np.int64)
    if config.k > 1:
        alphabet = rna() if "U" in config.word_letters else dna()
        for place, letter in enumerate(config.word_letters):
            letters[alphabet.id(letter)] = place
    return ids, letters


def tokenise(config: PaddedConfig, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int64 [n], number of residues from each token's first on, int64 [n]) of residues [L]."""
    table, letters = _tables(config)
    k = config.k
    if k == 1:
        return table[ids], np.ones(len(ids), dtype=np.int64)
    places = letters[ids]
    powers = len(config.word_letters) ** np.arange(k - 1, -1, -1)
    if config.overlapping:
        windows = np.lib.stride_tricks.sliding_window_view(places, k)
        words = config.first_word + windows @ powers
        return np.where((windows >= 0).all(1), words, table[UNKNOWN]), np.full(len(words), k, dtype=np.int64)
    tokens, sizes, at = [], [], 0
    while at < len(ids):
        word = places[at : at + k]
        if len(word) == k and word.min() >= 0:
            tokens.append(config.first_word + int(word @ powers))
            sizes.append(k)
        else:
            tokens.append(int(table[ids[at]]))
            sizes.append(1)
        at += sizes[-1]
    return np.asarray(tokens, dtype=np.int64), np.asarray(sizes, dtype=np.int64)


def to_residues(config: PaddedConfig, states_nD: Tensor, sizes: np.ndarray, length: int) -> Tensor:
    """States [L, D] of the residues: the mean over the tokens that cover each."""
    if config.k == 1:
        return states_nD
    if not config.overlapping:
        return states_nD.repeat_interleave(torch.as_tensor(sizes, device=states_nD.device), dim=0)
    n = len(states_nD)
    total_LD = states_nD.new_zeros(length, states_nD.shape[1], dtype=torch.float32)
    for offset in range(config.k):
        total_LD[offset : offset + n] += states_nD
    first = np.maximum(np.arange(length) - config.k + 1, 0)
    counts = np.minimum(np.arange(length), n - 1) - first + 1
    return (total_LD / torch.as_tensor(counts, device=total_LD.device)[:, None]).to(states_nD.dtype)


def check(config: PaddedConfig, ids: np.ndarray) -> None:
    """Raise `EmptySequenceError` for a sequence shorter than a word of a family whose words overlap,
    `SequenceTooLongError` for more tokens than the family has places for."""
    if config.overlapping and len(ids) < config.k:
        raise EmptySequenceError(
            f"{len(ids)} letters; this model reads words of {config.k}.", hint="Give a longer sequence."
        )
    if config.k > 1 and config.max_tokens:
        n = len(tokenise(config, ids)[0])
        if n > config.max_tokens:
            raise SequenceTooLongError(
                f"{n} tokens; the limit is {config.max_tokens}. Letters other than {config.word_letters} are tokens of "
                "their own.",
                hint="Cut the sequence, or cut out long runs of N.",
            )

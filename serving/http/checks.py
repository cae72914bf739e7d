"""What the ingress checks before an engine sees a request, and what the request will cost. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from bioseq.bundles.manifest import Manifest
from bioseq.errors import SequenceError, SequenceTooLongError
from bioseq.inference.batching import SPECIAL_TOKENS, windows
from bioseq.sequences.alphabet import Alphabet, by_name

OVERLAP = 256  # of windows, as in bioseq.inference.predictor


@dataclass(frozen=True, slots=True)
class Checked:
    """By sequence: residues that are computed, and tokens of one pass."""

    residues: list[int]
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the ingress knows of a backbone."""

    alphabet: Alphabet
    max_residues: int
    d_model: int
    n_layers: int

    @classmethod
    def of(cls, manifest: Manifest) -> Shape:
        a = manifest.architecture
        return cls(
            by_name(manifest.alphabet),
            int(a.get("max_residues", 1022)),
            int(a["d_model"]),
            int(a["n_layers"]),
        )

    def cost(self, length: int, long_sequences: str) -> tuple[int, int]:
        """(residues, tokens) of one pass over `length` residues."""
        if length <= self.max_residues:
            return length, length + SPECIAL_TOKENS
        if long_sequences == "truncate":
            return self.max_residues, self.max_residues + SPECIAL_TOKENS
        cover = windows(length, self.max_residues, min(OVERLAP, self.max_residues // 4))
        return length, sum(w.end - w.start + SPECIAL_TOKENS for w in cover)


def check(shape: Shape, sequences: Sequence[str], long_sequences: str) -> Checked:
    """Raises what `Predictor.prepare` would, with the index of the first sequence at fault."""
    residues, tokens = [], []
    for index, sequence in enumerate(sequences):
        try:
            shape.alphabet.check_kind(sequence)
            length = len(shape.alphabet.encode(sequence, masks=True))
            if length > shape.max_residues and long_sequences == "error":
                raise SequenceTooLongError(
                    f"{length} residues; the limit is {shape.max_residues}.",
                    hint="Cut it, or choose long_sequences 'window' or 'truncate'.",
                )
        except SequenceError as error:
            raise error.at(index=index) from None
        kept, cost = shape.cost(length, long_sequences)
        residues.append(kept)
        tokens.append(cost)
    return Checked(residues, tokens)


async def checked(shape: Shape, sequences: Sequence[str], long_sequences: str) -> Checked:
    """`check`, in a thread where it would hold up the loop."""
    if len(sequences) < 64:
        return check(shape, sequences, long_sequences)
    return await asyncio.to_thread(check, shape, sequences, long_sequences)


def slices(tokens: Sequence[int], bytes_each: Sequence[int], max_tokens: int, max_bytes: int) -> list[slice]:
    """Runs of sequences of at most so many tokens and answer bytes each; a larger one goes alone."""
    cuts: list[slice] = []
    start = sum_tokens = sum_bytes = 0
    for at, (t, b) in enumerate(zip(tokens, bytes_each)):
        if at > start and (sum_tokens + t > max_tokens or sum_bytes + b > max_bytes):
            cuts.append(slice(start, at))
            start, sum_tokens, sum_bytes = at, 0, 0
        sum_tokens += t
        sum_bytes += b
    cuts.append(slice(start, len(tokens)))
    return cuts


_CHARACTERS = 64  # of variants: reading so many takes about as long as computing a token


def variant_tokens(
    strategy: str, length: int, variants: int, max_residues: int, *, scan: bool, characters: int = 0
) -> int:
    """Tokens that scores of `variants` variants (or a scan) of `length` residues cost at most; `characters` is the
    length of their texts."""
    one = min(length, max_residues) + SPECIAL_TOKENS
    if strategy == "wt-marginals":
        return max(one, length) + characters // _CHARACTERS
    if strategy == "masked-marginals":
        return one * (length if scan else variants)
    return one * length * ((19 * length if scan else variants) + 1)

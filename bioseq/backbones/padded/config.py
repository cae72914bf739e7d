"""The shape of a backbone that `transformers` computes, with all that its tokens need. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bioseq.errors import CheckpointError
from bioseq.specs.reading import build


@dataclass(frozen=True)
class PaddedConfig:
    """`settings` is the family's config.json, as canonical JSON. `ids` are the family's token ids in the order of the
    alphabet's tokens, -1 where it has none; `prefix` and `suffix` its tokens around a sequence, -1 for none.

    With `k` > 1 a token is a word of k letters: all words over `word_letters`, in that order, have ids from
    `first_word` on. Words overlap (one begins at each letter), or follow each other, where letters that make no
    word are tokens of their own. `max_residues` is the longest sequence in one pass, if all its letters make words.
    """

    name: str
    family: Literal["bert", "t5", "esm"]
    settings: str
    ids: tuple[int, ...]
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    vocab_size: int
    max_residues: int
    n_weights: int
    pad: int = 0
    prefix: int = -1
    suffix: int = -1
    has_cls: bool = False
    max_tokens: int = 0
    k: int = 1
    overlapping: bool = False
    word_letters: str = ""
    first_word: int = 0
    read_as_x: str = ""

    @property
    def reads_homologs(self) -> bool:
        return False

    @property
    def n_parameters(self) -> int:
        """Weights as they are stored, each once."""
        return self.n_weights

    def flops_per_token(self, length: float, *, lm_head: bool = False) -> float:
        """Of one residue in a sequence of `length`, as in `ModelConfig`. With words that follow each other a residue is
        a k-th of a token. Gated feed-forward blocks are counted as plain ones."""
        share = 1.0 if self.overlapping else 1.0 / self.k
        d, f = self.d_model, self.d_ff
        head = d * d + d * self.vocab_size if lm_head else 0
        dense = self.n_layers * (4 * d * d + 2 * d * f) + head
        return share * (2.0 * dense + 4.0 * self.n_layers * share * length * d)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PaddedConfig:
        return build(cls, data, error=CheckpointError, where="architecture")

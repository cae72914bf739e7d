"""What a backbone, a protein's homologs and a substitution matrix say together of its residues.

Concept: three experts give each standard residue a probability at a position.

    model    the backbone, from the sequence around the position (masked, where the strategy masks it)
    profile  the residues of the homologs in that column, with background where they are few
    matrix   BLOSUM62, from the wild-type residue of the position; for variants only, as a masked residue has none

    masked residues   p = (1 - w) profile + w model,   w = alone / (1 + n / half)
    variants          log q = (1 - t) log p + t log matrix, less the logarithm of its sum

n is the effective number of homologs in the column, `alone` the model's weight where there are none, and `half` the
effective number at which that weight is halved. They belong to a backbone, as does t: all three are fitted once, by
likelihood (masked residues for w, residues of one relative for t), never on an assay, and are stored in the bundle's
`mixture.json`. `fitting` says on which proteins. A backbone that knows little gets
`half` near zero: a few homologs silence it. Tokens that are not standard residues keep the model's probability.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.errors import BundleError, SpecError
from bioseq.homologs.matrix import conditional
from bioseq.homologs.profile import Profile
from bioseq.specs.reading import build, parse

if TYPE_CHECKING:
    from bioseq.bundles.bundle import Bundle
    from bioseq.sequences.alphabet import Alphabet

FILE = "mixture.json"


@dataclass(frozen=True, slots=True)
class Mixture:
    """The weights above. `fitted` says on what they were fitted and what came of it; None: they are the defaults,
    under which homologs and matrix decide."""

    alone: float = 0.5
    half: float = 0.1
    matrix: float = 0.75
    fitted: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.alone <= 1 and 0 < self.half < float("inf") and 0 <= self.matrix <= 1):
            raise SpecError("alone and matrix must lie in 0 to 1, and half above 0.", field="mixture")

    def weight(self, depth: np.ndarray) -> np.ndarray:
        """The model's weight w at effective numbers of homologs, float64 of the same shape."""
        return self.alone / (1.0 + np.asarray(depth, dtype=np.float64) / self.half)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Mixture:
        """The exact inverse of `to_json`. Raises `BundleError`."""
        return build(cls, parse(text, FILE, error=BundleError), error=BundleError, where=FILE)

    @classmethod
    def of(cls, bundle: Bundle) -> Mixture:
        """The weights stored with a backbone, or the defaults."""
        if FILE not in bundle.manifest.files:
            return cls()
        return cls.from_json(bundle.file(FILE).read_text("utf-8"))


@dataclass(frozen=True, slots=True)
class Found:
    """The profile of a sequence, and the name of what its homologs were found in."""

    profile: Profile
    source: str


def check_same(profile: Profile, letters: str) -> None:
    """Raise `SpecError` for the profile of another sequence; X, a hidden residue, agrees with any."""
    if len(profile) != len(letters):
        what = f"the profile has {len(profile)} columns, and the sequence {len(letters)} residues"
    elif any(a != b and "X" not in (a, b) for a, b in zip(profile.query, letters)):
        what = "the profile is that of another sequence"
    else:
        return
    raise SpecError(f"{what}.", field="homologs", hint="Give the profile of this sequence.")


@dataclass(frozen=True, slots=True)
class Evidence:
    """The homologs of one sequence, found in `source`, and how far they are trusted beside a backbone."""

    profile: Profile
    source: str
    mixture: Mixture

    @classmethod
    def of(cls, found: Found, mixture: Mixture, length: int) -> Evidence:
        """Raises `SpecError` for the profile of a sequence of another length."""
        if len(found.profile) != length:
            raise SpecError(
                f"the profile has {len(found.profile)} columns, and the sequence {length} residues.",
                field="homologs",
                hint="Give the profile of this sequence.",
            )
        return cls(found.profile, found.source, mixture)

    def mix(
        self, log_p: np.ndarray, places: np.ndarray, alphabet: Alphabet, wild_type: np.ndarray | None = None
    ) -> np.ndarray:
        """Log-probabilities float64 [rows, V] of the model at the residues `places` [rows], mixed with what the
        homologs say there. With `wild_type`, token ids [L], the matrix has its share."""
        standard = alphabet.standard_ids
        p = np.exp(log_p[:, standard])
        mass = p.sum(axis=1, keepdims=True)
        w = self.mixture.weight(self.profile.depth[places])[:, None]
        column = np.exp(self.profile.log_probs[places].astype(np.float64))
        mixed = np.log((1.0 - w) * column + w * (p / mass))
        if wild_type is not None:
            letter = np.full(len(alphabet), -1)
            letter[standard] = np.arange(len(standard))
            old = letter[wild_type[places]]
            t = np.where(old >= 0, self.mixture.matrix, 0.0)[:, None]
            mixed = (1.0 - t) * mixed + t * np.log(conditional())[old]
            # rows of different contexts are compared by pseudo-log-likelihoods
            mixed -= np.log(np.exp(mixed).sum(axis=1, keepdims=True))
        out = log_p.copy()
        out[:, standard] = mixed + np.log(mass)
        return out

    def summary(self) -> Homologs:
        found = Found(self.profile, self.source)
        return Homologs.of(found, self.mixture.weight(self.profile.depth))

    @property
    def note(self) -> str:
        """What stood behind an answer, in one line."""
        told = self.summary()
        weight = self.mixture.weight(told.depth).mean()
        share = f"the model's weight beside them is {weight:.2f}"
        if self.mixture.fitted is None:
            share += ", the default, as it was not fitted for this backbone"
        if not told.number:
            share = share.replace(" beside them", "")
            return f"no homologs in {told.source}: the model and the substitution matrix stand alone; {share}"
        return f"{told.number} homologs in {told.source}, effective number {told.effective:.1f}; {share}"


@dataclass(frozen=True, slots=True)
class Homologs:
    """What stood behind an answer: where the homologs are from, how many, their effective number, and by column
    the effective number (`depth` [L]) and the model's weight (`weight` [L]; None for a backbone that reads homologs)."""

    source: str
    number: int
    effective: float
    depth: np.ndarray
    weight: np.ndarray | None

    @classmethod
    def of(cls, found: Found, weight: np.ndarray | None = None) -> Homologs:
        p = found.profile
        return cls(found.source, p.n_homologs, p.neff, p.depth, weight)


def residue_probabilities(
    logits: np.ndarray, found: Found, mixture: Mixture, alphabet: Alphabet
) -> np.ndarray:
    """Log-probabilities float32 [L, V] of a model's logits [L, V] and a sequence's homologs together."""
    evidence = Evidence.of(found, mixture, len(logits))
    return evidence.mix(log_softmax(logits), np.arange(len(logits)), alphabet).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

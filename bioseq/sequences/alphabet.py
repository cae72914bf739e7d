"""Immutable vocabularies: which letters a model reads, and how a sequence becomes token ids.

Concept: an `Alphabet` is a fixed tuple of tokens. `encode` turns a residue string into ids through one
256-entry table (no per-residue Python), and refuses any other character, naming the position. Nothing is
ever silently mapped to "unknown": what is changed on the way (a stop at the end dropped, J read as X) is
returned as a note.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from bioseq.errors import EmptySequenceError, IllegalResidueError

_ILLEGAL = 255
MASK_TEXT = "<mask>"
_SURELY = 30
_NUCLEOTIDES = np.isin(np.arange(256), np.frombuffer(b"ACGTUNacgtun", np.uint8))
_NEVER_NUCLEOTIDES = set("EFILPQ")
_MASK_SPOT = "\x1a"  # stands for one mask while positions are counted; no letter of any alphabet


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of the residues, uint8 [L], without special tokens; `notes` say what was changed."""

    ids: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Alphabet:
    """A vocabulary of at most 254 tokens. Token ids are positions in `tokens`.

    `standard` are the letters that scans substitute and probabilities are normalised over; `letters` all that
    may occur in a sequence; `gaps` letters that are refused unless asked for; `aliases` letters read as
    another one, with a note; `pairs` the letters that lie opposite each other on two strands of a nucleic acid,
    "AT CG" (a letter in no pair is its own partner), and "" where there is no such thing.
    """

    name: str
    tokens: tuple[str, ...]
    standard: str
    letters: str
    gaps: str = ".-"
    aliases: tuple[tuple[str, str], ...] = ()
    pairs: str = ""
    _table: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.tokens) > 254 or len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"alphabet {self.name}: tokens must be unique and at most 254")
        table = np.full(256, _ILLEGAL, dtype=np.uint8)
        for letter in self.letters + self.gaps:
            table[ord(letter)] = table[ord(letter.lower())] = self.tokens.index(letter)
        for letter, target in self.aliases:
            table[ord(letter)] = table[ord(letter.lower())] = self.tokens.index(target)
        table.setflags(write=False)
        object.__setattr__(self, "_table", table)

    def __len__(self) -> int:
        return len(self.tokens)

    def id(self, token: str) -> int:
        return self.tokens.index(token)

    @property
    def cls_id(self) -> int:
        return self.tokens.index("<cls>")

    @property
    def pad_id(self) -> int:
        return self.tokens.index("<pad>")

    @property
    def eos_id(self) -> int:
        return self.tokens.index("<eos>")

    @property
    def mask_id(self) -> int:
        return self.tokens.index(MASK_TEXT)

    @property
    def standard_ids(self) -> np.ndarray:
        """Ids of the standard letters, in the order of `standard`; int64 [len(standard)]."""
        return np.array([self.tokens.index(a) for a in self.standard], dtype=np.int64)

    def reverse_complement(self, ids: np.ndarray) -> np.ndarray:
        """The other strand, read in its own direction: token ids uint8 [L] of ids uint8 [L]. Masks stay masks.
        Raises `ValueError` for an alphabet without `pairs`."""
        if not self.pairs:
            raise ValueError(f"the {self.name} alphabet has no complement")
        partner = np.arange(len(self.tokens), dtype=np.uint8)
        for pair in self.pairs.split():
            one, other = self.id(pair[0]), self.id(pair[1])
            partner[one], partner[other] = other, one
        return partner[ids[::-1]]

    def encode(self, sequence: str, *, gaps: bool = False, masks: bool = False) -> Encoded:
        """Token ids of a sequence, uint8 [L], upper or lower case, no special tokens added.

        A `*` at the end is dropped. With `masks`, each "<mask>" in the text is one mask token. Raises
        `EmptySequenceError` and `IllegalResidueError` (one-based position of the first fault).
        """
        masked = masks and MASK_TEXT in sequence
        if masked:
            if _MASK_SPOT in sequence:
                at = sequence.index(_MASK_SPOT)
                position = at + 1 - (len(MASK_TEXT) - 1) * sequence.count(MASK_TEXT, 0, at)
                raise self._illegal(_MASK_SPOT, position)
            sequence = sequence.replace(MASK_TEXT, _MASK_SPOT)
        notes: list[str] = []
        if sequence.endswith("*"):
            sequence = sequence[:-1]
            notes.append("stop codon '*' at the end dropped")
        if not sequence:
            raise EmptySequenceError("the sequence is empty.", hint="Give at least one residue.")
        raw = np.frombuffer(sequence.encode("latin-1", "replace"), dtype=np.uint8)
        ids = self._table[raw]
        if masked:
            ids[raw == ord(_MASK_SPOT)] = self.mask_id
        bad = ids == _ILLEGAL
        if not gaps:
            for gap in self.gaps:
                bad |= raw == ord(gap)
        if bad.any():
            at = int(np.argmax(bad))
            raise self._illegal(sequence[at], at + 1, sequence)
        for letter, target in self.aliases:
            count = int(np.count_nonzero((raw == ord(letter)) | (raw == ord(letter.lower()))))
            if count:
                notes.append(f"{count} {letter} read as {target}")
        return Encoded(ids, tuple(notes))

    def check_kind(self, sequence: str) -> None:
        """Raise `IllegalResidueError` for nucleotides where a protein is meant. A, C, G, T and N are amino acids too, so
        `encode` takes them; but no protein has 30 residues or more, all of them these and each of A, C, G, T there."""
        if self.pairs or len(sequence) < _SURELY:
            return
        raw = np.frombuffer(sequence.encode("latin-1", "replace"), dtype=np.uint8)
        if _NUCLEOTIDES[raw].all() and set(sequence.upper().replace("U", "T")) >= set("ACGT"):
            raise IllegalResidueError(
                f"{len(sequence)} letters, all of them nucleotides; this model reads proteins.",
                hint="Translate them (translate one or six), or name a model for DNA or RNA.",
            )

    def _illegal(self, letter: str, position: int, sequence: str = "") -> IllegalResidueError:
        if letter == "*":
            what, hint = (
                "a stop '*' inside the sequence",
                "Cut the sequence at the stop, or translate it again.",
            )
        elif letter and letter in self.gaps:
            what, hint = f"gap {letter!r}", "Remove the gaps, or allow them (gaps=True, --gaps)."
        else:
            shown = repr(letter) if letter.isprintable() and letter.isascii() and letter else "this character"
            what, hint = shown, f"The {self.name} alphabet has {self.letters}."
            if self.pairs and letter.upper() in "TU":
                hint += f" Write {letter.upper()} as {self.standard[3]}."
            elif self.pairs and not _NEVER_NUCLEOTIDES.isdisjoint(sequence.upper()):
                hint = f"This looks like a protein, and {self.name.upper()} is needed: give the coding sequence, or name a protein model."
        return IllegalResidueError(
            f"illegal residue at position {position}: {what}.", position=position, hint=hint
        )

    def decode(self, ids: np.ndarray) -> str:
        """The tokens' text, joined."""
        return "".join(self.tokens[int(i)] for i in ids)


_SPECIAL = ("<cls>", "<pad>", "<eos>", "<unk>")


@cache
def protein() -> Alphabet:
    """The 33 tokens of ESM-2 in its order (Lin et al. 2023, doi 10.1126/science.ade2574). J is read as X."""
    letters = "LAGVSERTIDPKQNFYMHWCXBUZO"
    return Alphabet(
        "protein",
        (*_SPECIAL, *letters, ".", "-", "<null_1>", MASK_TEXT),
        standard="ACDEFGHIKLMNPQRSTVWY",
        letters=letters,
        aliases=(("J", "X"),),
    )


def _nucleic(name: str, letters: str) -> Alphabet:
    ambiguous = "RYSWKMBDHVN"  # IUPAC-IUB 1984
    return Alphabet(
        name,
        (*_SPECIAL, *letters, *ambiguous, ".", "-", MASK_TEXT),
        standard=letters,
        letters=letters + ambiguous,
        pairs=f"A{letters[3]} CG RY KM BV DH",
    )


@cache
def dna() -> Alphabet:
    return _nucleic("dna", "ACGT")


@cache
def rna() -> Alphabet:
    return _nucleic("rna", "ACGU")


def by_name(name: str) -> Alphabet:
    """`protein`, `dna` or `rna`. Raises KeyError."""
    return {"protein": protein, "dna": dna, "rna": rna}[name]()

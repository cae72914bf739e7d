"""What every design must satisfy, from a TOML file; checked against the wild type before anything is computed.

    fixed = [1, "65-67"]               # these positions keep their residue
    only = ["100-150"]                 # no other position changes
    allowed = {203 = "FYW"}            # residues by position (the wild-type residue always stays possible)
    forbidden = {"*" = "C", 64 = "PG"} # residues that no position, or this one, may change to
    mutations = [1, 8]                 # fewest and most
    keep = ["SYG"]                     # motifs of the wild type that stay where they are
    avoid = ["N[^P][ST]"]              # motifs that no design has
    length = [200, 260]                # residues
    training = "measured.csv"          # a table of variants ...
    from_training = [1, 4]             # ... and mutations to the nearest of them, fewest and most

Positions count from 1. A motif has letters, X for any residue, [ST] and [^P].
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.campaigns.space import CODE, read_variants
from bioseq.errors import InputError, SpecError
from bioseq.homologs.database import LETTERS
from bioseq.sequences.mutations import apply, letters_of

OTHER = 255  # the code of a residue that is not one of LETTERS; it never changes
KEYS = (
    "fixed", "only", "allowed", "forbidden", "mutations", "keep", "avoid", "length", "training", "from_training",
)  # fmt: skip


def encode(sequence: str) -> np.ndarray:
    return np.array([CODE.get(x, OTHER) for x in sequence], np.uint8)


@dataclass
class Constraints:
    """`allowed` bool [L, 20], wild type included; `fewest` and `most` mutations; `keep` motifs with their places."""

    wild_type: str
    allowed: np.ndarray
    fewest: int = 1
    most: int = 0
    keep: list[tuple[re.Pattern[str], list[int]]] = field(default_factory=list)
    avoid: list[re.Pattern[str]] = field(default_factory=list)
    training: np.ndarray | None = None
    near: tuple[int, int] = (0, 1 << 30)

    def __post_init__(self) -> None:
        self.wild = encode(self.wild_type)
        self.allowed = self.allowed.copy()
        known = np.flatnonzero(self.wild < 20)
        self.allowed[self.wild == OTHER] = False
        self.allowed[known, self.wild[known]] = True
        self.free = np.flatnonzero(self.allowed.sum(1) > 1)
        self.most = min(self.most or len(self.free), len(self.free))
        if not len(self.free) or self.fewest > self.most:
            raise InputError(
                f"no design is left: {len(self.free)} positions may change, and {self.fewest} or more mutations are asked for.",
                code="design.empty", hint="Allow more positions or residues, or fewer mutations.",
            )  # fmt: skip

    def text(self, codes: np.ndarray) -> list[str]:
        return [
            "".join(LETTERS[c] if c < 20 else w for c, w in zip(row, self.wild_type))
            for row in codes.tolist()
        ]

    def variant(self, row: np.ndarray) -> str:
        at = np.flatnonzero(row != self.wild)
        return ":".join(f"{self.wild_type[i]}{i + 1}{LETTERS[row[i]]}" for i in at) or "WT"

    def distance(self, codes: np.ndarray) -> np.ndarray:
        """int [N]: mutations to the nearest training variant; 0 without any."""
        if self.training is None:
            return np.zeros(len(codes), int)
        out = np.empty(len(codes), int)
        for i, row in enumerate(codes):
            out[i] = (self.training != row).sum(1).min()
        return out

    def violations(self, codes: np.ndarray) -> np.ndarray:
        """int [N]: how far each is from satisfying everything; 0 for a design."""
        count = (codes != self.wild).sum(1)
        out = np.maximum(self.fewest - count, 0) + np.maximum(count - self.most, 0)
        if self.keep or self.avoid:
            for i, text in enumerate(self.text(codes)):
                out[i] += sum(len(list(p.finditer(text))) for p in self.avoid)
                out[i] += sum(p.match(text, at) is None for p, places in self.keep for at in places)
        if self.training is not None:
            far = self.distance(codes)
            out += np.maximum(self.near[0] - far, 0) + np.maximum(far - self.near[1], 0)
        return out


def read_constraints(wild_type: str, path: str | Path | None, sites: list[int] | None = None) -> Constraints:
    """The constraints of a file; `sites`, zero-based, are the only ones that may change, where given. Raises
    `SpecError` with the field, and `TableError` with the line of the training table."""
    wild = letters_of(wild_type)
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise SpecError(f"{path} cannot be read: {error.strerror}.", field="constraints") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: {error}.", field="constraints") from None
    for key in data:
        if key not in KEYS:
            raise SpecError("unknown constraint.", field=key, hint=f"Known: {', '.join(KEYS)}.")
    allowed = np.ones((len(wild), 20), bool)
    if sites is not None:
        allowed[[i for i in range(len(wild)) if i not in set(sites)]] = False
    if "only" in data:
        allowed[np.setdiff1d(np.arange(len(wild)), _positions(data["only"], wild, "only"))] = False
    allowed[_positions(data.get("fixed", []), wild, "fixed")] = False
    for place, letters in _by_position(data, "allowed", wild):
        allowed[place] &= np.isin(np.arange(20), letters)
    for place, letters in _by_position(data, "forbidden", wild):
        allowed[place] &= ~np.isin(np.arange(20), letters)
    low, high = _pair(data, "length", (0, 1 << 30))
    if not low <= len(wild) <= high:
        raise SpecError(
            f"{low} to {high} residues are asked for, and the wild type has {len(wild)}; designs have its length.",
            field="length",
        )
    fewest, most = _pair(data, "mutations", (1, 0))
    if ("from_training" in data) != ("training" in data):
        raise SpecError("training and from_training belong together.", field="from_training")
    training = None
    if "training" in data:
        table = Path(path or ".").parent / str(data["training"])
        if not table.is_file():
            raise SpecError(f"{table} is not there.", field="training")
        training = np.array([encode(apply(wild, v)) for _, v, _ in read_variants(wild, table)], np.uint8)
        if not len(training):
            raise SpecError(f"{table} has no variant.", field="training")
        training = np.unique(training, axis=0)
    keep = []
    for pattern in _motifs(data, "keep"):
        places = [m.start() for m in re.finditer(f"(?={pattern.pattern})", wild)]
        if not places:
            raise SpecError(f"the wild type does not have {pattern.pattern}.", field="keep")
        keep.append((pattern, places))
    return Constraints(
        wild, allowed, max(fewest, 1), most, keep, _motifs(data, "avoid"), training,
        _pair(data, "from_training", (0, 1 << 30)),
    )  # fmt: skip


def _positions(given: Any, wild: str, name: str) -> list[int]:
    """Zero-based places of positions and ranges."""
    out: list[int] = []
    for item in given if isinstance(given, list) else [given]:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(item))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not match or isinstance(item, bool) or first > last:
            raise SpecError(f"{item!r} is not a position; write 65, or '65-67'.", field=name)
        for position in (first, last):
            if not 1 <= position <= len(wild):
                raise SpecError(
                    f"site {position} is outside the wild type of {len(wild)} residues.", field=name
                )
        out += range(first - 1, last)
    return out


def _by_position(data: dict[str, Any], name: str, wild: str) -> list[tuple[Any, list[int]]]:
    given = data.get(name, {})
    if not isinstance(given, dict):
        raise SpecError('give residues by position: {203 = "FYW"}.', field=name)
    out: list[tuple[Any, list[int]]] = []
    for where, letters in given.items():
        if not isinstance(letters, str) or set(letters.upper()) - set(LETTERS):
            raise SpecError(f"residues at {where} must be of {LETTERS}.", field=name)
        place = slice(None) if where == "*" else _positions(where, wild, name)
        out.append((place, [CODE[x] for x in letters.upper()]))
    return out


def _pair(data: dict[str, Any], name: str, default: tuple[int, int]) -> tuple[int, int]:
    given = data.get(name)
    if given is None:
        return default
    if isinstance(given, int) and not isinstance(given, bool):
        given = [default[0], given]
    if (
        not isinstance(given, list)
        or len(given) != 2
        or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in given)
        or given[0] > given[1]
    ):
        raise SpecError("give the fewest and the most: [1, 8].", field=name)
    return given[0], given[1]


def _motifs(data: dict[str, Any], name: str) -> list[re.Pattern[str]]:
    out = []
    given = data.get(name, [])
    for motif in given if isinstance(given, list) else [given]:
        if not isinstance(motif, str) or not re.fullmatch(r"([A-Z]|\[\^?[A-Z]+\])+", motif):
            raise SpecError(
                f"{motif!r} is not a motif.",
                field=name,
                hint="Write letters, X for any residue, [ST] or [^P].",
            )
        out.append(re.compile(re.sub(r"X(?![^\[]*\])", ".", motif)))
    return out

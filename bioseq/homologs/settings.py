"""How homologs are searched: one frozen object, with an exact JSON round trip and a hash for caches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from bioseq.errors import SpecError
from bioseq.specs.reading import build, parse

_RANGES: dict[str, tuple[float, float]] = {
    "sensitivity": (1.0, 7.5),
    "iterations": (1, 3),
    "e_value": (0.0, 1e4),
    "max_hits": (1, 100_000),
    "min_coverage": (0.0, 1.0),
    "min_identity": (0.0, 1.0),
    "exclude_above_identity": (0.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """Settings of one search. Shares are between 0 and 1.

    sensitivity: MMseqs2's `-s`; iterations: 1 compares sequences, 2 or more compare the profile of the round
    before; e_value: the largest that is kept; max_hits: candidates that pass the prefilter in each round, and so
    the most hits of a query; min_coverage: share of the query's residues that are aligned; min_identity: share of
    equal residues among the aligned ones; exclude_above_identity: hits above it are left out of every round, so
    neither the hits nor the profile that found the others hold them (None keeps all). Residues written X are
    hidden and count neither as equal nor as different.
    """

    sensitivity: float = 7.5
    iterations: int = 2
    e_value: float = 1e-2
    max_hits: int = 300
    min_coverage: float = 0.0
    min_identity: float = 0.0
    exclude_above_identity: float | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name == "exclude_above_identity":
                continue
            whole = name in ("iterations", "max_hits")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise SpecError(f"{value!r} is not a {'whole ' if whole else ''}number.", field=name)
            if not low <= value <= high:
                raise SpecError(f"{value} is outside {low:g} to {high:g}.", field=name)
            if not whole:
                object.__setattr__(self, name, float(value))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SearchSettings:
        """The exact inverse of `to_json`. Raises `SpecError`: not JSON, unknown key, value out of range."""
        return build(cls, parse(text, "the search settings"))

    @property
    def hash(self) -> str:
        """Hex, equal for equal settings."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

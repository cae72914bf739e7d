"""What a stored vector depends on beside its sequence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from bioseq.errors import VectorStoreError


@dataclass(frozen=True, slots=True)
class VectorSettings:
    """All vectors of a store share these; those of other settings go to another store.

    `dtype` is the arithmetic's, `stored` the array's. `homologs` is the hash of the reference set and the search
    settings for a backbone that reads homologs, and empty for others. `width` is the length of one vector.
    """

    weights_hash: str
    width: int
    pooling: str = "mean"
    layers: tuple[int, ...] = (-1,)
    per_residue: bool = False
    long_sequences: str = "error"
    max_residues: int = 1022
    dtype: str = "float32"
    device: str = "cpu"
    stored: str = "float32"
    homologs: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> VectorSettings:
        """Raises `VectorStoreError` for text that another version wrote."""
        try:
            given: dict[str, Any] = json.loads(text)
            return cls(**(given | {"layers": tuple(given["layers"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise VectorStoreError(
                f"the settings cannot be read: {error}.",
                hint="The store was written by another version of bioseq; add the proteins to a new store.",
            ) from None

    def check_same(self, other: VectorSettings, where: object) -> None:
        """Raise `VectorStoreError` naming what differs. `other` is what was asked."""
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if names:
            told = "; ".join(f"{n} {getattr(self, n)!r}, asked {getattr(other, n)!r}" for n in names)
            raise VectorStoreError(
                f"{where} holds other vectors ({told}).",
                code="vectors.other_settings",
                hint="Use the model and options that made the store, or name a new folder.",
            )

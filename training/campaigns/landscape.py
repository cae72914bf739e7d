"""Measured landscapes as the pool of a simulated campaign."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bioseq.campaigns.space import listed, read_variants
from bioseq.errors import TableError
from bioseq.sequences.fasta import read_fasta
from bioseq.sequences.mutations import Variant, letters_of
from training.campaigns.surrogates import Eyes, View


def zero_shot(wild_type: str, model: str = "default", homologs: str = "auto") -> np.ndarray:
    """float [L, 20]: the score of every substitution by model, homologs and BLOSUM62."""
    import bioseq
    from bioseq.inference.scoring import scan_sites

    return np.asarray(scan_sites(bioseq.load(model), wild_type, homologs=homologs).values, float)


def read_landscape(
    path: Path, wild_type: Path, column: str, *, prior: bool = True
) -> tuple[Eyes, View, np.ndarray]:
    """A CSV file of `variant` (or `mutant`, `sequence`) and a column of values; equal variants are averaged, the wild
    type and rows without a value left out. Raises `TableError` with the line."""
    wild = letters_of(next(read_fasta(wild_type)).sequence)
    values: dict[Variant, list[float]] = {}
    for line, variant, row in read_variants(wild, path, column):
        try:
            if (row[column] or "").strip() and variant.changes:
                values.setdefault(variant, []).append(float(row[column]))
        except ValueError:
            raise TableError(f"{path}: line {line}, column {column!r}: not a number.") from None
    if len(values) < 10:
        raise TableError(f"{path}: {len(values)} variants with a value; a simulation needs 10 or more.")
    space = listed(wild, list(values))
    table = (zero_shot(wild) if prior else np.zeros((len(wild), 20)))[space.sites]
    codes = space.encode(list(values))
    eyes = Eyes(space.wild, table)
    eyes.fit_scale(codes)
    return eyes, eyes.look(codes), np.array([np.mean(v) for v in values.values()])

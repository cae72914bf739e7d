"""A small family tree: real proteins, and relatives of ten of them at known distances."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bioseq.homologs.reference import ReferenceSet, build_reference
from bioseq.sequences.fasta import Record, read_fasta

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def mutated(sequence: str, identity: float, seed: int) -> str:
    draw = random.Random(seed)
    return "".join(a if draw.random() < identity else draw.choice(LETTERS.replace(a, "")) for a in sequence)


@pytest.fixture(scope="session")
def families(data: Path) -> list[Record]:
    """64 proteins, then for each of the first ten under 400 residues relatives of 95 down to 50 % identity."""
    proteins = list(read_fasta(data / "proteins_30_1000.fasta"))
    founders = [r for r in proteins if 60 <= len(r.sequence) < 400][:10]
    relatives = [
        Record(f"{r.id}_{percent}", mutated(r.sequence, percent / 100, percent))
        for r in founders
        for percent in (97, 90, 80, 70, 60, 55, 50)
    ]
    return founders + relatives + [r for r in proteins if r not in founders]


@pytest.fixture(scope="session")
def reference(families: list[Record], tmp_path_factory: pytest.TempPathFactory) -> ReferenceSet:
    return build_reference(families, tmp_path_factory.mktemp("homologs") / "families", licence="CC-BY-4.0")

"""Proteins that are written with A, C, G, T, N and U alone: MMseqs2 takes a file that begins with ten such rows for
nucleotides unless it is told otherwise."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from bioseq.commands import homologs as command
from bioseq.errors import ReferenceSetError
from bioseq.homologs.cache import SearchCache
from bioseq.homologs.clusters import cluster, leakage
from bioseq.homologs.hits import Hits
from bioseq.homologs.reference import ReferenceSet, build_reference, open_reference
from bioseq.homologs.search import search
from bioseq.sequences.alphabet import dna
from bioseq.sequences.fasta import Record
from bioseq.specs.finetune import SplitSettings
from training.tables.labels import read_labels
from training.tables.splits import make_split

LOW = ["GA" * 40, "A" * 60, "N" * 12, "ACDG" * 3, "GAT" * 30, "G", "TCUN" * 20]


def letters(count: int, *, of: str = "ACGT", seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(of, k=80 + i)) for i in range(count)]


def mutated(sequence: str, identity: float, seed: int) -> str:
    draw = random.Random(seed)
    return "".join(a if draw.random() < identity else draw.choice("DEKR") for a in sequence)


def same(a: Hits, b: Hits) -> bool:
    arrays = ("keys", "bits", "e_values", "identity", "coverage", "aligned")
    return a.ids == b.ids and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)


@pytest.mark.parametrize("rows", [letters(10), letters(12, of="GA"), LOW[:2] * 6])
def test_batch_mates_of_few_letters_change_no_answer(
    reference: ReferenceSet, families: list[Record], tmp_path: Path, rows: list[str]
) -> None:
    natural = [r.sequence for r in families[:3]]
    alone = [search([q], reference, quiet=True)[0] for q in natural]
    cache = SearchCache(tmp_path / "cache.sqlite")
    together = search([*rows, *natural], reference, cache=cache, quiet=True)
    again = search(natural, reference, cache=cache, quiet=True)
    assert all(len(a) >= 4 for a in alone)
    for i, one in enumerate(alone):
        assert same(one, together[len(rows) + i]) and same(one, again[i])
    for row, one in zip(rows, together):
        assert same(search([row], reference, quiet=True)[0], one)


@pytest.mark.parametrize("row", LOW)
def test_one_such_protein_alone_is_searched(reference: ReferenceSet, row: str) -> None:
    (hits,) = search([row], reference, quiet=True)
    assert hits.query == row and hits.aligned.shape == (len(hits), len(row))


def test_a_set_that_begins_with_such_rows_is_built_and_searched(
    families: list[Record], tmp_path: Path
) -> None:
    rows = [Record(f"low{i}", s) for i, s in enumerate([*letters(10), *LOW])]
    made = build_reference([*rows, *families], tmp_path / "mixed")
    plain = build_reference(families, tmp_path / "plain")
    few, many = rows[3].sequence, families[1].sequence
    low, natural = search([few, many], made, quiet=True)
    (expected,) = search([many], plain, quiet=True)
    assert low.query == few and (low.keys < len(rows)).all()  # MMseqs2 masks repeats: none may be found
    assert len(expected) >= 4 and natural.ids[: len(expected)] == expected.ids
    assert (natural.keys[: len(expected)] == expected.keys + len(rows)).all()


def test_clusters_and_leakage_take_such_rows_for_proteins(families: list[Record]) -> None:
    near = [mutated(families[0].sequence, 0.8, seed) for seed in range(6)]
    sequences = [*letters(10), *near]
    groups, _ = cluster(sequences, identity=0.5)
    assert len(set(groups[10:].tolist())) == 1
    places = np.arange(len(sequences))
    told = leakage(sequences, places[:-3], places[-3:])
    assert told["share_over_50"] == 1.0


def test_nucleotides_are_clustered_as_such() -> None:
    rows = letters(12, seed=3)
    sequences = rows + [s[:-1] for s in rows]
    groups, _ = cluster(sequences, identity=0.8, alphabet="dna")
    assert (groups[:12] == groups[12:]).all() and len(set(groups.tolist())) == 12
    told = leakage(sequences, np.arange(12), np.arange(12, 24), alphabet="dna")
    assert told["share_over_50"] == 1.0
    rna = [s.replace("T", "U") for s in sequences]
    assert leakage(rna, np.arange(12), np.arange(12, 24), alphabet="rna")["share_over_50"] == 1.0


def test_a_table_of_dna_is_split_by_its_own_clusters(tmp_path: Path) -> None:
    rows = letters(40, seed=4)
    table = ["sequence,y", *(f"{s[:-cut] if cut else s},{n}" for n, s in enumerate(rows) for cut in (0, 1))]
    (tmp_path / "dna.csv").write_text("\n".join(table) + "\n")
    labels = read_labels(tmp_path / "dna.csv", ["y"], task="regression", alphabet=dna())
    split = make_split(labels, SplitSettings(kind="cluster", identity=0.8))
    assert split.how["clusters"] == 40 and split.how["leakage"]["share_over_50"] == 0.0


def test_a_file_of_dna_is_no_reference_set(
    families: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(name: str, sequences: list[str]) -> str:
        path = tmp_path / f"{name}.fasta"
        path.write_text("".join(f">{i}\n{s}\n" for i, s in enumerate(sequences)))
        return str(path)

    natural = [r.sequence for r in families[:6]]
    dna = written("dna", [s.lower() for s in letters(10, of="ACGTN")] + natural)
    with pytest.raises(ReferenceSetError, match=r"10 of the 16 sequences .* nucleotides") as error:
        command.main(["build", dna, "-o", str(tmp_path / "set")])
    assert "ranslate" in str(error.value) and not (tmp_path / "set").exists()
    mixed = written("mixed", letters(6) + natural)
    assert command.main(["build", mixed, "-o", str(tmp_path / "set")]) == 0
    assert len(open_reference(tmp_path / "set")) == 12

"""`bioseq predict --translate`: coding sequences in, predictions of their proteins out, with coordinates of both."""

import csv
import json
from pathlib import Path

import pytest
from Bio.Seq import Seq

import bioseq
from bioseq.cli import main
from bioseq.errors import SequenceError
from bioseq.sequences.fasta import Record, read_fasta
from bioseq.sequences.translation import coded

CODON = dict(
    zip(
        "ACDEFGHIKLMNPQRSTVWY",
        [
            "GCT",
            "TGT",
            "GAT",
            "GAA",
            "TTT",
            "GGT",
            "CAT",
            "ATT",
            "AAA",
            "CTG",
            "ATG",
            "AAT",
            "CCG",
            "CAG",
            "CGT",
            "TCT",
            "ACT",
            "GTT",
            "TGG",
            "TAT",
        ],
    )
)
SAMPLE = Path(bioseq.__file__).parent / "sample" / "proteins.fasta"


@pytest.mark.parametrize("mode", ["one", "six"])
def test_the_bases_named_code_for_the_protein(mode):
    dna = "ATGGCCATTGTAATGGGCCGCGAAAGGGTGCCCGATAG" + ("" if mode == "one" else "ATTGACCTAACG")
    made = list(coded(Record("gene", dna, "f:1"), mode, 1))
    assert len(made) == (1 if mode == "one" else 6)
    for product in made:
        bases = Seq(dna[product.first - 1 : product.last])
        if product.strand == "-":
            bases = bases.reverse_complement()
        assert str(bases.translate()) == product.sequence and "*" not in product.sequence
        i = len(product.sequence)  # the last residue's codon by the documented rule
        first, last = product.first + 3 * (i - 1), product.last - 3 * (i - 1)
        codon = (
            dna[first - 1 : first + 2]
            if product.strand == "+"
            else str(Seq(dna[last - 3 : last]).reverse_complement())
        )
        assert str(Seq(codon).translate()) == product.sequence[-1]


def test_a_stop_at_the_end_is_outside_and_frames_of_stops_give_nothing():
    (one,) = coded(Record("g", "ATGAAATAA"), "one", 1)
    assert (one.sequence, one.first, one.last) == ("MK", 1, 6)
    assert [c.id for c in coded(Record("g", "TAATAA"), "six", 1)] == ["g/+2", "g/+3", "g/-1", "g/-2", "g/-3"]
    (fault,) = coded(Record("g", "ATG!AA"), "six", 1)
    assert isinstance(fault, SequenceError) and "g" in str(fault)


@pytest.fixture(scope="module")
def genes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genes")
    proteins = sorted(read_fasta(SAMPLE), key=lambda r: len(r.sequence))[:2]
    (folder / "p.fasta").write_text("".join(f">{r.id}\n{r.sequence}\n" for r in proteins))
    dna = "".join(f">{r.id}\n{''.join(CODON[a] for a in r.sequence)}TAA\n" for r in proteins)
    (folder / "g.fasta").write_text(dna)
    return folder


def predict(*words) -> int:
    return main(["predict", *map(str, words), "--heads", "localization"])


def test_predictions_are_those_of_the_protein(genes, tmp_path):
    assert predict(genes / "p.fasta", "-o", tmp_path / "p.jsonl") == 0
    assert predict(genes / "g.fasta", "--translate", "one", "-o", tmp_path / "g.jsonl") == 0
    assert predict(genes / "g.fasta", "--translate", "one", "-o", tmp_path / "g.csv") == 0
    assert predict(genes / "g.fasta", "--translate", "one", "-o", tmp_path / "g.parquet") == 0
    theirs, ours = (
        [json.loads(x) for x in (tmp_path / f).read_text().splitlines()] for f in ("p.jsonl", "g.jsonl")
    )
    assert len(theirs) == len(ours) == 2
    lengths = [len(r.sequence) for r in read_fasta(genes / "p.fasta")]
    for a, b, n in zip(theirs, ours, lengths):
        place = {k: b.pop(k) for k in ("strand", "first_base", "last_base", "residues")}
        assert a == b and place == {"strand": "+", "first_base": 1, "last_base": 3 * n, "residues": n}
    with open(tmp_path / "g.csv") as handle:
        assert [int(row["last_base"]) for row in csv.DictReader(handle)] == [3 * n for n in lengths]
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "g.parquet")["last_base"].to_pylist() == [3 * n for n in lengths]


def test_bad_genes(genes, tmp_path, capsys):
    (tmp_path / "bad.fasta").write_text(">stop\nATGTAAATG\n" + (genes / "g.fasta").read_text())
    assert predict(tmp_path / "bad.fasta", "--translate", "one", "-o", tmp_path / "a.csv") == 1
    said = capsys.readouterr().err
    assert "'stop'" in said and "stop codon inside frame 1, at codon 2" in said
    assert not (tmp_path / "a.csv").exists()
    skip = ("--on-error", "skip", "-o", tmp_path / "a.csv")
    assert predict(tmp_path / "bad.fasta", "--translate", "one", *skip) == 0
    assert "1 records left out" in capsys.readouterr().err
    assert (
        predict(genes / "g.fasta", "--translate", "one", "--genetic-code", 7, "-o", tmp_path / "b.csv") == 1
    )
    assert "no genetic code 7" in capsys.readouterr().err

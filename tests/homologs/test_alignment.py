from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from bioseq.errors import AlignmentError
from bioseq.homologs.alignment import read_alignment, write_a3m
from bioseq.homologs.database import GAP
from bioseq.homologs.hits import encode
from bioseq.homologs.reference import ReferenceSet
from bioseq.homologs.search import search
from bioseq.sequences.fasta import Record

QUERY = "MKTAYIAK"
ROWS = ["MKSAYIAK", "--TAF-AK"]
A3M = ">q\nMKTAYIAK\n>a some words\nMKSAYggIAK\n>b\n--TAF-AK\n"
A2M = ">q\nMKTAY..IAK\n>a\nMKSAYggIAK\n>b\n--TAF..-AK\n"
FASTA = ">a\nMKSAYGGIAK\n>q\nMKTAY--IAK\n>b\n--TAF---AK\n"
STOCKHOLM = "# STOCKHOLM 1.0\n#=GF ID test\n\nq  MKTAY..IAK\na  MKSAYggIAK\n#=GR a SS  HHHHHHHHHH\nb  --TAF..-AK\n//\n"


@pytest.mark.parametrize(
    "text",
    [
        A3M,
        A2M,
        FASTA,
        STOCKHOLM,
        A3M.replace("\n", "\r\n"),
        "#A3M#\n" + A3M,
        "\ufeff" + A3M,
        "\ufeff" + STOCKHOLM,
    ],
)
def test_every_format_gives_the_same_columns(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows"
    path.write_text(text)
    (tmp_path / "rows.gz").write_bytes(gzip.compress(text.encode()))
    for file in (path, tmp_path / "rows.gz"):
        hits = read_alignment(file, QUERY)
        assert hits.query == QUERY and hits.ids == ("a", "b")
        expected = np.array([encode(r) for r in ROWS])
        expected[1, [0, 1, 5]] = GAP
        assert np.array_equal(hits.aligned, expected)
        assert hits.identity.tolist() == [7 / 8, 4 / 5] and hits.coverage.tolist() == [1.0, 5 / 8]


def test_hidden_residues_of_the_query_agree_with_any(tmp_path: Path) -> None:
    (tmp_path / "x.a3m").write_text(A3M)
    hits = read_alignment(tmp_path / "x.a3m", "MK<mask>AYIAK")
    assert hits.query == "MKXAYIAK" and hits.identity[0] == 1.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (A3M.replace("MKTAYIAK", "MKTAYIAR"), "none of its 3 rows is the query"),
        (A3M.replace("--TAF-AK", "--TAF-A"), "row 3 .'b'. has 7 columns"),
        (STOCKHOLM.replace("--TAF..-AK", "--TAF"), "unequal columns"),
        ("", "no sequence"),
        ("\n\n", "no sequence"),
        ("# STOCKHOLM 1.0\n//\n", "no sequence"),
        (">q\n\n>a\nMK\n", "row 1 is empty"),
        (">q\nMKTA1IAK\n", "not residues"),
        ("CLUSTAL W\n\nq MKT\n", "neither FASTA-like nor Stockholm"),
        (STOCKHOLM + STOCKHOLM, "not one whole Stockholm"),
        (STOCKHOLM.replace("HHHHHHHHHH", "HHHHHHHHHHHH"), "unequal columns"),  # a TypeError of the parser's
        (STOCKHOLM.replace("b  --", "//\nb  --"), "not one whole Stockholm"),  # an AssertionError
        (STOCKHOLM.replace("MKS", "MK\u00e9"), "not"),
    ],
)
def test_bad_alignments_are_told_without_residues(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "rows").write_text(text)
    with pytest.raises(AlignmentError, match=told) as error:
        read_alignment(tmp_path / "rows", QUERY)
    assert "MKT" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match="cannot be read"):
        read_alignment(tmp_path / "none.a3m", QUERY)
    (tmp_path / "cut.a3m.gz").write_bytes(gzip.compress(A3M.encode() * 50)[:60])
    with pytest.raises(AlignmentError, match="breaks off"):
        read_alignment(tmp_path / "cut.a3m.gz", QUERY)


def test_what_a_search_finds_survives_a3m(
    reference: ReferenceSet, families: list[Record], tmp_path: Path
) -> None:
    (hits,) = search([families[0]], reference, quiet=True)
    write_a3m(hits, tmp_path / "found.a3m", query_id="q")
    again = read_alignment(tmp_path / "found.a3m", families[0])
    assert again.ids[0] == families[0].id  # the query's own row is the first; its copy in the set stays
    assert np.array_equal(again.aligned, hits.aligned)
    assert again.identity == pytest.approx(hits.identity)

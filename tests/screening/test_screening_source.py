from __future__ import annotations

import gzip

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from screening_helpers import LIBRARY

from bioseq.errors import FastaError
from bioseq.sequences.fasta import read_fasta
from bioseq.sequences.translation import translated
from serving.screening import source
from serving.screening.index import IndexJob, sequence_hash


def all_records(paths, split_bytes):
    sizes = [source.identify(p)["bytes"] for p in paths]
    return [r for s in source.cut(paths, sizes, split_bytes) for r in source.records(s)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000))
def test_any_cut_gives_every_record_once_and_in_order(size):
    whole = [(r.id, r.sequence) for r in read_fasta(LIBRARY, allow_empty=True)]
    cut = all_records((str(LIBRARY), str(LIBRARY)), size * 20)
    assert [(r.id, r.sequence) for r in cut] == whole + whole


def test_gzip_is_one_split_and_equals_the_plain_file(tmp_path):
    packed = tmp_path / "library.fasta.gz"
    packed.write_bytes(gzip.compress(LIBRARY.read_bytes()))
    splits = source.cut((str(packed),), [packed.stat().st_size], 100)
    assert len(splits) == 1
    assert [r.sequence for r in source.records(splits[0])] == [
        r.sequence for r in read_fasta(LIBRARY, allow_empty=True)
    ]


def test_urls_are_read_by_byte_range():
    url = LIBRARY.as_uri()
    assert source.identify(url)["bytes"] == LIBRARY.stat().st_size
    whole = [r.sequence for r in read_fasta(LIBRARY, allow_empty=True)]
    assert [r.sequence for r in all_records((url,), 5000)] == whole


@pytest.mark.parametrize(
    "content, says", [(b"\x00\x01\x02" * 99, "first line"), (b"", "empty"), (b"ACDE\n>x\nA\n", "first line")]
)
def test_what_is_no_fasta_is_refused(tmp_path, content, says):
    path = tmp_path / "noise.fasta"
    path.write_bytes(content)
    with pytest.raises(FastaError, match=says):
        all_records((str(path),), 1 << 20)


def test_a_gzip_file_that_breaks_off_is_an_error(tmp_path):
    path = tmp_path / "half.fasta.gz"
    packed = gzip.compress(LIBRARY.read_bytes())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(FastaError, match="breaks off"):
        all_records((str(path),), 1 << 20)


@pytest.mark.parametrize("path", ["/nowhere/library.fasta", "s3://", "nothing://x/y"])
def test_missing_inputs_name_the_file(path):
    with pytest.raises(FastaError, match="Check the"):
        source.identify(path)


@pytest.mark.parametrize("size", [1 << 20, 4000])
def test_errors_name_file_line_and_position_in_whole_files_and_ranges(tmp_path, size):
    job = IndexJob(str(tmp_path), "protein", 2000)
    rows = []
    for split in source.cut((str(LIBRARY),), [LIBRARY.stat().st_size], size):
        for piece in job(split):
            rows += pq.read_table(piece["path"]).to_pylist()
    bad = {r["id"]: r["error"] for r in rows if r["error"]}
    lines = LIBRARY.read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.startswith(">illegal"))
    assert bad["illegal"].startswith(f"sequence.illegal_residue: library.fasta:{line}: record 'illegal': ")
    assert "position 31" in bad["illegal"]
    assert bad["no-residues"].startswith("sequence.empty: ")
    assert bad["A7E6F5"].startswith("sequence.too_long: ") and "2159" in bad["A7E6F5"]
    assert set(bad) == {"illegal", "no-residues", "stop-inside", "A7E6F5"}


def test_a_split_that_is_whole_is_not_read_again(tmp_path):
    path = tmp_path / "l.fasta"
    path.write_text(">a\nACDE\n>b\nacde*\n")
    (split,) = source.cut((str(path),), [path.stat().st_size])
    job = IndexJob(str(tmp_path), "protein", 100)
    first = list(job(split))
    path.write_text("gone")
    assert list(job(split)) == first
    rows = pq.read_table(first[0]["path"]).to_pylist()
    # lower case and a stop at the end are the same protein
    assert (
        (rows[0]["hash_high"], rows[0]["hash_low"])
        == (rows[1]["hash_high"], rows[1]["hash_low"])
        == sequence_hash("ACDE")
    )
    assert rows[1]["note"] == "stop codon '*' at the end dropped"


def test_translation_of_one_frame_and_six():
    # M K * in frame +1; the reverse strand reads TTATTTCAT: L F H
    assert [(s, p) for s, p, _ in translated("ATGAAATAA", "one", 1)] == [("", "MK*")]
    six = {s: p for s, p, _ in translated("atgaaauaa", "six", 1)}
    assert (six["/+1"], six["/-1"]) == ("MK", "LFH") and len(six) == 6
    assert [p for _, p, _ in translated("ATGTGA", "one", 2)] == ["MW"]  # TGA is tryptophan in mitochondria
    (_, fault, _) = next(translated("ATGTAAATG", "one", 1))
    assert "codon 2" in str(fault)
    (_, fault, _) = next(translated("ATG!", "one", 1))
    assert "illegal residue" in str(fault)
    assert len(list(translated("AT", "six", 1))) == 6


def test_six_frames_agree_with_a_direct_reading():
    from Bio.Seq import Seq

    dna = "ATGGCCATTGTAATGGGCCGCTGAAAGGGTGCCCGATAG"
    for suffix, protein, notes in translated(dna, "six", 1):
        strand, frame = suffix[1], int(suffix[2]) - 1
        template = Seq(dna) if strand == "+" else Seq(dna).reverse_complement()
        usable = template[frame : frame + (len(dna) - frame) // 3 * 3]
        stretches = str(usable.translate()).split("*")
        assert len(protein) == max(map(len, stretches)) and protein in stretches
        start = int(notes[0].split("nucleotide ")[1].split(",")[0]) - 1
        assert str(template[start : start + 3 * len(protein)].translate()) == protein

"""FASTA in: what is accepted, what is refused and where, byte ranges, memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioseq.errors import FastaError
from bioseq.sequences import fasta
from bioseq.sequences.fasta import Record, count_records, read_fasta, read_many

DATA = Path(__file__).parent.parent / "data"
SAMPLE = Path(fasta.__file__).parents[1] / "sample" / "proteins.fasta"


def write(folder: Path, content: bytes | str, name: str = "a.fasta") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs(path, **options):
    return [(r.id, r.sequence) for r in read_fasta(path, **options)]


def test_records_carry_id_sequence_and_place(tmp_path):
    path = write(tmp_path, "\n>one first protein\nMKV\nLA T\n\n>two\nGG\n")
    assert list(read_fasta(path)) == [
        Record("one", "MKVLAT", f"{path}:2"),
        Record("two", "GG", f"{path}:6"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        b">a x\r\nMK\r\nVL\r\n>b\r\nGG\r\n",
        b">a\nMKVL\n>b\nGG",
        b"\n\n>a\nMK\n\n  \nVL\n\n>b\nGG\n\n\n",
        b"\xef\xbb\xbf>a\nMKVL\n>b\nGG\n",
        b">a \xce\xb1-helix\nMK VL \n> b\nGG\n",
    ],
    ids=["crlf", "no-final-newline", "blank-lines", "byte-order-mark", "utf8-header"],
)
def test_harmless_forms_read_alike(tmp_path, content):
    assert pairs(write(tmp_path, content)) == [("a", "MKVL"), ("b", "GG")]


def test_lower_case_is_kept_for_the_alphabet_to_fold(tmp_path):
    assert pairs(write(tmp_path, ">a\nmkV\n")) == [("a", "mkV")]


def test_duplicate_and_missing_ids_are_kept_apart_by_position(tmp_path):
    assert pairs(write(tmp_path, ">a\nMK\n>a\nGG\n>\nLL\n>  \nVV\n")) == [
        ("a", "MK"),
        ("a", "GG"),
        ("", "LL"),
        ("", "VV"),
    ]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"", None, "empty"),
        (b"\n \n\n", None, "empty"),
        (b"\n\nid,sequence\n1,MK\n", 3, "not a FASTA file"),
        (b"MKVL\n>a\nMK\n", 1, "not a FASTA file"),
        (b"\x00\x01\x02\xff" * 50, 1, "not a FASTA file"),
        (b"BZh91AY&SY", 1, "bzip2"),
        (b"@read\nMK\n+\nII\n", 1, "FASTQ"),
        (b">a\nMK\n>b\n\n>c\nGG\n", 3, "record 'b' has no sequence"),
        (b">a\nMK\n>b", 3, "record 'b' has no sequence"),
        (b">a\nMK\n>b\nG\x00G\n", 4, "binary"),
        (b">a\nMK\nV\xff\xfeL\n", 3, "UTF-8"),
        (b">a\nMK\n;note\nVL\n", 3, "comment"),
        (b">a\rMK\r>b\rGG\n", 1, "carriage return"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, content, line, words):
    path = write(tmp_path, content)
    with pytest.raises(FastaError, match=words) as caught:
        list(read_fasta(path))
    assert caught.value.file == str(path)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_errors_never_show_a_sequence(tmp_path):
    secret = "MKWVTFISLLFLFSSAYS"
    for content in (f"{secret}\n", f">a\n{secret}\0\n", f">a\n{secret}\n;{secret}\n", f">a\n{secret}\n>b\n"):
        with pytest.raises(FastaError) as caught:
            list(read_fasta(write(tmp_path, content)))
        assert secret not in str(caught.value)


def test_records_before_the_fault_are_delivered_first(tmp_path):
    reader = read_fasta(write(tmp_path, ">a\nMK\n>b\nGG\n>c\n"))
    assert [next(reader).id, next(reader).id] == ["a", "b"]
    with pytest.raises(FastaError, match="'c'"):
        next(reader)


def test_a_caller_may_ask_for_empty_records(tmp_path):
    path = write(tmp_path, ">a\n>b\nGG\n>c\n")
    assert pairs(path, allow_empty=True) == [("a", ""), ("b", "GG"), ("c", "")]


def test_missing_file_folder_and_unreadable_file(tmp_path):
    with pytest.raises(FastaError, match="No such file"):
        list(read_fasta(tmp_path / "none.fasta"))
    with pytest.raises(FastaError, match="folder"):
        list(read_fasta(tmp_path))
    with pytest.raises(FastaError, match="folder"):
        count_records(tmp_path)


# gzip


def test_gzip_is_seen_by_its_bytes_whatever_its_name(tmp_path):
    plain = b">a\nMK\n>b\nGG\n"
    assert pairs(write(tmp_path, gzip.compress(plain))) == [("a", "MK"), ("b", "GG")]


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_bzip2_and_xz_are_read_too(tmp_path, pack):
    whole = pack(SAMPLE.read_bytes())
    assert pairs(write(tmp_path, whole)) == pairs(SAMPLE)
    with pytest.raises(FastaError, match="breaks off"):
        list(read_fasta(write(tmp_path, whole[: len(whole) // 2])))
    with pytest.raises(FastaError, match="byte ranges"):
        list(read_fasta(write(tmp_path, whole), start=3))


def test_gzip_of_several_members_is_one_file(tmp_path):
    path = write(tmp_path, gzip.compress(b">a\nMK\nV") + gzip.compress(b"L\n>b\nGG\n"))
    assert pairs(path) == [("a", "MKVL"), ("b", "GG")]
    assert count_records(path) == 2


def test_truncated_gzip_says_that_the_file_breaks_off_and_where(tmp_path):
    whole = gzip.compress(SAMPLE.read_bytes())
    path = write(tmp_path, whole[: len(whole) // 2])
    seen = []
    with pytest.raises(FastaError, match="breaks off after record") as caught:
        seen.extend(read_fasta(path))
    assert f"after record {len(seen)} ({seen[-1].id!r})" in str(caught.value)
    assert seen == [Record(r.id, r.sequence, s.source) for r, s in zip(read_fasta(SAMPLE), seen)]
    with pytest.raises(FastaError, match="breaks off"):
        count_records(path)


@pytest.mark.parametrize("keep", [2, 5, 12])
def test_gzip_that_ends_in_its_header(tmp_path, keep):
    path = write(tmp_path, gzip.compress(b">a\nMK\n")[:keep])
    with pytest.raises(FastaError, match="before the first whole record"):
        list(read_fasta(path))


def test_damaged_gzip_is_refused(tmp_path):
    whole = bytearray(gzip.compress(SAMPLE.read_bytes()))
    whole[-6] ^= 0xFF  # the checksum
    with pytest.raises(FastaError, match="damaged"):
        list(read_fasta(write(tmp_path, bytes(whole))))


def test_empty_gzip_is_an_empty_file(tmp_path):
    with pytest.raises(FastaError, match="empty"):
        list(read_fasta(write(tmp_path, gzip.compress(b""))))


# standard input and pipes


@pytest.mark.parametrize("packed", [False, True])
def test_standard_input(monkeypatch, packed):
    content = b">a\nMK\n>b\nGG\n"
    stream = io.TextIOWrapper(io.BytesIO(gzip.compress(content) if packed else content))
    monkeypatch.setattr(sys, "stdin", stream)
    assert list(read_fasta("-")) == [Record("a", "MK", "stdin:1"), Record("b", "GG", "stdin:3")]


def test_standard_input_faults_name_it(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(FastaError, match="stdin: the file is empty"):
        list(read_fasta("-"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b">a\nMK\n>b\n")))
    with pytest.raises(FastaError, match="stdin:3: "):
        list(read_fasta("-"))


def test_a_named_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(b">a\nMK\n"))
    writer.start()
    assert pairs(path) == [("a", "MK")]
    writer.join()


# byte ranges


def test_line_numbers_and_sources_of_a_range(tmp_path):
    path = write(tmp_path, ">a\nMK\n>b\nGG\n>c\n\n")
    assert list(read_fasta(path, start=1, end=7)) == [Record("b", "GG", f"{path}@6")]
    with pytest.raises(FastaError) as caught:
        list(read_fasta(path, start=8))
    assert caught.value.line == 5


def test_ranges_of_gzip_are_refused_but_the_whole_is_fine(tmp_path):
    path = write(tmp_path, gzip.compress(b">a\nMK\n>b\nGG\n"))
    assert pairs(path, start=0, end=path.stat().st_size) == [("a", "MK"), ("b", "GG")]
    with pytest.raises(FastaError, match="byte ranges"):
        list(read_fasta(path, start=3))


def ranges(path: Path, size: int) -> list[tuple[int, int]]:
    total = path.stat().st_size
    return [(at, min(at + size, total)) for at in range(0, total, size)]


record_texts = st.lists(
    st.tuples(
        st.text("ab>; \t", max_size=4),  # a '>' inside a header is no header
        st.lists(st.text("MKVLAG", min_size=1, max_size=7), min_size=1, max_size=3),
        st.integers(0, 2),  # blank lines after it
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(record_texts, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.data())
def test_any_cut_of_a_file_gives_each_record_once_and_in_order(
    tmp_path_factory, records, newline, final_newline, data
):
    text = ""
    for header, lines, blank in records:
        text += f">{header}{newline}" + newline.join(lines) + newline * (1 + blank)
    if not final_newline:
        text = text.rstrip("\r\n")
    path = tmp_path_factory.mktemp("cut") / "a.fasta"
    path.write_bytes(text.encode())
    whole = pairs(path)
    assert [s for _, s in whole] == ["".join(lines) for _, lines, _ in records]
    size = len(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=6)))
    edges = [0, *cuts, size]
    cut = [r for a, b in zip(edges, edges[1:]) for r in pairs(path, start=a, end=b)]
    assert cut == whole
    step = data.draw(st.integers(1, size))
    assert [r for a, b in ranges(path, step) for r in pairs(path, start=a, end=b)] == whole


def test_ranges_of_the_real_sample_are_exact():
    whole = pairs(SAMPLE)
    for size in (97, 4096, 10**7):
        assert [r for a, b in ranges(SAMPLE, size) for r in pairs(SAMPLE, start=a, end=b)] == whole


# helpers, the parser's stand-in, memory


def test_count_and_read_many(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf>a >x\nMK\n>\nGG")
    assert count_records(path) == 2
    assert count_records(SAMPLE) == len(list(read_fasta(SAMPLE))) == 300
    assert [r.id for r in read_many([path, path])] == ["a", "", "a", ""]


def test_count_does_not_miss_a_header_at_a_chunk_edge(tmp_path, monkeypatch):
    path = write(tmp_path, ">a\nMK\n>b\nGG\n>c\nLL\n")
    for chunk in range(2, 12):
        monkeypatch.setattr(fasta, "_CHUNK", chunk)
        assert count_records(path) == 3


def test_without_biopython_the_same_records_come(monkeypatch):
    with_biopython = list(read_fasta(DATA / "proteins_30_1000.fasta"))
    monkeypatch.setitem(sys.modules, "Bio.SeqIO.FastaIO", None)
    assert fasta._parser() is fasta._plain_parser
    assert list(read_fasta(DATA / "proteins_30_1000.fasta")) == with_biopython
    assert len(with_biopython) == 64


MEASURE = """
import resource, sys
from bioseq.sequences.fasta import read_fasta
count = sum(1 for _ in read_fasta(sys.argv[1]))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(path: Path) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    count, kilobytes = done.stdout.split()
    return int(count), int(kilobytes)


def _memory_is_flat(tmp_path: Path, few: int, many: int) -> None:
    small, large = tmp_path / "small.fasta", tmp_path / "large.fasta.gz"
    record = ">r{} some words\n" + "MKVLAGTREW" * 6 + "\n" + "GHILKMFPST" * 6 + "\n"
    small.write_text("".join(record.format(i) for i in range(few)))
    with gzip.open(large, "wt", compresslevel=1) as handle:
        for at in range(0, many, 10_000):
            handle.write("".join(record.format(i) for i in range(at, at + 10_000)))
    count_small, peak_small = peak(small)
    count_large, peak_large = peak(large)
    assert (count_small, count_large) == (few, many)
    # 10,000 records held would already be more than 3 MiB.
    assert peak_large - peak_small < 6 * 1024


def test_memory_does_not_grow_with_the_file(tmp_path):
    _memory_is_flat(tmp_path, 1_000, 100_000)


@pytest.mark.long
def test_a_million_records_in_flat_memory(tmp_path):
    _memory_is_flat(tmp_path, 1_000, 1_000_000)

"""`bioseq embed` as users run it, and every bad input that must end with exit 1 and nothing written."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bioseq
from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.cli import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(0), std=0.1)
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    save_backbone(
        path, encoder, name="tiny", card="# tiny\n", evidence={}, data_hash=None, seed=0, licence="CC0-1.0"
    )
    return str(path)


def embed(bundle: str, *args: object) -> int:
    return main(["embed", *map(str, args), "--model", bundle])


def test_parquet_npz_and_csv_hold_what_the_library_gives(bundle: str, data: Path, tmp_path: Path) -> None:
    fasta = data / "valid_orphan_25.fasta"
    records = list(bioseq.read_fasta(fasta))
    expected = bioseq.load(bundle).embed(records)
    for ending in ("parquet", "npz", "csv"):
        assert embed(bundle, fasta, "-o", tmp_path / f"e.{ending}") == 0
    table = pq.read_table(tmp_path / "e.parquet")
    column = table["embedding"]
    assert pa.types.is_fixed_size_list(column.type) and column.type.list_size == 64
    assert table["id"].to_pylist() == [r.id for r in records]
    np.testing.assert_allclose(np.array(column.to_pylist(), dtype=np.float32), expected, rtol=1e-5, atol=1e-6)
    arrays = np.load(tmp_path / "e.npz")
    assert arrays["ids"].tolist() == [r.id for r in records]
    np.testing.assert_allclose(arrays["embeddings"], expected, rtol=1e-5, atol=1e-6)
    rows = list(csv.reader(open(tmp_path / "e.csv")))  # noqa: SIM115
    assert len(rows) == 26 and rows[0][:3] == ["id", "length", "e0"]
    np.testing.assert_allclose(np.array(rows[1][2:], dtype=float), expected[0], rtol=1e-5, atol=1e-6)


def test_chunks_do_not_change_the_table(bundle: str, data: Path, tmp_path: Path) -> None:
    fasta = data / "valid_orphan_25.fasta"
    assert embed(bundle, fasta, "-o", tmp_path / "a.npz", "--chunk", 7) == 0
    assert embed(bundle, fasta, "-o", tmp_path / "b.npz") == 0
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert a["ids"].tolist() == b["ids"].tolist()
    np.testing.assert_allclose(a["embeddings"], b["embeddings"], rtol=1e-5, atol=1e-6)


def test_per_residue_and_layers(bundle: str, data: Path, tmp_path: Path) -> None:
    fasta = tmp_path / "two.fasta"
    fasta.write_text(">a\nMKTAYIAK\n>b\nGAVLI\n")
    assert embed(bundle, fasta, "-o", tmp_path / "r.npz", "--per-residue", "--layers", "0,-1") == 0
    arrays = np.load(tmp_path / "r.npz")
    assert arrays["lengths"].tolist() == [8, 5] and arrays["embeddings"].shape == (2, 13, 64)
    assert embed(bundle, fasta, "-o", tmp_path / "r.parquet", "--per-residue") == 0
    table = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert table[1]["shape"] == [5, 64]
    np.testing.assert_allclose(
        np.array(table[1]["embedding"], dtype=np.float32).reshape(5, 64),
        arrays["embeddings"][1, 8:],
        rtol=1e-5,
    )


def test_standard_input_and_output(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b">x first\nMKT\n>x again\nMKV\n")))
    assert embed(bundle, "-", "-o", "-") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["id", "x", "x"]  # doubled ids are kept
    assert "id," not in err


def gz(text: bytes) -> bytes:
    return gzip.compress(text)


GOOD = b">a\nMKTAYIAKQR\n"
BAD = {
    "empty file": (b"", "x.fasta"),
    "no fasta": (b"id,sequence\na,MKT\n", "x.fasta"),
    "record without sequence": (GOOD + b">b\n>c\nMKT\n", "b"),
    "illegal character": (GOOD + b">b\nMKT1AY\n", "position 4"),
    "binary noise": (bytes(range(256)) * 4, "x.fasta"),
    "noise after a record": (GOOD + b">b\nMK\x00\x01\x02\n", "x.fasta"),
    "truncated gzip": (gz(GOOD * 500)[:-30], "breaks off"),
    "over the limit": (GOOD + b">long\n" + b"A" * 1023 + b"\n", "1023 residues; the limit is 1022"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_ends_with_exit_1_and_nothing_written(
    fault: str, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, told = BAD[fault]
    fasta = tmp_path / "x.fasta"
    fasta.write_bytes(content)
    out = tmp_path / "out"
    out.mkdir()
    assert embed(bundle, fasta, "-o", out / "e.parquet") == 1
    assert list(out.iterdir()) == []
    message = capsys.readouterr().err
    assert message.strip().splitlines()[-1].startswith("bioseq: error: ")
    assert told in message and "MKTAY" not in message


def test_the_illegal_character_is_named_by_record_line_and_position(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_text(">a\nMKT\n>b some words\nMK\nT1\n")
    assert embed(bundle, fasta, "-o", tmp_path / "e.parquet") == 1
    message = capsys.readouterr().err
    assert "x.fasta:3" in message and "'b'" in message and "position 4" in message and "'1'" in message


def test_skip_reports_and_goes_on(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_text(">a\nMKT\n>b\nMK1\n>c\n>d\n" + "A" * 1023 + "\n>e\nMKV\n")
    assert embed(bundle, fasta, "-o", tmp_path / "e.npz", "--on-error", "skip") == 0
    assert np.load(tmp_path / "e.npz")["ids"].tolist() == ["a", "e"]
    message = capsys.readouterr().err
    assert message.count("left out:") == 3 and "3 records left out" in message


def test_all_bad_is_an_error_under_skip_too(bundle: str, tmp_path: Path) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_text(">b\nMK1\n")
    assert embed(bundle, fasta, "-o", tmp_path / "e.npz", "--on-error", "skip") == 1
    assert not (tmp_path / "e.npz").exists()


def test_nothing_is_overwritten_silently(bundle: str, tmp_path: Path) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_bytes(GOOD)
    out = tmp_path / "e.csv"
    out.write_text("mine")
    assert embed(bundle, fasta, "-o", out) == 1 and out.read_text() == "mine"
    assert embed(bundle, fasta, "-o", out, "--force") == 0 and out.read_text().startswith("id,")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_that_cannot_be_written(bundle: str, tmp_path: Path) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_bytes(GOOD)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert embed(bundle, fasta, "-o", closed / "e.csv") == 1


def test_a_file_where_the_folder_should_be(bundle: str, tmp_path: Path) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_bytes(GOOD)
    assert embed(bundle, fasta, "-o", fasta / "e.csv") == 1


def test_a_full_disk_leaves_nothing_under_the_final_name(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device that is always full stands for the disk: every write to it fails with ENOSPC."""
    fasta = tmp_path / "x.fasta"
    fasta.write_bytes(GOOD)
    with pytest.raises(OSError) as full, open("/dev/full", "wb", buffering=0) as handle:
        handle.write(b"x")
    assert full.value.errno == errno.ENOSPC
    out = tmp_path / "out"
    import bioseq.commands.embed as command

    real = command._write_csv

    def on_a_full_disk(rows, path, args):  # type: ignore[no-untyped-def]
        real(rows, Path("/dev/full"), args)

    monkeypatch.setattr(command, "_write_csv", on_a_full_disk)
    assert embed(bundle, fasta, "-o", out / "e.csv") == 1
    assert list(out.iterdir()) == []
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["x.fasta"], ["x.fasta", "-o", "y.csv", "--pooling", "median"]])
def test_wrong_use_is_exit_2(args: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["embed", *args])
    assert caught.value.code == 2


def test_unknown_command_and_no_command() -> None:
    assert main(["fly"]) == 2 and main([]) == 2 and main(["--version"]) == 0


def test_unknown_model_names_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_bytes(GOOD)
    assert main(["embed", str(fasta), "-o", str(tmp_path / "e.csv"), "--model", "no-such-model"]) == 1
    assert "no-such-model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["embed", "score", "scan", "predict", "models", "pretrain", "finetune", "serve",
                                     "screen", "report", "jobs", "keys"])  # fmt: skip
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sys.exit(main([command, "-h"]))
    assert caught.value.code == 0
    assert "example" in capsys.readouterr().out.lower()


def test_a_plain_backbone_reads_no_homologs(bundle: str, data: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    call = (data / "valid_orphan_25.fasta", "-o", tmp_path / "e.npz")
    assert embed(bundle, *call, "--homologs", "default") == 1
    assert "does not read homologs" in capsys.readouterr().err
    assert not (tmp_path / "e.npz").exists()
    assert embed(bundle, *call, "--homologs", "none") == 0

"""`bioseq vectors` as users run it, and bad input that ends with exit 1 and nothing written."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import bioseq
from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.cli import main


def make(folder: Path, seed: int) -> str:
    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(seed), std=0.1)
    save_backbone(folder, encoder, name="tiny", card="# tiny\n", evidence={}, licence="CC0-1.0")
    return str(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("bundle") / "tiny", 0)


def vectors(bundle: str, *args: object) -> int:
    return main(["vectors", *map(str, args), "--model", bundle])


@pytest.fixture()
def store(bundle: str, data: Path, tmp_path: Path) -> Path:
    assert vectors(bundle, "add", tmp_path / "store", data / "valid_orphan_25.fasta") == 0
    return tmp_path / "store"


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t"))


def test_what_was_added_is_found_first_and_not_embedded_again(
    bundle: str, data: Path, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta = data / "valid_orphan_25.fasta"
    records = list(bioseq.read_fasta(fasta))
    assert vectors(bundle, "add", tmp_path / "other", fasta) == 0
    assert "25 proteins, 25 of them embedded" in capsys.readouterr().err
    assert vectors(bundle, "add", store, fasta) == 0
    assert "25 proteins, 0 of them embedded" in capsys.readouterr().err
    assert vectors(bundle, "search", store, fasta, "-k", 3, "-o", tmp_path / "n.tsv") == 0
    rows = read(tmp_path / "n.tsv")
    assert len(rows) == 75 and [r["hit"] for r in rows[::3]] == [r.id for r in records]
    expected = bioseq.load(bundle).embed(records)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    second = np.sort(unit @ unit.T, axis=1)[:, -2]
    np.testing.assert_allclose([float(r["similarity"]) for r in rows[1::3]], second, atol=2e-5)
    assert main(["vectors", "info", str(store), "--check"]) == 0
    assert "vectors: 25 (all checksums are right)" in capsys.readouterr().out


def table(path: Path, records: list, labels: list[str]) -> Path:
    with open(path, "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["id", "sequence", "family"])
        out.writerows([r.id, r.sequence, label] for r, label in zip(records, labels))
    return path


def test_labels_come_with_a_reliability_and_homologs_beside(
    bundle: str, data: Path, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = list(bioseq.read_fasta(data / "valid_orphan_25.fasta"))
    labels = table(tmp_path / "t.csv", records, ["a" if n % 2 else "b" for n in range(25)])
    out = tmp_path / "l.tsv"
    asked = ("annotate", store, data / "valid_orphan_25.fasta", "--labels", labels, "--column", "family")
    assert vectors(bundle, *asked, "-o", out) == 0
    rows = read(out)
    assert [r["nearest"] for r in rows] == [r.id for r in records]
    assert all(0 < float(r["reliability"]) < 1 for r in rows)
    found = [r for r in rows if r["homolog"]]
    assert len(found) > 20 and all(
        r["homolog"] == r["query"] and r["homolog_label"] == r["label"] for r in found
    )
    told = capsys.readouterr().err
    assert "held-back pairs: 25" in told and "at the same coverage" in told


def test_bad_tables_are_refused_and_nothing_is_written(
    bundle: str, data: Path, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = list(bioseq.read_fasta(data / "valid_orphan_25.fasta"))
    twice = table(tmp_path / "twice.csv", [*records, records[4]], [*"ab" * 12, "a", "b"])
    few = table(tmp_path / "few.csv", records[:5], list("ababa"))
    for path, column, message in (
        (few, "colour", "no column colour"),
        (twice, "family", "two labels in family. (row 26; 1 in all)"),
        (few, "family", "5 labelled proteins; 20 are needed"),
        (tmp_path / "none.csv", "family", "cannot read"),
    ):
        out = tmp_path / "out.tsv"
        asked = (store, data / "valid_orphan_25.fasta", "--labels", path, "--column", column, "-o", out)
        assert vectors(bundle, "annotate", *asked, "--no-homologs") == 1
        assert message in capsys.readouterr().err and not out.exists()


def test_another_model_and_a_missing_store_are_refused(
    data: Path, tmp_path: Path, store: Path, bundle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta, out = data / "valid_orphan_25.fasta", tmp_path / "n.tsv"
    assert vectors(make(tmp_path / "other", 1), "search", store, fasta, "-o", out) == 1
    assert "weights_hash" in capsys.readouterr().err
    assert vectors(bundle, "search", tmp_path / "nothing", fasta, "-o", out) == 1
    assert "is not a vector store" in capsys.readouterr().err
    out.write_text("kept")
    assert vectors(bundle, "search", store, fasta, "-o", out) == 1
    assert out.read_text() == "kept"
    bad = tmp_path / "bad.fasta"
    bad.write_text(">a\nMKT1\n")
    assert vectors(bundle, "add", tmp_path / "new", bad) == 1
    assert "position 4" in capsys.readouterr().err and len(bioseq.vectors(tmp_path / "new")) == 0


@pytest.mark.parametrize("more", [[], ["--per-residue"], ["--layers", "0,-1"]])
def test_embed_reads_a_store_and_adds_to_it(
    bundle: str, data: Path, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta = str(data / "valid_orphan_25.fasta")
    plain, first, again = (tmp_path / f"{n}.npz" for n in ("plain", "first", "again"))
    through = ["--vectors", str(tmp_path / "kept")]
    assert main(["embed", fasta, "-o", str(plain), *more, "--model", bundle]) == 0
    assert main(["embed", fasta, "-o", str(first), *more, *through, "--model", bundle]) == 0
    from bioseq.inference.predictor import Predictor

    def run(self: Predictor, queries: list[object]) -> list[object]:
        assert not queries, "embedded twice"
        return []

    monkeypatch.setattr(Predictor, "run", run)
    assert main(["embed", fasta, "-o", str(again), *more, *through, "--model", bundle]) == 0
    with np.load(plain) as a, np.load(first) as b, np.load(again) as c:
        assert a["embeddings"].shape == b["embeddings"].shape
        np.testing.assert_allclose(a["embeddings"], b["embeddings"], atol=1e-5)
        np.testing.assert_array_equal(b["embeddings"], c["embeddings"])
    assert len(bioseq.vectors(tmp_path / "kept")) == 25


def test_embed_refuses_a_store_of_other_settings(
    bundle: str, data: Path, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.npz"
    given = ["embed", str(data / "valid_orphan_25.fasta"), "-o", str(out), "--vectors", str(store)]
    assert main([*given, "--pooling", "max", "--model", bundle]) == 1
    assert "pooling 'mean', asked 'max'" in capsys.readouterr().err and not out.exists()
    assert main([*given, "--per-residue", "--layers", "0,-1", "--model", bundle]) == 1
    assert main([*given, "--server", "http://127.0.0.1:1"]) == 1

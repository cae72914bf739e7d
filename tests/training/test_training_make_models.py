"""`make models` on a miniature of the data folder: backbone, check figures, and the second, resumed call."""

from __future__ import annotations

import gzip
import lzma
import shutil
from pathlib import Path

import pytest

import bioseq
from bioseq.bundles.bundle import open_bundle
from training.release.make_models import main

SMALL = ("steps=6", "model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.d_ff=64", "crop=62",
         "tokens_per_step=512", "micro_tokens=512", "schedule.warmup=1", "schedule.decay=2", "eval.every=3",
         "eval.proteins=3", "eval.final_proteins=3", "eval.final_passes=1", "checkpoint_every=3")  # fmt: skip


def test_backbone_from_data_and_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    source = tmp_path / "data"
    source.mkdir()
    sequences = [r.sequence for r in bioseq.read_fasta(data / "proteins_30_1000.fasta")]
    with lzma.open(source / "swissprot_train.txt.xz", "wt") as handle:
        handle.write("".join(s + "\n" for s in sequences))
    with lzma.open(source / "swissprot_train.clusters.xz", "wt") as handle:
        handle.write("".join(f"{i // 3}\n" for i in range(len(sequences))))
    for name in ("remote", "orphan"):
        with open(data / f"valid_{name}_25.fasta", "rb") as plain:
            with gzip.open(source / f"swissprot_valid_{name}.fasta.gz", "wb") as packed:
                shutil.copyfileobj(plain, packed)
    command = ["--data", str(source), "--out", str(tmp_path / "models"), "--work", str(tmp_path / "work")]
    command += ["--only", "backbone", *(word for s in SMALL for word in ("--set", s))]
    assert main(command) == 0
    bundle = open_bundle(tmp_path / "models" / "default")
    check = bundle.evidence()["check"]
    assert set(check) == {"remote", "orphan"} and all(c["proteins"] == 25 for c in check.values())
    assert f"{check['remote']['perplexity']:.3f}" in bundle.card()
    assert main(command) == 0  # everything is there: the same bundle comes out
    assert open_bundle(tmp_path / "models" / "default").read_tensors().keys() == bundle.read_tensors().keys()

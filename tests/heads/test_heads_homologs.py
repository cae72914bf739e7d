"""What homologs among the training rows say: honest while fitting, named when predicting, absent when asked."""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest
from heads_tables import write_table
from test_heads_scores import families

from bioseq.heads.head import Head
from bioseq.heads.homology import TrainingRows, transfer
from bioseq.heads.relatives import NEAR, Links
from bioseq.homologs.mmseqs import find_mmseqs
from bioseq.specs.finetune import FinetuneSpec

pytest.importorskip("sklearn", reason="the extra [train] is not installed")
from training.finetune import homologs
from training.finetune.run import finetune
from training.tables.labels import read_labels


def links(rows) -> Links:
    """From (query, training row, bits, identity)."""
    owner, keys, bits, identity = (np.array(c) for c in zip(*rows))
    return Links(int(owner.max()) + 1, owner, keys, bits.astype(float), identity, np.ones(len(keys)))


def test_transfer_weighs_labels_by_squared_bits_with_a_prior():
    y = np.array([[1.0], [0.0], [0.0], [np.nan]])
    hits = links([(0, 0, 100, 0.5), (0, 1, 50, 0.4), (0, 3, 500, 0.9), (1, 2, 1, 0.3)])
    block = transfer(hits, y, "binary", 1)
    share = (100**2 + 1000 / 3) / (100**2 + 50**2 + 1000)
    assert block[0, 0] == pytest.approx(np.log(share / (1 - share)), rel=1e-5)
    assert block[1, 0] == pytest.approx(np.log((1 / 3) / (2 / 3)), abs=2e-3)  # a weak hit says nothing
    assert block[0, 2] == pytest.approx(0.9) and block.shape == (2, 3)
    value = transfer(hits, np.array([[8.0], [2.0], [2.0], [4.0]]), "regression", 1)
    assert 3.9 < value[0, 0] < 4.5
    classes = transfer(hits, np.array([[2.0], [1.0], [0.0], [0.0]]), "multiclass", 3)
    assert classes.shape == (2, 5) and np.exp(classes[:, :3]).sum(1) == pytest.approx(np.ones(2), rel=1e-5)


def test_a_row_never_sees_its_own_label_nor_a_copys_nor_another_folds(tmp_path):
    rows = [{"sequence": s, "y": v} for s, v in (("ACDEF", 1), ("ACDEG", 1), ("ACDEH", 0))]
    labels = read_labels(write_table(tmp_path / "l.csv", rows), ["y"])
    hits = links([(0, 0, 300, 1.0), (0, 1, 200, 0.97), (0, 2, 100, 0.6), (1, 1, 300, 1.0), (2, 2, 300, 1.0)])
    assert hits.identity.max() > NEAR
    block = homologs.blocks(hits, labels, 1, own=True)
    # only row 2 may speak of row 0: its label is 0, below the mean of the rows
    assert block(np.arange(3))[0, 0] < np.log((2 / 3) / (1 / 3))
    without = block(np.array([0, 1]))
    assert without[0, -2] == 0 and without[0, -1] == 0  # row 2 is of another fold: nothing is left


@pytest.fixture(scope="module")
def proteins():
    found, family = families(24, 6, seed=2)
    return [
        {"id": f"p{i}", "sequence": s, "binds": f % 2, "cluster": f"c{i}"}
        for i, (s, f) in enumerate(zip(found, family))
    ]


def spec(tmp_path, backbone, rows, **options) -> FinetuneSpec:
    parts = ["train", "train", "train", "valid", "test", "test"]
    rows = [{**r, "set": parts[i % 6]} for i, r in enumerate(rows)]
    path = write_table(tmp_path / "t.csv", rows)
    settings = {
        "features": (),
        "models": ("linear",),
        "bootstrap": 40,
        "neighbours": 20,
        "output": str(tmp_path / "h"),
    }
    return FinetuneSpec(
        labels=str(path), targets=("binds",), base=str(backbone), threads=1, **(settings | options)
    )


@pytest.mark.skipif(find_mmseqs() is None, reason="MMseqs2 is not installed")
def test_relatives_teach_a_head_and_are_named_in_every_prediction(tmp_path, backbone, model, proteins):
    bundle = finetune(spec(tmp_path, backbone, proteins))
    evidence, head = bundle.evidence(), Head.load(bundle)
    # the label follows the family, which a random backbone cannot see
    assert "homology" in head.blocks and evidence["metrics"]["auroc"] > 0.95
    assert evidence["baselines"]["homology_transfer"]["auroc"] > 0.9
    assert evidence["gains"]["nearest_1"]["low"] > 0 if "nearest_1" in evidence["gains"] else True
    assert evidence["homologs"]["share_with_homologs"] > 0.9 and "## Homologs" in bundle.card()
    model.heads.clear()
    model.load_head("h", head)
    fresh = [r["sequence"] for i, r in enumerate(proteins) if i % 6 == 4]
    predictions = [p["h"] for p in model.predict(fresh, ["h"])]
    labels = {r["id"]: str(r["binds"]) for r in proteins}
    for i, p in enumerate(predictions):
        (near,) = p["nearest"]
        assert int(near["id"][1:]) // 6 == i and near["label"] == labels[near["id"]]  # of the same family
        assert 0.4 < near["identity"] < 0.95 and 0.5 < near["coverage"] <= 1
        assert near["id"] in near["text"] and "identical over" in near["text"]
        assert p["homologs"]["number"] >= 1 <= p["homologs"]["effective"]
    text = json.dumps(predictions)
    assert not any(r["sequence"][:30] in text for r in proteins)
    alone = model.predict(fresh[:1], ["h"])[0]["h"]
    assert alone["nearest"] == predictions[0]["nearest"]
    assert alone["probabilities"]["1"] == pytest.approx(predictions[0]["probabilities"]["1"], abs=1e-5)


def test_confidential_sequences_stay_out_of_the_bundle(tmp_path, backbone, proteins):
    bundle = finetune(spec(tmp_path, backbone, proteins, homologs="none"))
    files = [f for f in bundle.path.rglob("*") if f.is_file()]
    for file in files:
        data = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        assert not any(r["sequence"].encode() in data for r in proteins), file
    assert "holds no training sequence" in bundle.card() and Head.load(bundle).rows is None


def test_variants_are_compared_place_by_place(tmp_path):
    from bioseq.homologs.reference import build_reference
    from bioseq.sequences.fasta import Record

    records = [
        Record("wt", "MKTAYIAKQR", "t"),
        Record("A4G", "MKTGYIAKQR", "t"),
        Record("far", "MPPPYIAKQR", "t"),
    ]
    reference = build_reference(records, tmp_path / "r")
    rows = TrainingRows(
        reference, [r.id for r in records], np.array([[1.0], [2.5], [0.1]]), "regression", ["y"], "nM", True
    )
    found = rows.evidence(rows.links(["MKTGYIAKQK", "MKT"]))
    assert found[0]["nearest"][0]["id"] == "A4G" and found[0]["nearest"][0]["identity"] == pytest.approx(0.9)
    assert found[0]["nearest"][0]["text"] == "A4G: 90% identical over 100% of this sequence; measured 2.5 nM"
    # every training row is a homolog of every variant: a number of them would say nothing
    assert found[1]["nearest"] == [] and found[0]["homologs"] is None and found[1]["homologs"] is None

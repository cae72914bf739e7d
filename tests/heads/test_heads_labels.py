"""Label tables: what is read, and that every fault names its rows."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from heads_tables import table, write_table

from bioseq.errors import TableError
from training.tables.labels import TEST, TRAIN, VALID, read_labels, without_unlabelled
from training.tables.residue_labels import read_residues


def test_tasks_are_guessed_from_the_labels(tmp_path):
    path = write_table(tmp_path / "t.csv", table(30))
    assert read_labels(path, ["k"]).task == "regression"
    assert read_labels(path, ["k", "w"]).y.shape == (30, 2)
    assert read_labels(path, ["many_k"]).classes == ("0", "1")
    assert read_labels(path, ["many_k", "many_w"]).task == "multilabel"
    kinds = read_labels(path, ["kind"])
    assert (kinds.task, kinds.classes) == ("multiclass", ("k", "none", "w"))
    assert read_labels(path, ["many_k"], task="regression").classes == ()


def test_csv_tsv_gzip_and_parquet_read_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = table(20)
    rows[3]["k"] = ""
    first = read_labels(write_table(tmp_path / "a.csv", rows), ["k"])
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    write_table(tmp_path / "c.tsv", rows, "\t")
    pq.write_table(
        pa.Table.from_pylist([{**r, "k": None if r["k"] == "" else r["k"]} for r in rows]),
        tmp_path / "d.parquet",
    )
    for name in ("b.csv.gz", "c.tsv", "d.parquet"):
        other = read_labels(tmp_path / name, ["k"])
        np.testing.assert_array_equal(first.y, other.y)
        assert first.sequences == other.sequences and first.ids == other.ids
    assert np.isnan(first.y[3, 0]) and np.isnan(first.y).sum() == 1
    assert first.data_hash == read_labels(tmp_path / "b.csv.gz", ["k"]).data_hash


def test_set_and_validation_columns(tmp_path):
    rows = table(20)
    for i, r in enumerate(rows):
        r["set"], r["validation"] = ("test" if i >= 15 else "train"), ("True" if 10 <= i < 15 else "")
    part = read_labels(write_table(tmp_path / "t.csv", rows), ["k"]).part
    assert part.tolist() == [TRAIN] * 10 + [VALID] * 5 + [TEST] * 5
    rows[17]["validation"] = "True"
    with pytest.raises(TableError, match=r"row 18;"):
        read_labels(write_table(tmp_path / "u.csv", rows), ["k"])


def test_mutant_notation_needs_and_checks_its_wild_type(tmp_path):
    rows = [{"mutant": "A1G", "y": 1.0}, {"mutant": "C2D:D3E", "y": 2.0}, {"mutant": "WT", "y": 0.5}]
    path = write_table(tmp_path / "t.csv", rows)
    labels = read_labels(path, ["y"], wild_type="ACDE")
    assert labels.sequences == ["GCDE", "ADEE", "ACDE"] and labels.ids == ["A1G", "C2D:D3E", "WT"]
    rows[1]["mutant"] = "W2D"
    with pytest.raises(TableError, match=r"has C at position 2.*row 2;"):
        read_labels(write_table(tmp_path / "u.csv", rows), ["y"], wild_type="ACDE")


def change(rows, at, **cells):
    for i in at:
        rows[i] = {**rows[i], **cells}
    return rows


@pytest.mark.parametrize(
    "edit, targets, words",
    [
        (lambda r: r, ["nothing"], "no column 'nothing'"),
        (lambda r: change(r, [4, 7], k="high"), ["k"], r"no numbers \(rows 5, 8; 2 in all\)"),
        (lambda r: change(r, [4], k="inf"), ["k"], r"no numbers \(row 5;"),
        (lambda r: change(r, range(30), many_k=1), ["many_k"], "one class only"),
        (lambda r: change(r, range(30), many_k=1), ["many_k", "many_w"], "'many_k' has one class only"),
        (lambda r: change(r, [2], sequence="AC1D"), ["k"], r"illegal residues.*\(row 3;"),
        (lambda r: change(r, [2], sequence=""), ["k"], r"empty \(row 3;"),
        (lambda r: change(r, [1, 8], sequence="ACDEFGHIK"), ["k"], r"conflicting labels \(rows 2, 9; 2 in all\)"),
        (lambda r: change(r, [0, 29], sequence="ACDEFGHIK", k=1), ["k"], r"several parts of the split \(rows 1, 30"),
        (lambda r: change(r, [5], set="holdout"), ["k"], r"`set` is not.*\(row 6;"),
    ],
)  # fmt: skip
def test_faults_name_their_rows_and_show_no_sequence(tmp_path, edit, targets, words):
    path = write_table(tmp_path / "t.csv", edit(table(30)))
    with pytest.raises(TableError, match=words) as caught:
        read_labels(path, targets)
    assert "ACDEFGHIK" not in str(caught.value)


def test_first_ten_rows_and_the_count(tmp_path):
    path = write_table(tmp_path / "t.csv", change(table(30), range(12, 27), k="x"))
    with pytest.raises(TableError) as caught:
        read_labels(path, ["k"])
    assert "rows 13, 14, 15, 16, 17, 18, 19, 20, 21, 22 and 5 more; 15 in all" in str(caught.value)


def test_replicates_are_averaged_by_weight_only_when_asked(tmp_path):
    rows = [
        {"sequence": "ACDEF", "y": 1.0, "n": 1},
        {"sequence": "ACDEF", "y": 4.0, "n": 2},
        {"sequence": "ACDEG", "y": 0, "n": 1},
    ]
    path = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(TableError, match="--replicates mean"):
        read_labels(path, ["y"], weight="n")
    merged = read_labels(path, ["y"], weight="n", replicates="mean")
    assert merged.y[:, 0].tolist() == [3.0, 0.0] and merged.weights.tolist() == [3.0, 1.0]


def fasta(path, records):
    path.write_text("".join(f">{h}\n{s}\n" for h, s in records))
    return path


def test_residue_labels_join_by_id_and_mask(tmp_path):
    sequences = fasta(tmp_path / "s.fasta", [("a", "ACD"), ("b", "EFGH")])
    states = fasta(tmp_path / "l.fasta", [("b SET=test", "HHCE"), ("a SET=train VALIDATION=True", "CCH")])
    mask = fasta(tmp_path / "m.fasta", [("a", "110"), ("b", "1111")])
    labels = read_residues(sequences, states, mask)
    assert labels.classes == ("C", "E", "H") and labels.part.tolist() == [VALID, TEST]
    assert [r.tolist() for r in labels.residues] == [[0, 0, -1], [2, 2, 0, 1]]
    short = fasta(tmp_path / "k.fasta", [("a", "CC"), ("b", "HHCE")])
    with pytest.raises(TableError, match=r"do not match the sequence's length \(row 1;"):
        read_residues(sequences, short, mask)
    with pytest.raises(TableError, match=r"lacks records.*\(row 2;"):
        read_residues(sequences, fasta(tmp_path / "j.fasta", [("a", "CCH")]))


def test_rows_without_any_label_are_left_out_and_counted(tmp_path):
    rows = table(20)
    for i in (3, 7):
        rows[i]["k"] = rows[i]["w"] = ""
    rows[9]["k"] = ""
    labels = without_unlabelled(read_labels(write_table(tmp_path / "t.csv", rows), ["k", "w"]))
    assert len(labels) == labels.labelled() == 18 and "2 rows without any label left out" in labels.notes


def test_a_wild_type_may_be_longer_than_a_file_name(tmp_path):
    from training.finetune.run import _wild_type

    sequence = "ACDEFGHIKL" * 40
    (tmp_path / "w.fasta").write_text(f">w\n{sequence}\n")
    assert _wild_type(sequence) == _wild_type(str(tmp_path / "w.fasta")) == sequence

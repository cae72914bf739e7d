"""What belongs together by the file's own word, and what a card says was resampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from heads_tables import table, write_table
from test_heads_told import _rows, _table

from bioseq.specs.finetune import FinetuneSpec
from training.tables.labels import TEST, TRAIN, VALID
from training.tables.splits import GIVEN, Split, make_split

pytest.importorskip("sklearn", reason="the extra [train] is not installed")


def _apart(split: Split, clusters: list[str]) -> None:
    """Folds, validation and resampling keep the clusters whole, and say so."""
    rows = np.flatnonzero(np.isin(split.part, (TRAIN, VALID)))
    names = np.array(clusters)
    folds, by = split.folds(rows)
    assert by == GIVEN and len(folds) == 5
    for train, valid in folds:
        assert not set(names[rows[train]]) & set(names[rows[valid]])
    groups, by = split.tested(split.places(TEST))
    assert by == GIVEN and len(set(groups)) == len(set(names[split.places(TEST)]))
    assert len(set(split.resampled(rows))) == len(set(names[rows]))


def test_clusters_of_the_file_hold_for_proteins_with_a_set_column(tmp_path: Path) -> None:
    from training.tables.labels import read_labels

    rows = table(120)
    for i, r in enumerate(rows):
        r["cluster"] = f"{r['set']}{i % 11}"
    labels = read_labels(write_table(tmp_path / "t.csv", rows), ["k"])
    _apart(make_split(labels, measure=False), [r["cluster"] for r in rows])


@pytest.mark.parametrize("kind", ["column", "mutations", "position"])
def test_clusters_of_the_file_hold_for_variants(tmp_path: Path, kind: str) -> None:
    labels = _table(tmp_path / "t.csv", _rows(300, 150))
    clusters = [f"c{i % 23}" if part != TEST else f"t{i % 9}" for i, part in enumerate(labels.part)]
    labels = replace(labels, cluster=clusters, part=labels.part if kind == "column" else None)
    from bioseq.specs.finetune import SplitSettings

    settings = SplitSettings() if kind == "column" else SplitSettings(kind=kind)
    split = make_split(labels, settings, measure=False)
    _apart(split, clusters)
    if kind != "position":
        names = np.array(clusters)
        assert not set(names[split.part == TRAIN]) & set(names[split.part == VALID])
    one = make_split(replace(labels, cluster=["all"] * len(labels)), settings, measure=False)
    assert one.how.get("groups") != GIVEN  # one cluster of all variants tells nothing apart


@pytest.mark.parametrize("given", ["cluster", "set"])
def test_a_table_of_one_family_ends_in_an_honest_card(tmp_path: Path, backbone: Path, given: str) -> None:
    from training.finetune.run import finetune

    rows = [
        {k: v for k, v in r.items() if k != "set" or given == "set"} | {"cluster": "one"} for r in table(90)
    ]
    bundle = finetune(
        FinetuneSpec(
            labels=str(write_table(tmp_path / "t.csv", rows)), targets=("k",), base=str(backbone), threads=1,
            features=("composition",), models=("linear",), bootstrap=20, homologs="none",
            output=str(tmp_path / "head"), licence="CC0-1.0",
        )
    )  # fmt: skip
    evidence, card = bundle.evidence(), bundle.card()
    assert not evidence["beats_baseline"] and evidence["resampled"]["groups"] == 1
    assert "the test part holds 1 group" in card.splitlines()[2]
    assert f"by {GIVEN} (1 groups)" in card
    assert "row, as all of them are one group" in evidence["calibrated"]

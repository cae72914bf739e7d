"""The report's sentences, its size, and what users wrote in it."""

from __future__ import annotations

import csv
import json

import pytest

from serving.screening.tables.reasons import reason
from serving.screening.tables.report import write_report

PLACE = {"name": "place", "task": "multilabel"}
MELTING = {"name": "melting", "task": "regression"}
ROW = {
    "place.value": "nucleus;cell wall", "place.nucleus": "0.93", "place.cell wall": "0.61", "place.golgi": "0.1",
    "place.ood": "1.2", "place.ood_percentile": "0.4", "place.nearest": "P1", "place.nearest_identity": "0.412",
    "place.nearest_label": "nucleus", "melting.value": "61.234", "melting.low": "55.1", "melting.high": "67.9",
    "melting.ood": "3", "melting.ood_percentile": "0.97",
}  # fmt: skip


def test_a_sentence_says_what_how_sure_and_how_far_to_trust_it() -> None:
    assert reason(ROW, [PLACE, MELTING]) == (
        "Place: nucleus 93%, cell wall 61% (inside what the head was trained on; nearest homolog there P1, 41% identical, "
        "nucleus); melting 61.23, 55.1 to 67.9 (at the edge of what the head was trained on)."
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"place.value": ""}, "Place: no label is likely (inside"),
        (
            {"place.nearest": "", "place.nearest_identity": "", "place.nearest_label": ""},
            "; no homolog there)",
        ),
        ({"place.ood_percentile": "1.0"}, "far outside what the head was trained on: an extrapolation"),
        ({"place.nearest_label": ""}, "P1, 41% identical)"),
    ],
)
def test_what_is_missing_or_far_is_said(changes: dict[str, str], told: str) -> None:
    assert told in reason(ROW | changes, [PLACE])


def test_one_label_several_targets_and_heads_of_residues() -> None:
    yes = {"yes.value": "no", "yes.yes": "0.2", "yes.no": "", "yes.ood_percentile": "0.1"}
    assert reason(yes, [{"name": "yes", "task": "binary"}]).startswith("Yes: no (inside")
    two = {f"pair.{t}.{k}": v for t, v in (("tm", "1"), ("kd", "2")) for k in ("value", "low", "high")} | {"pair.ood_percentile": "0"}  # fmt: skip
    assert (
        "pair.tm 1, 1 to 1, pair.kd 2, 2 to 2"
        in reason(two, [{"name": "pair", "task": "regression"}]).lower()
    )
    assert (
        reason({"ss.value": "HHH", "ss.ood_percentile": "0"}, [{"name": "ss", "task": "per_residue"}]) == ""
    )


def test_a_hundred_thousand_hits_fit_in_five_megabytes_and_names_stay_text(tmp_path) -> None:
    columns = ["rank", "id", "row", "length", "status", "error", "score", *ROW, "notes"]
    with open(tmp_path / "hits.csv", "w", newline="") as handle:
        out = csv.DictWriter(handle, columns)
        out.writeheader()
        for i in range(100_000):
            out.writerow(ROW | {"rank": i + 1, "id": f"<script>alert({i})</script>", "row": i, "length": 300, "status": "ok", "error": "", "score": 0.5, "notes": ""})  # fmt: skip
    bins = {"bins": [5, 9, 3], "min": 0.0, "max": 1.0, "count": 17}
    labels = {
        f"place.{n}": bins for n in ("nucleus", "cell wall", "golgi", "er", "plastid", "vacuole", "membrane")
    }
    summary = {
        "model": {"name": "m", "version": 1, "hash": "sha256:0"}, "manifest_heads": [
            {**PLACE, "version": 1, "hash": "sha256:1"}, {**MELTING, "version": 1, "hash": "sha256:2"},
        ],
        "heads": {"place": {"columns": labels | {"place.ood_percentile": bins}, "labels": {"nucleus": 10}}, "melting": {"columns": {"melting.value": bins}, "labels": {}}},
        "ranked_by": "melting.value", "settings": {"where": "nucleus > 0.5 and '<b>' = '<b>'"}, "length": bins,
        "records": 100_000, "distinct": 100_000, "duplicates": 0, "residues": 1, "quarantined": 0, "noted": 0, "ok": 100_000,
        "counts": {"passed": 100_000, "hits": 100_000}, "reasons": {}, "examples": [], "inputs": [], "engine": {}, "bioseq": "0",
    }  # fmt: skip
    facts = {"began": "now", "workers": 1, "attempts": 1, "seconds": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "run.json").write_text(json.dumps(facts))
    write_report(str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 5_000_000
    assert "<script" not in page and "&lt;script&gt;alert(0)" in page and "<b>'" not in page
    assert "nearest homolog there P1, 41% identical" in page and "The first 50 of 100,000 hits" in page
    # one picture of small multiples a head, not one a label
    assert page.count("data:image/png;base64,") == 5

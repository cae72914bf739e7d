"""What ships is made by what the release's scripts say, and comes out the same again."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from heads_tables import table

from bioseq.bundles.bundle import open_bundle

pytest.importorskip("sklearn", reason="the extra [train] is not installed")
from training.finetune.write import _portable
from training.release.make_heads import COMPARTMENTS, NAMES, SHIPPED, spec

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_heads_were_made_with_the_settings_of_the_script(tmp_path: Path, name: str) -> None:
    told = open_bundle(ROOT / "bioseq" / "models" / name).manifest.extra["training"]
    now = _portable(spec(name, tmp_path, tmp_path, "default", SHIPPED))
    assert json.loads(json.dumps(now)) == told


def test_a_head_does_not_name_the_folders_of_the_machine_that_made_it(tmp_path: Path) -> None:
    (tmp_path / "default").mkdir()
    told = _portable(spec("localization", tmp_path, tmp_path, str(tmp_path / "default")))
    assert told["base"] == "default" and str(tmp_path) not in json.dumps(told)


def test_two_processes_make_the_same_head_bit_for_bit(tmp_path: Path, backbone: Path) -> None:
    with gzip.open(tmp_path / "localization.csv.gz", "wt", newline="") as handle:
        out = csv.DictWriter(handle, ("sequence", "set", "cluster", *COMPARTMENTS))
        out.writeheader()
        for r in table(100):
            labels = {c: r["many_k"] if j % 2 else r["many_w"] for j, c in enumerate(COMPARTMENTS)}
            out.writerow({k: r[k] for k in ("sequence", "set", "cluster")} | labels)
    made = []
    for turn in "ab":
        command = [sys.executable, "-m", "training.release.make_heads", str(tmp_path), str(tmp_path / turn),
                   "--base", str(backbone), "--heads", "localization", "--threads", "1",
                   "--cache", str(tmp_path / f"cache-{turn}")]  # fmt: skip
        environment = os.environ | {"PYTHONHASHSEED": turn.translate({97: "1", 98: "2"})}
        subprocess.run(command, check=True, timeout=300, cwd=ROOT, env=environment, capture_output=True)
        folder = tmp_path / turn / "localization"
        made.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert made[0].keys() == made[1].keys()
    assert [str(k) for k in made[0] if made[0][k] != made[1][k]] == []

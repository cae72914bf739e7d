"""What the screening tests share: reading results, a plain reference, runs in a process of their own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from bioseq.errors import BioseqError
from bioseq.sequences.alphabet import protein
from bioseq.sequences.fasta import read_fasta
from bioseq.specs.screen import ScreenSpec

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "bioseq" / "sample" / "library.fasta"
RESULTS = ("hits.csv", "hits.fasta", "summary.json", "map.parquet", "predictions/part-000000.parquet")

DRIVER = """
import json, sys
from bioseq.errors import BioseqError
from bioseq.specs.screen import ScreenSpec
from serving.screening.run import screen
from standin import StandIn
if __name__ == "__main__":
    try:
        screen(ScreenSpec.from_dict(json.loads(sys.argv[1])), engine=StandIn(**json.loads(sys.argv[2])), progress=False)
    except BioseqError as error:
        print(error.code, error, file=sys.stderr)
        sys.exit(1)
"""


def make_spec(run: Path, **changes) -> ScreenSpec:
    """A screen of the shipped library with settings that use every step."""
    settings = {
        "inputs": (str(LIBRARY),),
        "heads": ("stability", "place"),
        "workers": 2,
        "where": "nucleus > 0.1",
        "diverse": 3,
        "top": 100,
    }
    return ScreenSpec.from_dict({**settings, "output": str(run), **changes})


def driver(spec: ScreenSpec, engine: str) -> subprocess.Popen[bytes]:
    """A run in a process (and a Ray) of its own."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, spec.to_json(), engine],
        env=env,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


def committed(folder: Path) -> int:
    """Shards that count so far, by the newest log."""
    logs = sorted((folder / "work" / "commits").glob("attempt-*.jsonl"))
    return sum(1 for _ in logs[-1].open()) if logs else 0


def table(folder: Path) -> list[dict]:
    return pq.read_table(folder / "predictions").to_pylist()


def hits(folder: Path) -> list[dict[str, str]]:
    with open(folder / "hits.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def reference(library: Path, one) -> list[dict]:
    """The plain loop: one record after another, no batches, no deduplication, no Ray. `one(sequence)` gives cells."""
    rows = []
    for row, record in enumerate(read_fasta(library, allow_empty=True)):
        try:
            protein().encode(record.sequence)
        except BioseqError as error:
            rows.append({"id": record.id, "row": row, "status": "quarantined", "code": error.code})
            continue
        sequence = record.sequence.upper().removesuffix("*")
        rows.append({"id": record.id, "row": row, "length": len(sequence), "status": "ok", **one(sequence)})
    return rows

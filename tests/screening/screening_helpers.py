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
        standin = json.loads(sys.argv[2])
        engine = None if standin is None else StandIn(**standin)
        screen(ScreenSpec.from_dict(json.loads(sys.argv[1])), engine=engine, progress=False)
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


def searching_models(folder: Path, *, reads: bool = False) -> tuple[str, str]:
    """A tiny random backbone, and a head that searches its training rows (every third record of the library). With
    `reads` the backbone reads homologs, from the set `folder/rows`."""
    import torch

    from bioseq.backbones.packed.config import ModelConfig
    from bioseq.backbones.packed.encoder import PackedEncoder
    from bioseq.backbones.storage import save_backbone
    from bioseq.bundles.bundle import open_bundle, write_bundle
    from bioseq.homologs.reference import build_reference

    generator = torch.Generator().manual_seed(0)
    encoder = PackedEncoder(
        ModelConfig("t", n_layers=1, d_model=16, n_heads=2, d_ff=32, max_residues=200, reads_homologs=reads)
    )
    encoder.init_weights(generator, std=0.2)
    with torch.no_grad():
        for parameter in encoder.parameters() if reads else ():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    proteins = (r for r in read_fasta(LIBRARY, allow_empty=True) if r.sequence.isalpha())
    rows = build_reference(list(proteins)[:120:3], folder / "rows", name="rows")
    extra = {"homologs": {"reference": rows.hash, "name": "rows"}} if reads else {}
    save_backbone(
        folder / "tiny", encoder, name="tiny", card="# tiny", evidence={}, licence="CC0-1.0", extra=extra
    )
    width, labels = 16 + 2 + 2, ["nucleus", "membrane"]
    write_bundle(
        folder / "kin",
        manifest_fields={
            "kind": "head",
            "name": "kin",
            "alphabet": "protein",
            "base_hash": open_bundle(folder / "tiny").manifest.content_hash,
            "task": "multilabel",
            "labels": labels,
            "extra": {"head": {"blocks": ["embedding", "homology"], "classes": labels, "homologs": "search"}},
        },
        tensors={
            "features.mean": torch.zeros(width),
            "features.scale": torch.ones(width),
            "ood.mean": torch.zeros(16),
            "ood.project": torch.eye(16)[:, :4].contiguous(),
            "ood.grid": torch.linspace(0, 3, 101),
            "layers.0.weight": torch.randn(1, width, 2, generator=generator),
            "layers.0.bias": torch.zeros(1, 1, 2),
            "homologs.labels": torch.randint(0, 2, (len(rows), 2), generator=generator).float(),
        },
        calibration={"platt": [[1, 0], [1, 0]], "thresholds": [0.5, 0.5]},
        card="# kin",
        evidence={},
        extra_files={f"homologs/{f.name}": f for f in rows.folder.iterdir()},
    )
    return str(folder / "tiny"), str(folder / "kin")


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

"""Made-up proteins for the tests of this room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from training.corpus.prepare import Prepare
from training.pretrain.records import checkpoint as checkpoints
from training.pretrain.records.run_folder import read_metrics

LETTERS = list("LAGVSERTIDPKQNFYMHWC")
FAMILIES, LENGTH = 12, 90  # of the corpus with homologs


def proteins(count: int, seed: int, low: int = 20, high: int = 90) -> list[str]:
    """Random sequences, none twice."""
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(LETTERS, size=draw.integers(low, high))) for _ in range(count)]


def relative_of(ancestor: np.ndarray, draw: np.random.Generator, changed: float) -> str:
    new = np.where(draw.random(len(ancestor)) < changed, draw.choice(LETTERS, len(ancestor)), ancestor)
    return "".join(new)


def plan(sources: Path, **options) -> Prepare:
    return Prepare(
        **{
            "sources": (str(sources / "train.fasta"),),
            "valid": {"held": str(sources / "valid.fasta")},
            "homologs": str(sources / "reference"),
            "maskings": 2,
            "set_passes": 2,
            **options,
        }
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoints.last(folder / "checkpoints")
    assert found is not None
    return {**found.model(), **found.optimizer()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder) if r["kind"] == "train"}


_WORKER = """
import sys
import torch.distributed as dist
from bioseq.specs.pretrain import PretrainSpec
from training.pretrain.run import run
dist.init_process_group("gloo")
for file in sys.argv[1:]:
    run(PretrainSpec.load(file), progress=False)
dist.destroy_process_group()
"""


def torchrun(folder: Path, *specs) -> None:
    """Run the specs one after the other in one group of two processes."""
    script = folder / "worker.py"
    script.write_text(_WORKER)
    files = []
    for i, spec in enumerate(specs):
        files.append(folder / f"spec{i}.json")
        files[-1].write_text(spec.to_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(script), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]

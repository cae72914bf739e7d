"""Checkpoints that survive a SIGKILL at any moment and load on another number of workers.

    checkpoints/step-00001000/
        model.safetensors       weights by the packed encoder's names, float32
        optimizer.safetensors   NAME|exp_avg, NAME|exp_avg_sq, NAME|step
        state.json              step, tokens, best so far, the spec, the corpus's hash, sha256 of the two files

A checkpoint is written under a temporary name, synced and renamed; `state.json` is complete or the folder is
not there. There is no random state to keep: every draw comes from (seed, step). Safetensors only, no pickle.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bioseq.errors import CheckpointError
from bioseq.output import atomic_folder
from training.corpus.corpus import sha256

BEST = "best"


@dataclass
class Checkpoint:
    """A checkpoint on disk. `state` is its state.json."""

    path: Path
    state: dict[str, Any]
    _held: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Steps done: the next one to do."""
        return int(self.state["step"])

    def model(self) -> dict[str, torch.Tensor]:
        return self._held.get("model") or load_file(self.path / "model.safetensors")

    def optimizer(self) -> dict[str, torch.Tensor]:
        return self._held.get("optimizer") or load_file(self.path / "optimizer.safetensors")

    def load(self) -> None:
        """Hold the tensors in memory, for a folder that will go away."""
        self._held = {"model": self.model(), "optimizer": self.optimizer()}


def write(
    folder: Path,
    state: dict[str, Any],
    model: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor] | None = None,
) -> Checkpoint:
    """Write a checkpoint to `folder`, replacing one of that name. Raises `OutputError`."""
    with atomic_folder(folder, force=True) as temporary:
        files = {"model.safetensors": model}
        if optimizer is not None:
            files["optimizer.safetensors"] = optimizer
        hashes = {}
        for name, tensors in files.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / name)
            hashes[name] = sha256(temporary / name)
        state = {**state, "files": hashes}
        (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n", "utf-8")
    return Checkpoint(folder, state)


def save(
    root: Path,
    state: dict[str, Any],
    model: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    *,
    keep: int,
) -> Checkpoint:
    """Write the checkpoint of `state["step"]` under `root` and remove all but the newest `keep`."""
    made = write(root / f"step-{state['step']:08d}", state, model, optimizer)
    for old in steps(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for part in root.glob(".*.part"):  # of killed attempts; this process writes none now
        shutil.rmtree(part, ignore_errors=True)
    return made


def steps(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir())


def read(folder: Path) -> Checkpoint:
    """Open and verify a checkpoint. Raises `CheckpointError`."""
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        for name, expected in state["files"].items():
            if sha256(folder / name) != expected:
                raise CheckpointError(f"{folder / name} does not match its hash in state.json.")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}.") from error
    return Checkpoint(folder, state)


def last(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint; a damaged one is passed over with a warning."""
    for folder in reversed(steps(root)):
        try:
            return read(folder)
        except CheckpointError as error:
            print(f"warning: {error} Going back to the one before.", file=sys.stderr)
    return None

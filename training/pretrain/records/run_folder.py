"""A run's folder, and the sink that fills it.

spec.json               the spec as run
metrics.jsonl           one JSON object a line: "kind" train (loss, learning rate, ...) or eval (perplexity)
checkpoints/            the newest two, and `best`; see `training.pretrain.records.checkpoint`
tensorboard/            if tensorboard is installed
best/ last/             backbone bundles, at the end
loss.png card.md        at the end
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bioseq.errors import OutputError
from bioseq.output import atomic_file
from bioseq.progress import Progress
from bioseq.specs.pretrain import PretrainSpec
from training.pretrain.distributed.parallel import Trainee
from training.pretrain.distributed.team import Team
from training.pretrain.records import checkpoint as checkpoints
from training.pretrain.records.trackers import Trackers


class RunFolder:
    """`check` tells whether the folder may be used; the object is a `training.pretrain.loop.Sink`."""

    def __init__(self, path: Path, spec: PretrainSpec, team: Team, *, progress: bool = True):
        self.path, self.spec, self.team = path, spec, team
        self.checkpoints = path / "checkpoints"
        self._progress = progress and team.is_main
        self._bar: Progress | None = None
        self._done = 0
        self._trackers: Trackers | None = None

    @staticmethod
    def check(path: Path, *, resume: bool) -> None:
        """Raise `OutputError` if the folder holds a run and may not be resumed, or cannot be written."""
        if (path / "spec.json").exists() and not resume:
            raise OutputError(f"{path} holds a run already.", hint="Pass --resume to go on, or name another.")
        there = path.is_dir()
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
            if not there:  # what is refused next leaves no empty folder
                path.rmdir()
        except OSError as error:
            raise OutputError(
                f"cannot write into {path}: {error.strerror}.", hint="Choose another place with -o."
            ) from error

    def begin(self, first: int) -> None:
        """Write the spec; forget metrics of steps after the checkpoint, which will be done again."""
        if not self.team.is_main:
            return
        self._trackers = Trackers(self.spec, self.path, first)
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path / "spec.json", force=True) as file:
            file.write_text(self.spec.to_json())
        rows = [r for r in read_metrics(self.path) if r["step"] <= first]
        with atomic_file(self.path / "metrics.jsonl", force=True) as file:
            file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        self._done = first
        self._bar = Progress(
            self.spec.steps - first, self.spec.name, unit="steps", enabled=self._progress
        ).__enter__()

    def metrics(self, row: dict[str, Any]) -> None:
        if not self.team.is_main:
            return
        row = {**row, "time": round(time.time(), 1)}
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        if self._trackers:
            self._trackers.log(row)
        if self._bar and row["step"] > self._done:
            self._bar.add(row["step"] - self._done)
            self._done = row["step"]
        if row["kind"] == "eval" and self._progress:
            shown = ", ".join(f"{name} {e['perplexity']:.3f}" for name, e in row["sets"].items())
            print(f"step {row['step']}: perplexity {shown}", file=sys.stderr, flush=True)

    def checkpoint(self, state: dict[str, Any], trainee: Trainee) -> None:
        model, optimizer = trainee.model_tensors(), trainee.optimizer_tensors()
        if self.team.is_main:
            checkpoints.save(self.checkpoints, state, model, optimizer, keep=self.spec.keep)
        self.team.wait()

    def best(self, state: dict[str, Any], trainee: Trainee) -> None:
        model = trainee.model_tensors()
        if self.team.is_main:
            checkpoints.write(self.checkpoints / checkpoints.BEST, state, model)
        self.team.wait()

    def last_good(self) -> str:
        found = checkpoints.last(self.checkpoints)
        return str(found.path) if found else "none yet"

    def close(self) -> None:
        if self._bar:
            self._bar.__exit__(None, None, None)
        if self._trackers:
            self._trackers.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, one a kind and step (the last written); a line cut by a kill is left
    out."""
    file = path / "metrics.jsonl"
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.pop((row["kind"], row["step"]), None)
        rows[row["kind"], row["step"]] = row
    return sorted(rows.values(), key=lambda row: row["step"])

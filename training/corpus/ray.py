"""A corpus's sources staged and its homologs searched in parallel on Ray Data: one task a source, one a job of
searches. The bytes are the same as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.data

from bioseq.errors import BioseqError
from training.corpus.homologs import do
from training.corpus.staging import Prepare, stage
from training.ray_session import ray_session


def stage_all(plan: Prepare, staging: Path) -> None:
    """Stage every source of `plan` under `staging`, which all workers must reach. Raises the first source's
    error, in source order."""
    _each(len(plan.sources), lambda i: stage(plan, i, staging))


def search_all(files: list[Path]) -> None:
    """Do the jobs of searches in `files`, which all workers must reach; each uses the cores that Ray gives it."""
    if files:
        _each(len(files), lambda i: do(files[i]))


def _each(count: int, work: Callable[[int], None]) -> None:
    """Call `work` with 0 to `count` - 1, once each. Raises the error of the lowest number."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        try:
            work(int(row["number"]))
        except BioseqError as error:  # returned as data: Ray would try a failed task again and wrap the error
            return {
                "number": row["number"],
                "error": error.message,
                "hint": error.hint or "",
                "code": error.code,
            }
        return {"number": row["number"], "error": "", "hint": "", "code": ""}

    with ray_session(None, 2):
        numbers = ray.data.from_items([{"number": i} for i in range(count)], override_num_blocks=count)
        done = numbers.map(one).take_all()
    if sorted(r["number"] for r in done) != list(range(count)):
        raise BioseqError("Ray Data lost or doubled a task.", hint="Run the same command again.")
    for row in sorted(done, key=lambda r: r["number"]):
        if row["error"]:
            raise BioseqError(row["error"], code=row["code"], hint=row["hint"] or None)

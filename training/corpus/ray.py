"""Staging of a corpus's sources in parallel on Ray Data: one task a source. The bytes are the same as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import ray.data

from bioseq.errors import BioseqError
from training.corpus.staging import Prepare, stage
from training.ray_session import ray_session


def stage_all(plan: Prepare, staging: Path) -> None:
    """Stage every source of `plan` under `staging`, which all workers must reach. Raises the first source's
    error, in source order."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        try:
            stage(plan, int(row["source"]), staging)
        except BioseqError as error:  # returned as data: Ray would try a failed task again and wrap the error
            return {
                "source": row["source"],
                "error": error.message,
                "hint": error.hint or "",
                "code": error.code,
            }
        return {"source": row["source"], "error": "", "hint": "", "code": ""}

    with ray_session(None, 2):
        sources = ray.data.from_items(
            [{"source": i} for i in range(len(plan.sources))], override_num_blocks=len(plan.sources)
        )
        done = sources.map(one).take_all()
    if sorted(r["source"] for r in done) != list(range(len(plan.sources))):
        raise BioseqError(
            "Ray Data lost or doubled a source while staging.", hint="Run the same command again."
        )
    for row in sorted(done, key=lambda r: r["source"]):
        if row["error"]:
            raise BioseqError(row["error"], code=row["code"], hint=row["hint"] or None)

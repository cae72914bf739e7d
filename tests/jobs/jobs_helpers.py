"""A no-op executor, and a database with a scheduler around it."""

from __future__ import annotations

from typing import Any

from serving.database.base import Database
from serving.jobs.executors import ENDED, RUNNING, run_name
from serving.jobs.finish import Finished
from serving.jobs.folder import JobFolder
from serving.jobs.lease import Lease
from serving.jobs.scheduler import Scheduler
from serving.jobs.store import Admitted, JobStore
from serving.jobs.tables import JobRow
from serving.settings import Settings

SCREEN = {"inputs": ["/roots/lib.fasta"], "heads": ["h@1"], "model": "m@1"}


class NoOp:
    """Runs nothing: a run goes on until it is told to `finish`, `vanish` or stop. Remembers what it was told."""

    address = None

    def __init__(self) -> None:
        self.runs: dict[str, str] = {}
        self.folders: dict[str, tuple[JobFolder, int]] = {}
        self.order: list[str] = []
        self.stopped: list[str] = []
        self.most = 0

    def start(self, run: str, folder: JobFolder, attempt: int, *, gpus: float = 0) -> None:
        assert run not in self.runs, f"{run} was started twice"
        self.runs[run] = RUNNING
        self.folders[run] = (folder, attempt)
        folder.write(f"begun-{attempt}.json", {"attempt": attempt})
        self.order.append(run)
        self.most = max(self.most, sum(s == RUNNING for s in self.runs.values()))

    def states(self) -> dict[str, str]:
        return dict(self.runs)

    def stop(self, run: str) -> None:
        self.stopped.append(run)
        if self.runs.get(run) == RUNNING:
            self.finish(run, code=-15, why="stopped")

    def finish(self, run: str, code: int = 0, error: str | None = None, why: str | None = None) -> None:
        folder, attempt = self.folders[run]
        folder.write(f"exit-{attempt}.json", {"attempt": attempt, "code": code, "error": error, "why": why})
        self.runs[run] = ENDED

    def vanish(self, run: str) -> None:
        """As after a kill: the list knows it no more, and it left no word."""
        del self.runs[run]

    def running(self) -> list[str]:
        return [run for run, state in self.runs.items() if state == RUNNING]

    def close(self) -> None:
        pass


class Rig:
    def __init__(self, settings: Settings, executor: Any):
        self.settings, self.executor = settings, executor
        self.database = Database(settings.database)
        self.database.upgrade()
        self.store = JobStore(self.database)
        self.scheduler = self.new_scheduler()

    def new_scheduler(self, **changes: Any) -> Scheduler:
        """Another scheduler process over the same database and cluster."""
        given: dict[str, Any] = {"finisher": lambda *_: Finished(), "lost_s": 0.0} | changes
        return Scheduler(self.settings, self.database, self.executor, **given)

    def lease(self, **changes: Any) -> Lease:
        return Lease(self.database, **changes)

    def submit(self, owner: str = "a", *, kind: str = "screen", **fields: Any) -> JobRow:
        spec = fields.pop("spec", SCREEN)
        key = fields.pop("idempotency_key", None)
        job = Admitted(kind=kind, spec=spec, **fields)
        return self.store.submit(owner, job, max_active=self.settings.max_jobs_per_key, idempotency_key=key)[
            0
        ]

    def run_of(self, row: JobRow) -> str:
        return run_name(row.id, self.store.get(row.id).attempt)

    def state(self, row: JobRow) -> str:
        return self.store.get(row.id).state

    def finish_all(self) -> None:
        """Until nothing is pending or running."""
        for _ in range(10_000):
            assert self.scheduler.tick()
            running = self.executor.running()
            if not running and not self.store.running():
                counts = self.store.counts()
                if not counts.get("PENDING"):
                    return
            for run in running:
                self.executor.finish(run)
        raise AssertionError("jobs do not end")

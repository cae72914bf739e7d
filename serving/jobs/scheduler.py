"""The scheduler: starts pending jobs, watches running ones, brings them to their end.

One at a time acts, by a lease in the database. A tick looks at the executor's own list of runs and at what
the runs left in their folders, and concludes; it keeps nothing in memory that a restart would miss, so
reconciling after a restart is an ordinary tick.

A running job whose run has vanished (its driver, its node or the whole cluster died) gets another attempt if
its kind can resume, at most `job_attempts` in all; else it fails with that reason.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from typing import Any

from bioseq.errors import BioseqError, RegistryError
from serving.database.base import Database, now
from serving.database.keys import Keys
from serving.jobs import executors, finish
from serving.jobs.admission import can_resume, materialise
from serving.jobs.executors import Executor, job_of, run_name
from serving.jobs.files import FileStore
from serving.jobs.folder import JobFolder
from serving.jobs.lease import Lease, LeaseLost
from serving.jobs.store import JobStore, Started
from serving.jobs.tables import CANCELLED, FAILED, SUCCEEDED
from serving.problems import Problem
from serving.settings import Settings
from serving.telemetry import logs

SWEEP_S = 600.0
UNSENT_S = 600.0  # a run that cannot be started for so long is lost
LOST_S = 2.0  # a run is given up only when it stays away: its last word may take a moment over a network disk


class Scheduler:
    """`finisher` registers what a job made: see `finish.finish`. All methods block."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        executor: Executor,
        *,
        lease: Lease | None = None,
        finisher: Callable[[Settings, Started, JobFolder], finish.Finished] = finish.finish,
        lost_s: float = LOST_S,
    ):
        self.settings, self.executor, self.finisher = settings, executor, finisher
        self.store = JobStore(database)
        self.files = FileStore(database, settings.data)
        self.keys = Keys(database)
        self.lease = lease or Lease(database, seconds=settings.jobs_lease_s)
        self.lost_s = lost_s
        self._swept = 0.0
        self._missing: dict[str, float] = {}
        self._unsent: dict[str, float] = {}

    def folder(self, job: Started) -> JobFolder:
        return JobFolder(self.settings.data, job.id)

    def tick(self) -> bool:
        """One round; False if another scheduler holds the lease. Errors of the database or the executor end the
        round and are raised."""
        if not self.lease.acquire():
            return False
        try:
            self.store.renew(self.lease)
            states = self.executor.states()
            running = self.store.running()
            for job in running:
                self._look(job, states)
            self._stop_strays(states)
            self._start()
            self._sweep()
        except LeaseLost:
            return False
        return True

    def close(self) -> None:
        self.lease.release()

    # ----------------------------------------------------------------------------------------------- starting

    def _start(self) -> None:
        s = self.settings
        while True:
            job = self.store.start_next(
                self.lease, max_running=s.max_running_jobs, max_running_per_key=s.max_running_jobs_per_key
            )
            if job is None:
                return
            self._launch(job)

    def _launch(self, job: Started) -> None:
        """Write the attempt's files, then start it. A job whose files are gone fails at once."""
        folder = self.folder(job)
        try:
            self._write(job, folder)
        except (BioseqError, Problem, OSError) as error:
            reason = f"{error.strerror}" if isinstance(error, OSError) else folder.without_paths(str(error))
            self.store.end(self.lease, job, FAILED, f"it could not be started: {reason}")
            return
        self._send(job, folder)

    def _send(self, job: Started, folder: JobFolder) -> None:
        gpus = 1.0 if job.kind == "finetune" and job.spec.get("device") == "cuda" else 0.0
        run = run_name(job.id, job.attempt)
        try:
            self.executor.start(run, folder, job.attempt, gpus=gpus)
            self._unsent.pop(run, None)
        except Exception as error:
            # A cluster that has just started takes no jobs for a while. It may have begun nevertheless: the
            # same name again starts nothing twice.
            self._unsent.setdefault(run, time.monotonic())
            logs.trouble("job start", error, job=job.id)

    def _write(self, job: Started, folder: JobFolder) -> None:
        def path(file_id: str) -> Any:
            return self.files.path(self.files.get(file_id, None))

        folder.path.mkdir(parents=True, exist_ok=True, mode=0o750)
        spec, before = materialise(job.kind, job.spec, folder, path, address=self.executor.address)
        (folder.path / "spec.json").write_text(spec.to_json(), "utf-8")
        env = {
            "BIOSEQ_PROGRESS_FILE": str(folder.progress_file),
            "BIOSEQ_FENCE": str(job.attempt),
            "PYTHONUNBUFFERED": "1",
            **_registry_env(self.settings),
            **({"RAY_ADDRESS": self.executor.address} if self.executor.address else {}),
        }
        words = ["campaign", "propose"] if job.kind == "propose" else [job.kind]
        commands = [*before, [*words, "--spec", str(folder.path / "spec.json")]]
        s = self.settings
        limits = {"hours": s.max_job_hours, "memory": s.max_job_memory_bytes, "disk": s.max_job_bytes}
        plan = {"attempt": job.attempt, "commands": commands, "env": env, "limits": limits}
        folder.write("plan.json", plan)
        folder.write("fence.json", {"attempt": job.attempt})
        folder.note(f"attempt {job.attempt} of {job.kind} {job.id}")

    # ----------------------------------------------------------------------------------------------- watching

    def _look(self, job: Started, states: dict[str, str]) -> None:
        run = run_name(job.id, job.attempt)
        ended = self.folder(job).exit(job.attempt)
        if ended is None and states.get(run) == executors.RUNNING:
            self._missing.pop(run, None)
            if job.cancel:
                self.executor.stop(run)
            return
        if ended is None and not job.cancel and self._resend(run, job):
            return
        since = self._missing.setdefault(run, time.monotonic())
        if ended is None and time.monotonic() - since < self.lost_s:
            return
        self._missing.pop(run, None)
        if ended is not None:
            self._conclude(job, ended)
        elif job.cancel:
            self.store.end(self.lease, job, CANCELLED, "cancelled")
        else:
            self._lost(job, "its process ended without a word (killed, or its node died)")

    def _resend(self, run: str, job: Started) -> bool:
        """Start once more what could not be started; False if there is nothing such, or for too long."""
        since = self._unsent.get(run)
        if since is None or time.monotonic() - since > UNSENT_S:
            self._unsent.pop(run, None)
            return False
        self._send(job, self.folder(job))
        return True

    def _conclude(self, job: Started, ended: dict[str, Any]) -> None:
        code, why = ended["code"], ended["why"]
        if code == 0 and why is None:
            self._succeed(job)
        elif job.cancel:
            self.store.end(self.lease, job, CANCELLED, "cancelled")
        elif ended.get("over"):
            self.store.end(self.lease, job, FAILED, f"{ended['over']}.")
        elif why is not None:
            self._lost(job, f"its run was {why}")
        elif code < 0:
            self._lost(job, f"its process was ended by signal {-code}")
        else:
            self.store.end(self.lease, job, FAILED, ended["error"] or f"exit code {code}; see the log")

    def _succeed(self, job: Started) -> None:
        """Register first: a scheduler that dies in between does it again, which changes nothing."""
        folder = self.folder(job)
        try:
            self.store.renew(self.lease)
            if job.register is not None and not self.store.claim(job.owner, job.register):
                raise RegistryError(f"the name {job.register!r} is another's by now.", hint="Choose another.")
            done = self.finisher(self.settings, job, folder)
            if job.register is not None and done.registered:  # a head too weak for the registry keeps no name
                self.store.claim(job.owner, job.register, job.id)
        except BioseqError as error:
            told = folder.without_paths(str(error))
            self.store.end(self.lease, job, FAILED, f"it ran, but its result was not taken: {told}")
            return
        if self.store.end(self.lease, job, SUCCEEDED, done.note, done.registered):
            self.keys.count(job.owner, int(time.time() // 60), finish.tokens_of(job.kind, folder))

    def _lost(self, job: Started, why: str) -> None:
        began = self.folder(job).began(job.attempt)  # else this scheduler or another died before it was sent
        if began and not can_resume(job.kind, job.spec):
            reason = f"{why}; a {job.kind} job of this method cannot resume. Submit it again."
            self.store.end(self.lease, job, FAILED, reason)
        elif job.failures + 1 >= self.settings.job_attempts:
            reason = f"{why}; that was attempt {job.failures + 1} of {self.settings.job_attempts}."
            self.store.end(self.lease, job, FAILED, reason)
        else:
            after = self.store.again(self.lease, job)
            if after is not None:
                self.folder(job).note(f"attempt {job.attempt} was lost: {why}; resuming")
                self._launch(after)

    def _stop_strays(self, states: dict[str, str]) -> None:
        """Stop runs that are not the current attempt of a job: it was cancelled, or that attempt was given up."""
        wanted = {run_name(job.id, job.attempt) for job in self.store.running()}
        for run, state in states.items():
            if state == executors.RUNNING and job_of(run) and run not in wanted:
                self.executor.stop(run)

    def _sweep(self) -> None:
        if time.monotonic() - self._swept < SWEEP_S and self._swept:
            return
        self._swept = time.monotonic()
        self.files.sweep()
        self.keys.fold(now() - datetime.timedelta(days=self.settings.usage_days))
        before = now() - datetime.timedelta(days=self.settings.job_days)
        for job_id in self.store.old(before):
            self.store.forget(job_id)
            JobFolder(self.settings.data, job_id).remove()


def _registry_env(settings: Settings) -> dict[str, str]:
    """Where a job looks for models: the service's registry."""
    home = settings.registry or os.environ.get("BIOSEQ_HOME")
    return {"BIOSEQ_HOME": home} if home else {}

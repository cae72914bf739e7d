"""What runs an attempt: Ray Jobs (`ray_executor`), or a child process where there is no Ray.

The seam is this protocol and nothing more: a scheduler is given an executor in code, no request and no
setting can name one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Protocol

from serving.jobs.folder import JobFolder

RUNNING, ENDED = "running", "ended"


class Executor(Protocol):
    address: str | None  # of the Ray cluster that runs work on: its GCS, host:port

    def start(self, run: str, folder: JobFolder, attempt: int, *, gpus: float = 0) -> None:
        """Start attempt `attempt` of a job under the name `run`. A second call with the same name starts
        nothing."""

    def states(self) -> dict[str, str]:
        """Every run that this executor knows, `running` or `ended`. May raise: then nothing is concluded."""

    def stop(self, run: str) -> None:
        """Ask a run to end; gone or unknown is fine."""

    def close(self) -> None: ...


def run_name(job_id: str, attempt: int) -> str:
    return f"bioseq-{job_id}-{attempt}"


def job_of(run: str) -> tuple[str, int] | None:
    """Job id and attempt of a run's name; None if it is not ours."""
    parts = run.split("-")
    if len(parts) != 3 or parts[0] != "bioseq" or not parts[2].isdigit():
        return None
    return parts[1], int(parts[2])


class ProcessExecutor:
    """Children of this process, which end with it."""

    address: str | None = None

    def __init__(self) -> None:
        self._runs: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, run: str, folder: JobFolder, attempt: int, *, gpus: float = 0) -> None:
        if run in self._runs:
            return
        self._runs[run] = subprocess.Popen(
            [sys.executable, "-m", "serving.jobs.runner", str(folder.path), str(attempt)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def states(self) -> dict[str, str]:
        return {name: RUNNING if p.poll() is None else ENDED for name, p in self._runs.items()}

    def stop(self, run: str) -> None:
        process = self._runs.get(run)
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    def close(self) -> None:
        for name in self._runs:
            self.stop(name)
        for process in self._runs.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

"""Jobs as Ray Jobs on the cluster that serves.

The entrypoint is ours and names two things, both made by us: the job's folder and the attempt. It asks for no
CPU, as the driver of a screen or a training only waits for workers that ask for their own. Of a runtime environment
only this is sent: the service's secrets are blanked, which on a cluster that was joined stand in the environment of its
nodes and would reach every worker.
"""

from __future__ import annotations

import shlex
import sys
import time
from typing import Any

from serving.jobs.executors import ENDED, RUNNING, job_of
from serving.jobs.folder import HIDDEN, JobFolder

_FRESH_S = 20.0


class RayExecutor:
    """`address` is the cluster's GCS, host:port; None is the cluster that this process is in."""

    def __init__(self, address: str | None = None):
        from ray.dashboard.utils import ray_address_to_api_server_url
        from ray.job_submission import JobSubmissionClient

        if address is None:
            import ray

            address = ray.get_runtime_context().gcs_address
        # Jobs are told this address: Ray itself tells them "auto", which on a machine with several clusters may
        # be another one.
        self.address: str | None = address
        self._client: Any = JobSubmissionClient(ray_address_to_api_server_url(address))
        self._sent: dict[str, float] = {}

    def start(self, run: str, folder: JobFolder, attempt: int, *, gpus: float = 0) -> None:
        command = [sys.executable, "-m", "serving.jobs.runner", str(folder.path), str(attempt)]
        self._sent[run] = time.monotonic()
        try:
            self._client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=run,
                entrypoint_num_cpus=0,
                entrypoint_num_gpus=gpus,
                metadata={"bioseq": "job"},
                runtime_env={"env_vars": dict.fromkeys(HIDDEN, "")},
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                self._sent.pop(run, None)
                raise

    def states(self) -> dict[str, str]:
        from ray.job_submission import JobStatus

        found = {
            job.submission_id: RUNNING if job.status in (JobStatus.PENDING, JobStatus.RUNNING) else ENDED
            for job in self._client.list_jobs()
            if job.submission_id and job_of(job.submission_id)
        }
        # A run that was just submitted may be missing from the list for a moment.
        for run, at in list(self._sent.items()):
            if run in found or time.monotonic() - at > _FRESH_S:
                del self._sent[run]
            else:
                found[run] = RUNNING
        return found

    def stop(self, run: str) -> None:
        try:
            self._client.stop_job(run)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise

    def close(self) -> None:
        pass

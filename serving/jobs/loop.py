"""Where the scheduler runs: in a detached Ray actor, or in a thread of a service without Ray."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

from serving.database.base import Database
from serving.jobs.executors import Executor, ProcessExecutor
from serving.jobs.scheduler import Scheduler
from serving.settings import Settings
from serving.telemetry import logs

NAME, NAMESPACE = "bioseq-jobs", "bioseq"


class Loop:
    """Ticks in a thread until closed. Trouble is logged, and the next tick tries again."""

    def __init__(self, scheduler: Scheduler, poll_s: float):
        self.scheduler, self.poll_s = scheduler, poll_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bioseq-jobs", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        wait = self.poll_s
        while not self._stop.wait(wait):
            wait = self.poll_s
            try:
                self.scheduler.tick()
            except Exception as error:
                logs.trouble("jobs", error)
                wait = max(2.0, self.poll_s)

    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30)
        self.scheduler.executor.close()
        self.scheduler.close()


class SchedulerActor:
    """The scheduler in a Ray actor of its own. Restarted by Ray when its node dies; a second one would wait
    for the lease."""

    def __init__(self, settings: dict[str, Any]):
        from serving.jobs.ray_executor import RayExecutor

        self._settings = Settings.from_dict(settings)
        logs.to_file(self._settings.log_file)
        database = Database(self._settings.database)
        database.upgrade()
        self._loop = Loop(Scheduler(self._settings, database, RayExecutor()), self._settings.jobs_poll_s)

    def about(self) -> dict[str, Any]:
        """Version and settings that it runs with, and whether it does."""
        from bioseq.version import __version__

        return {"version": __version__, "settings": self._settings.to_dict(), "alive": self._loop.alive()}

    def close(self) -> None:
        self._loop.close()


def open_scheduler(settings: Settings) -> Any:
    """The scheduler's actor; it is made if it is not there, and made anew for another version or settings."""
    import ray

    from bioseq.version import __version__

    plain = settings.to_dict()
    for _ in range(2):
        actor: Any = (
            ray.remote(SchedulerActor)
            .options(
                name=NAME, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", num_cpus=0,
                max_restarts=-1, max_task_retries=0,
            )
            .remote(plain)
        )  # fmt: skip
        about = ray.get(actor.about.remote(), timeout=60)
        if about == {"version": __version__, "settings": plain, "alive": True}:
            break
        with contextlib.suppress(Exception):
            ray.get(actor.close.remote(), timeout=40)
        ray.kill(actor)
    return actor


def make_executor() -> Executor:
    """Of a service without Ray."""
    return ProcessExecutor()


@contextlib.asynccontextmanager
async def scheduling(settings: Settings, database: Database) -> AsyncIterator[None]:
    """A scheduler runs while this does; the Ray actor also runs on."""
    import asyncio

    if settings.behind_serve:
        task = asyncio.create_task(_keep(settings))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return
    loop = Loop(Scheduler(settings, database, make_executor()), settings.jobs_poll_s)
    try:
        yield
    finally:
        await asyncio.to_thread(loop.close)


async def _keep(settings: Settings) -> None:
    """See to it that the actor is there, now and after whatever happened to it."""
    import asyncio

    while True:
        try:
            await asyncio.to_thread(open_scheduler, settings)
        except Exception as error:
            logs.trouble("jobs actor", error)
            await asyncio.sleep(2)
            continue
        await asyncio.sleep(30)

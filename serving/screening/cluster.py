"""Ray for a screening run: on this machine, or a running cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bioseq.errors import ResourceError
from serving.cluster.lone_ray import settle


@contextlib.contextmanager
def ray_session(address: str | None, workers: int | None, threads: int) -> Iterator[dict[str, float]]:
    """Connects, yields the cluster's resources, and disconnects. A Ray that this process already uses is used
    and left alone.

    Without an address, Ray starts here with logical CPUs for the engines and two more, since reading and
    merging would otherwise wait for ever behind engines that hold every CPU.
    """
    with contextlib.ExitStack() as stack:
        if address is None:
            _token(stack)
        settle(address)
        # Ray's C++ side writes its own remarks to standard error; the variable is read at import
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        import ray

        _quiet()
        if ray.is_initialized():
            yield ray.cluster_resources()
            return
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            cpus = max(os.cpu_count() or 1, (workers or 1) * threads) + 2
            options |= {"num_cpus": cpus, "include_dashboard": False}
        try:
            with _hushed():
                ray.init(address=address or "local", **options)
        except (ConnectionError, RuntimeError, OSError, ValueError, TimeoutError) as error:
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise ResourceError(
                f"cannot reach {where}: {type(error).__name__}.",
                hint="Check the address." if address else "Check the free memory and disk, and $RAY_TMPDIR.",
            ) from error
        try:
            yield ray.cluster_resources()
        finally:
            ray.shutdown()


def _token(stack: contextlib.ExitStack) -> None:
    """Ray's own ports on this machine ask for a token that only this user can read: without one, whoever
    reaches a port runs code here. Ray reads these variables once, when it is imported."""
    if os.environ.get("RAY_AUTH_MODE") or "ray" in sys.modules:
        return
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bioseq-ray-"))
    path = Path(folder) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", str(path)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on descriptor 2: Ray's C++ side announces its log level there. What goes wrong is raised."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _quiet() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


def remotely(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a worker process and return the answer: its memory is not the driver's. Our own errors arrive as
    they were raised."""
    import ray

    from bioseq.errors import BioseqError

    def guarded(*inner: Any) -> tuple[Any, BioseqError | None]:
        try:
            return function(*inner), None
        except BioseqError as error:
            return None, _plain(error)

    answer, fault = ray.get(ray.remote(num_cpus=1, max_retries=3)(guarded).remote(*arguments))
    if fault is not None:
        raise fault
    return answer


def _plain(error: Any) -> Any:
    """A copy that pickles: subclasses with keyword-only fields do not rebuild from `args`."""
    from bioseq.errors import BioseqError

    return BioseqError(error.message, code=error.code, hint=error.hint)

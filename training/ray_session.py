"""The Ray that training runs on: the one that this process uses already, a cluster, or one of this machine's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import ray

from bioseq.errors import ResourceError


@contextlib.contextmanager
def ray_session(address: str | None, cpus: int, *, log_to_driver: bool = True) -> Iterator[None]:
    """The cluster at `address` (or $RAY_ADDRESS), or a Ray started here with at least `cpus` logical CPUs. What was
    joined or started here is left at the end. Raises `ResourceError`."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        if address == "local":
            if tmp := os.environ.get("RAY_TMPDIR"):
                Path(tmp, "ray").mkdir(parents=True, exist_ok=True)
            # Ray would run workers at niceness 15: beside any other work a run would all but stand still.
            os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(address="local", num_cpus=max(cpus, os.cpu_count() or 1), log_to_driver=log_to_driver)
        else:
            ray.init(address=address, log_to_driver=log_to_driver)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"address: cannot join the Ray cluster at {address}: {str(error).splitlines()[0]}",
            hint="Check --address, or leave it out to run on this machine.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()

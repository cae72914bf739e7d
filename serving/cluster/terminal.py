"""Ray's own words, kept from the user's terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def ray_told_to(path: Path) -> Iterator[None]:
    """What Ray prints, its C++ side's remarks and what its processes inherit go to the file; only what is written to
    `sys.stderr` reaches the terminal. Ray knows no setting for it: it prints reports of its raylet as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    printed, told = sys.stdout, sys.stderr
    for stream in (printed, told):
        stream.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    with contextlib.ExitStack() as stack:
        sys.stdout = stack.enter_context(
            open(os.dup(log), "w", buffering=1, encoding="utf-8", errors="replace")
        )
        if _is_descriptor(told, 2):
            sys.stderr = stack.enter_context(
                open(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
            )
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = printed, told
            for descriptor, before in zip((1, 2), kept):
                os.dup2(before, descriptor)
            for descriptor in (*kept, log):
                os.close(descriptor)


def _is_descriptor(stream: object, number: int) -> bool:
    try:
        return stream.fileno() == number  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def loggers_too() -> None:
    """Ray's Python loggers go where it prints. After Ray has made their handlers."""
    for name in ("ray", "ray.serve", "ray.data"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setStream(sys.stdout)

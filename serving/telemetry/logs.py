"""Structured logs: one JSON object a line, to a file or standard output.

Lines carry ids, counts, times and codes. Nothing that a user sent is ever logged but its size, and unforeseen
errors are logged by type and place, without their text, which might quote a sequence.
"""

from __future__ import annotations

import datetime
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import orjson

_lock = threading.Lock()
_target: int = 1


def to_file(path: str | None) -> None:
    """Send lines of this process to `path`, appended; None is standard output. Lines of several processes do
    not mix: each is one write to a descriptor opened for appending."""
    global _target
    with _lock:
        if _target > 2:
            os.close(_target)
        if path is None:
            _target = 1
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)


def line(kind: str, **fields: Any) -> None:
    """Write one line. Never raises: a full disk must not fail a request."""
    entry = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), "log": kind}
    entry.update((k, v) for k, v in fields.items() if v is not None)
    data = orjson.dumps(entry, default=str) + b"\n"
    with _lock:
        try:
            if _target == 1:
                sys.stdout.write(data.decode())
                sys.stdout.flush()
            else:
                os.write(_target, data)
        except (OSError, ValueError):
            pass


def trouble(what: str, error: BaseException, **fields: Any) -> None:
    """An unforeseen error: its type and where it came from."""
    places = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)[-6:]
    ]
    line("error", what=what, error=type(error).__name__, at=places, **fields)

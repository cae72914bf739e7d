"""The environment of a Ray of this machine alone. Set before Ray is imported: it reads it once."""

from __future__ import annotations

import os
from pathlib import Path


def settle(address: str | None) -> None:
    """For the Ray that will be started here (None) or joined at `address`. What the user has set stays."""
    if address is None:
        # Ray would run workers at niceness 15: beside any other busy program they would all but stand still.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if "RAY_TMPDIR" in os.environ:
            Path(os.environ["RAY_TMPDIR"], "ray").mkdir(parents=True, exist_ok=True)
    if address is None or address.startswith(("127.0.0.1:", "localhost:")):
        # It has loopback's address: else its metrics would answer anybody who reaches the machine, and its other
        # ports whoever has the token. (The variable's name tells of where Ray does so by itself.)
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

"""A bioseq service with the local predictor's interface: `Client` (from `bioseq.connect`) and `AsyncClient`.

Each call is written once, as a coroutine (`calls`, `jobs`); `sync` and `asynchronous` drive it. Importing this
room loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bioseq.client.asynchronous import AsyncClient
    from bioseq.client.sync import Client, connect

__all__ = ["AsyncClient", "Client", "connect"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bioseq.client' has no attribute {name!r}")
    from bioseq.client import sync

    return getattr(sync, name)

"""Vectors: embeddings kept by content, and searched.

Stores that lose no committed vector, exact and approximate search in them. The room takes arrays; embedding
happens above it. The room itself is the door: `bioseq.vectors(path)` is a `store.VectorStore`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bioseq.vectors.store import VectorStore


class _Room(ModuleType):
    """A module that can be called, as `vectors` is the name of both the room and the door."""

    def __call__(self, path: Any, settings: Any = None) -> VectorStore:
        """The store in the folder `path`; with `settings` it is made if it is not there."""
        from bioseq.vectors.store import VectorStore

        return VectorStore(path, settings)


sys.modules[__name__].__class__ = _Room

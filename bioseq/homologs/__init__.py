"""Homologs: what a protein's relatives say about it.

Reference sets, searches in them (MMseqs2), alignments on the query's columns, weighted profiles, clusters, and
transfer of labels. The room itself is the door: `bioseq.homologs("default")` is a `door.Homologs`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bioseq.homologs.door import Homologs


class _Room(ModuleType):
    """A module that can be called, as `homologs` is the name of both the room and the door."""

    def __call__(self, reference: Any = "default", **options: Any) -> Homologs:
        """`door.Homologs` of "default", a reference set's folder, or an opened one."""
        from bioseq.homologs.door import Homologs

        return Homologs(reference, **options)


sys.modules[__name__].__class__ = _Room

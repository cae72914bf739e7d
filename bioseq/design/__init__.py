"""Design: new variants of a protein that an objective finds good, under hard constraints.

An evolutionary search whose mutations the masked model and homologs propose, and Gibbs sampling of libraries. The
room itself is the door: `bioseq.design(wild_type, "zero_shot", number=96)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """A module that can be called, as `design` is the name of both the room and the door."""

    def __call__(self, wild_type: str, objective: str = "zero_shot", **options: Any) -> list[dict[str, Any]]:
        """Designs, best first, one dict each; options are the fields of `bioseq.specs.design.DesignSpec`. Raises what
        `bioseq design` raises."""
        from bioseq.design.run import run
        from bioseq.specs.design import DesignSpec

        return run(DesignSpec(wild_type=wild_type, objective=objective, **options))


sys.modules[__name__].__class__ = _Room

"""The spec of a design run (`bioseq design`, `bioseq.design`)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bioseq.errors import SpecError
from bioseq.specs.base import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class DesignSpec(Spec):
    """One run. Every field decides the result: a run that was killed goes on under equal ones.

    wild_type: the residues. objective: an expression to raise, and where: one that must hold, over the columns
    zero_shot, mutations, HEAD.value, HEAD.LABEL, HEAD.ood and campaign.COLUMN (docs/design.md).
    number: designs. heads: names, NAME@V or bundle folders. campaign: a folder, whose surrogates score.
    constraints: a TOML file. method: evolve, or gibbs for a library drawn from the masked model.
    generations, batch: of evolve; the objective is computed of generations x batch variants.
    temperature: of the proposals, and of gibbs. steps: of each gibbs chain, 0 for one sweep of the free positions.
    caution: standard deviations that are subtracted from the objective. distance: fewest mutations between two designs.
    homologs, alignment: as for scores.
    """

    wild_type: str
    objective: str = "zero_shot"
    number: int = 96
    where: str | None = None
    heads: tuple[str, ...] = ()
    campaign: str | None = None
    constraints: str | None = None
    method: Literal["evolve", "gibbs"] = "evolve"
    generations: int = 20
    batch: int = 200
    temperature: float = 1.0
    steps: int = 0
    caution: float = 1.0
    distance: int = 2
    seed: int = 0
    model: str = "default"
    homologs: str = "auto"
    alignment: str | None = None
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    device: str = "auto"
    threads: int | None = None

    def validate(self) -> None:
        for name in ("number", "generations", "batch", "distance"):
            if getattr(self, name) < 1:
                raise SpecError(f"{getattr(self, name)} is below 1.", field=name)
        for name in ("steps", "seed", "caution"):
            if not getattr(self, name) >= 0:
                raise SpecError(f"{getattr(self, name)} is below 0.", field=name)
        if not 0.01 <= self.temperature <= 100:
            raise SpecError(f"{self.temperature} is not in 0.01 to 100.", field="temperature")
        if len(set(self.heads)) < len(self.heads):
            raise SpecError("a head is named twice.", field="heads")

"""A campaign's state: a fold over its ledger. Later events of a well replace earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bioseq.campaigns.ledger import Event

OPEN = ("proposed", "ordered")


@dataclass
class State:
    """`wells` is the last event by (round, well); a measurement that was never proposed has a well `+N`."""

    wells: dict[tuple[int, str], Event] = field(default_factory=dict)
    rounds: int = 0
    plates: dict[int, str] = field(default_factory=dict)  # hash of a round's plate.csv
    abandoned: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)

    @classmethod
    def fold(cls, events: Sequence[Event]) -> State:
        state = cls()
        for e in events:
            state.wells[e.round, e.well] = e
            if e.event == "proposed":
                state.rounds = max(state.rounds, e.round)
                state.plates[e.round] = e.source
            elif e.event == "abandoned":
                state.abandoned.add(e.variant)
            if e.event in ("measured", "failed"):
                state.sources.add(e.source)
        return state

    def count(self, event: str) -> int:
        return sum(e.event == event for e in self.wells.values())

    @property
    def pending(self) -> list[str]:
        return sorted({e.variant for e in self.wells.values() if e.event in OPEN and e.variant != "WT"})

    def untouched(self, round_: int) -> bool:
        """Whether a round was proposed and nothing else happened to its wells (measurements without one do not count)."""
        events = {e.event for (r, w), e in self.wells.items() if r == round_ and not w.startswith("+")}
        return events == {"proposed"}

    def measured(self, objective: int) -> dict[str, tuple[float, int, float | None, int]]:
        """By variant: mean after plate effects (`_effects`), number of values, standard error if given, first round."""
        rows = [
            (e.round, e.variant, e.values[objective], e.errors[objective])
            for _, e in sorted(self.wells.items())
            if e.event == "measured" and e.values[objective] is not None
        ]
        controls: dict[int, list[float]] = {}
        for r, variant, value, _ in rows:
            if variant == "WT" and value is not None:
                controls.setdefault(r, []).append(value)
        effects = _effects(controls)
        found: dict[str, list[tuple[float, float | None, int]]] = {}
        for r, variant, value, error in rows:
            if value is not None:
                found.setdefault(variant, []).append((value - effects.get(r, 0.0), error, r))
        out = {}
        for variant, values in found.items():
            errors = [e for _, e, _ in values if e is not None]
            error = float(np.sqrt(np.mean(np.square(errors)) / len(values))) if errors else None
            out[variant] = (
                float(np.mean([v for v, _, _ in values])),
                len(values),
                error,
                min(r for *_, r in values),
            )
        return out


def _effects(controls: dict[int, list[float]]) -> dict[int, float]:
    """Plate effects by round from its wild-type wells: the mean less that of all rounds, shrunk by its reliability.
    The variance of a mean's noise is that of wells within rounds over their number; what the means vary beyond it is
    taken for plates (one-way random effects, by moments). Two wells of one round are needed."""
    means = {r: float(np.mean(v)) for r, v in controls.items()}
    freedom = sum(len(v) - 1 for v in controls.values())
    if len(means) < 2 or not freedom:
        return {}
    within = sum(float(np.var(v)) * len(v) for v in controls.values()) / freedom
    noise = {r: within / len(v) for r, v in controls.items()}
    plates = max(float(np.var(list(means.values()), ddof=1)) - float(np.mean(list(noise.values()))), 0.0)
    if not plates:
        return {}
    centre = float(np.mean(list(means.values())))
    return {r: (m - centre) * plates / (plates + noise[r]) for r, m in means.items()}

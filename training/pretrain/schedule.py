"""Learning rate as a pure function of the step.

- `cosine`: linear warm-up, then half a cosine down to `final` of the peak at the last step.
- `wsd`: warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): the peak is held, and the last `decay`
  steps fall as 1 - sqrt(progress) to `final` of the peak (Hägele et al. 2024, arXiv 2405.18392). As the
  stable part does not know the run's length, a run can be prolonged from any checkpoint before the decay.
- `constant`: warm-up, then the peak.
"""

from __future__ import annotations

import math

from bioseq.specs.pretrain import ScheduleSpec


def factor(step: int, steps: int, schedule: ScheduleSpec) -> float:
    """Share of the peak learning rate at `step` (from 0) of a run of `steps`; > 0 for all steps of a run
    with `final` > 0, and never above 1."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        span = max(1, steps - schedule.warmup)
        progress = min(1.0, (step - schedule.warmup) / span)
        return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress))
    begin = steps - schedule.decay
    if step < begin:
        return 1.0
    progress = min(1.0, (step - begin + 1) / max(1, schedule.decay))
    return schedule.final + (1 - schedule.final) * (1 - math.sqrt(progress))

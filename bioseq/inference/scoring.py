"""Scores and scans on this machine: plans in chunks through one model, with progress."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bioseq.inference.homologs import HomologsOption, find_one
from bioseq.inference.variants import Model, Plan, Scored, WildType, plan_scan, plan_scores
from bioseq.progress import Progress
from bioseq.sequences.fasta import Record
from bioseq.sequences.mutations import Variant

_MAX_QUERIES = 20_000  # contexts held at once; bounds memory for pseudo-log-likelihoods of long tables


def score_variants(
    model: Model,
    wild_type: str | Record,
    mutants: Sequence[str | Variant],
    *,
    strategy: str = "masked-marginals",
    long_sequences: str = "error",
    homologs: HomologsOption = "auto",
    alignment: str | Path | None = None,
    progress: bool = False,
) -> Scored:
    """Scores float64 [len(mutants)] in input order, with notes and evidence; higher is more likely. All variants
    are checked before any is scored.

    `homologs` is auto (the shipped reference set), none, default, a reference set, or ready ones (`Found`);
    `alignment` is an a3m, a2m or Stockholm file of the wild type's homologs instead. A backbone that reads homologs
    reads them rather than being mixed with them: auto is its own set, and none no homologs. Raises `MutationError`,
    `SequenceError`, `SpecError`, and what a search raises.
    """
    wild = WildType.prepare(model, wild_type, strategy, long_sequences)
    variants = wild.read(mutants)
    wild.query.reads = homologs != "none"
    wild = wild.with_homologs(find_one(model, wild_type, homologs, alignment))
    return wild.scored(_scores(wild, variants, progress))


def scan_sites(
    model: Model,
    sequence: str | Record,
    *,
    strategy: str = "masked-marginals",
    long_sequences: str = "error",
    homologs: HomologsOption = "auto",
    alignment: str | Path | None = None,
    progress: bool = False,
) -> Scored:
    """All single substitutions: float32 [L, 20], letters in the order of `alphabet.standard`, wild type 0. Options
    as in `score_variants`."""
    wild = WildType.prepare(model, sequence, strategy, long_sequences)
    wild.query.reads = homologs != "none"
    wild = wild.with_homologs(find_one(model, sequence, homologs, alignment))
    if strategy == "pseudo-log-likelihood":
        return wild.scored(wild.fold(_scores(wild, wild.singles(), progress)))
    plan = plan_scan(wild)
    with Progress(len(plan.queries), "scanning", unit="passes", enabled=progress) as bar:
        return wild.scored(_run(model, [(plan, len(plan.queries))], bar)[0])


def _scores(wild: WildType, variants: list[Variant], progress: bool) -> np.ndarray:
    size = max(1, _MAX_QUERIES // (len(wild.letters) if wild.strategy == "pseudo-log-likelihood" else 1))
    chunks = (variants[at : at + size] for at in range(0, len(variants), size))
    with Progress(len(variants), "scoring", unit="variants", enabled=progress) as bar:
        parts = _run(wild.model, ((plan_scores(wild, chunk), len(chunk)) for chunk in chunks), bar)
    return np.concatenate([np.zeros(0, dtype=np.float64), *parts])


def _run(model: Model, plans: Iterable[tuple[Plan, int]], bar: Progress) -> list[np.ndarray]:
    """The values of each plan, which counts for so many units of the bar."""
    values = []
    for plan, units in plans:
        share = _Share(bar, len(plan.queries), units)
        values.append(plan.finish(model.run(plan.queries, progress=share)).values)
        if not plan.queries:  # wild types only
            bar.add(units)
    return values


class _Share(Progress):
    """Counts a plan's queries as its share of the whole bar."""

    def __init__(self, bar: Progress, queries: int, units: int):
        super().__init__(queries, "", enabled=False)
        self._whole, self._units, self._counted = bar, units, 0

    def add(self, count: int = 1) -> None:
        self.done += count
        counted = self.done * self._units // self.total
        if counted > self._counted:
            self._whole.add(counted - self._counted)
            self._counted = counted

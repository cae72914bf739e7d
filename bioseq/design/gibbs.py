"""Gibbs sampling from the masked model (and homologs): variants for a library, without an objective.

Each chain starts from the wild type. A step masks one position and draws its residue with the probability that model
and homologs give it in the chain's own context, at a temperature, among what the constraints allow. Where a chain has
its most mutations, only mutated positions are drawn. (As Wang and Cho 2019, arXiv 1902.04094, one position at a time.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bioseq.design.constraints import Constraints
from bioseq.homologs.database import LETTERS
from bioseq.inference.batching import Window
from bioseq.inference.evidence import log_softmax
from bioseq.inference.query import Query
from bioseq.inference.variants import Model, WildType, window_around
from bioseq.progress import Progress

CHAINS = 32  # that run side by side, and are kept together


def masked(wild: WildType, row: np.ndarray, place: int) -> Query:
    """The variant with one residue masked, in the window around it."""
    alphabet, whole = wild.model.alphabet, wild.query
    ids = whole.ids.copy()
    known = np.flatnonzero(row < 20)
    ids[known] = np.array([alphabet.id(x) for x in LETTERS], ids.dtype)[row[known]]
    ids[place] = alphabet.mask_id
    window = window_around(place, place, len(ids), wild.model.max_residues)
    query = replace(
        whole, ids=ids[window.start : window.end], logits_at=np.array([place - window.start]),
        cover=[Window(0, window.end - window.start)], overlap=0, part_of=whole, start=window.start, evidence=None,
    )  # fmt: skip
    if whole.evidence is not None:
        query.evidence = whole.evidence[window.start : window.end]
    return query


def probabilities(model: Model, wild: WildType, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 [C, 20] of LETTERS at one masked place of each variant."""
    results = model.run([masked(wild, row, int(at)) for row, at in zip(rows, places, strict=True)])
    logs = log_softmax(np.concatenate([r.logits for r in results]))
    if wild.evidence is not None:
        logs = wild.evidence.mix(logs, places, model.alphabet)
    return logs[:, [model.alphabet.id(x) for x in LETTERS]]


def sample(
    model: Model,
    wild: WildType,
    constraints: Constraints,
    chains: range,
    *,
    steps: int,
    temperature: float,
    seed: int,
    bar: Progress | None = None,
) -> np.ndarray:
    """uint8 [len(chains), L]: where each chain stands after `steps`. A chain draws from its own seed, whichever others
    run beside it."""
    rngs = [np.random.default_rng([seed, 7, chain]) for chain in chains]
    rows = np.tile(constraints.wild, (len(chains), 1))
    orders = [np.concatenate([rng.permutation(constraints.free) for _ in range(-(-steps // len(constraints.free)))])
              for rng in rngs]  # fmt: skip
    faults = constraints.violations(rows)
    for step in range(steps):
        places = np.array([order[step] for order in orders])
        changed = rows != constraints.wild
        for i in np.flatnonzero(changed.sum(1) >= constraints.most).tolist():
            if not changed[i, places[i]]:
                places[i] = rngs[i].choice(np.flatnonzero(changed[i]))
        logs = probabilities(model, wild, rows, places) / temperature
        logs[~constraints.allowed[places]] = -np.inf
        p = np.exp(logs - logs.max(1, keepdims=True))
        new = rows.copy()
        for i, rng in enumerate(rngs):
            new[i, places[i]] = rng.choice(20, p=p[i] / p[i].sum())
        after = constraints.violations(new)
        # too few mutations is how every chain begins; nothing else may get worse
        short = np.maximum(constraints.fewest - (rows != constraints.wild).sum(1), 0)
        short_after = np.maximum(constraints.fewest - (new != constraints.wild).sum(1), 0)
        take = after - short_after <= faults - short
        rows[take], faults = new[take], np.where(take, after, faults)
        if bar is not None:
            bar.add(len(chains))
    return rows

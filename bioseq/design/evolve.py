"""Evolutionary search: recombination of good variants, and mutations drawn from the masked model and homologs.

After AdaLead (Sinai et al. 2020, arXiv 2010.02141): the parents of a generation are the best variants scored so far, a
child recombines two of them or copies one, and is mutated; here a mutation is drawn with the probability that model
and homologs give it instead of uniformly. A generation is a pure function of seed, number and what was scored before,
so that a run that was killed goes on to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bioseq.design.constraints import Constraints
from bioseq.design.scoring import Scorer, Scores

PARENTS = 0.25  # of a batch: the best so far
RECOMBINED = 0.5  # share of the children of two parents
REVERTED = 0.1  # share of the children in which one mutation goes back
UNIFORM = 0.1  # share of the mutations drawn regardless of model and homologs


@dataclass
class Scored:
    """What was scored so far: codes uint8 [N, L], violations int [N], the rest as in `Scores`."""

    codes: np.ndarray
    violations: np.ndarray
    scores: Scores

    @classmethod
    def of(cls, codes: np.ndarray, constraints: Constraints, scorer: Scorer) -> Scored:
        return cls(codes, constraints.violations(codes), scorer.score(codes))

    @classmethod
    def join(cls, parts: list[Scored]) -> Scored:
        s = [p.scores for p in parts]
        return cls(
            np.concatenate([p.codes for p in parts]),
            np.concatenate([p.violations for p in parts]),
            Scores(
                np.concatenate([x.mean for x in s]),
                np.concatenate([x.sd for x in s]),
                np.concatenate([x.bound for x in s]),
                {k: np.concatenate([x.columns[k] for x in s]) for k in s[0].columns},
            ),
        )

    def order(self) -> np.ndarray:
        """Best first: by violations, then by the bound; equal ones in the order in which they were scored."""
        return np.lexsort((np.arange(len(self.codes)), -self.scores.bound, self.violations))


def weights(table: np.ndarray, constraints: Constraints, temperature: float) -> np.ndarray:
    """float [L, 20]: how often each allowed residue is drawn; `table` has the zero-shot scores."""
    free = constraints.allowed.copy()
    free[np.setdiff1d(np.arange(len(free)), constraints.free)] = False
    w = np.where(free, np.exp(np.clip(table / temperature, -50, 50)), 0.0)
    return (1 - UNIFORM) * w / w.sum() + UNIFORM * free / free.sum()


def mutate(row: np.ndarray, count: int, weight: np.ndarray, rng: np.random.Generator) -> None:
    """`count` residues drawn anew, in place."""
    for _ in range(count):
        w = weight.copy()
        known = np.flatnonzero(row < 20)
        w[known, row[known]] = 0.0
        total = w.sum()
        if total <= 0:
            return
        at = int(np.searchsorted(np.cumsum(w.reshape(-1)), rng.random() * total, side="right"))
        at = min(at, w.size - 1)
        row[at // 20] = at % 20


def trim(row: np.ndarray, constraints: Constraints, rng: np.random.Generator) -> None:
    """At most as many mutations as allowed: random ones go back, in place."""
    changed = np.flatnonzero(row != constraints.wild)
    over = len(changed) - constraints.most
    if over > 0:
        back = rng.choice(changed, over, replace=False)
        row[back] = constraints.wild[back]


def children(
    best: np.ndarray, count: int, weight: np.ndarray, constraints: Constraints, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Of `best` uint8 [P, L], best first; without end."""
    while True:
        row = best[rng.integers(len(best))].copy()
        recombined = len(best) > 1 and rng.random() < RECOMBINED
        if recombined:
            other = best[rng.integers(len(best))]
            row = np.where(rng.random(len(row)) < 0.5, row, other).astype(np.uint8)
        changed = np.flatnonzero(row != constraints.wild)
        if len(changed) and rng.random() < REVERTED:
            at = rng.choice(changed)
            row[at] = constraints.wild[at]
        mutate(row, int(rng.poisson(0.5 if recombined else 1.0)) + (not recombined), weight, rng)
        trim(row, constraints, rng)
        yield row


def generation(
    number: int, seed: int, batch: int, so_far: Scored | None, weight: np.ndarray, constraints: Constraints
) -> np.ndarray:
    """uint8 [n <= batch, L]: the variants that generation `number` scores, none of them scored before. The first has
    random numbers of mutations."""
    rng = np.random.default_rng([seed, number])
    seen = {constraints.wild.tobytes()}
    pool, worst = constraints.wild[None], 0
    if so_far is not None:
        seen |= {row.tobytes() for row in so_far.codes}
        order = so_far.order()[: max(4, int(PARENTS * batch))]
        pool = so_far.codes[order]
        worst = int(so_far.violations[order[-1]])
    made: list[np.ndarray] = []
    source = children(pool, batch, weight, constraints, rng)
    for tries in range(40 * batch):
        if so_far is None:
            row = constraints.wild.copy()
            top = min(constraints.most, constraints.fewest + 4)
            mutate(row, int(rng.integers(constraints.fewest, top + 1)), weight, rng)
            trim(row, constraints, rng)
        else:
            row = next(source)
        if row.tobytes() in seen:
            continue
        # Where nothing is a design yet, steps towards one are taken.
        lenient = so_far is None and tries >= 20 * batch
        limit = 1 << 30 if lenient else worst
        if constraints.violations(row[None])[0] > limit:
            continue
        seen.add(row.tobytes())
        made.append(row)
        if len(made) == batch:
            break
    return np.array(made, np.uint8).reshape(-1, len(constraints.wild))


def evolve(
    generations: int,
    batch: int,
    seed: int,
    weight: np.ndarray,
    constraints: Constraints,
    scorer: Scorer,
    keep: Callable[[int, Callable[[], Scored]], Scored],
    so_far: Scored | None = None,
) -> Scored | None:
    """All that was scored, with what was `so_far`. `keep(number, make)` gives the part of a generation: what was kept
    of it, or `make()`."""
    for number in range(generations):

        def make(number: int = number, before: Scored | None = so_far) -> Scored:
            codes = generation(number, seed, batch, before, weight, constraints)
            return Scored.of(codes, constraints, scorer)

        part = keep(number, make)
        if len(part.codes):
            so_far = part if so_far is None else Scored.join([so_far, part])
        elif so_far is not None:
            break  # nothing new can be made
    return so_far


def diverse(found: Scored, number: int, distance: int, known: np.ndarray) -> list[int]:
    """Rows of designs, best first, no two closer than `distance` mutations, and none of the `known`."""
    old = {row.tobytes() for row in known}
    fit = (found.violations == 0) & np.isfinite(found.scores.bound)
    order = [int(i) for i in found.order() if fit[i] and found.codes[i].tobytes() not in old]
    chosen: list[int] = []
    for i in order:
        if len(chosen) == number:
            break
        if not chosen or (found.codes[chosen] != found.codes[i]).sum(1).min() >= distance:
            chosen.append(i)
    return chosen

"""Which variants fill a round's wells: a pure function of what is known, the settings and the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import rankdata

from training.campaigns.surrogates import Contest, Eyes, Forest, Gaussian, Surrogate, View, Warped, compete

SHORTLIST = 1500
CROWD = 0.25  # at most this share of a round within one mutation of a pick: the floor of diversity


@dataclass(frozen=True)
class Method:
    """The default is the frozen configuration; the rest is for ablations."""

    prior: bool = True
    surrogates: tuple[str, ...] = ("ranks", "gp", "ridge", "forest")
    acquisition: str = "thompson"  # or greedy
    temper: float = 0.25  # share of the posterior's spread in a draw
    first: str = "half"  # half by prior and half from all; prior; random
    top: float = 0.25  # share of the variants of as many mutations that count as high by prior


@dataclass
class Known:
    """What was measured of one objective: codes uint8 [n, S], values, and variance relative to a single well's."""

    codes: np.ndarray
    y: np.ndarray
    noise: np.ndarray
    goal: str = "max"
    threshold: float | None = None


@dataclass
class Picks:
    """Places in the pool, and for each its reason, mean and sd by objective (NaN without enough values); `contests` by
    the place of the objective."""

    rows: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    means: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    sds: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    contests: dict[int, Contest] = field(default_factory=dict)


def entrants(eyes: Eyes, method: Method, seed: int) -> list[Surrogate]:
    made: dict[str, Surrogate] = {
        "gp": Gaussian(eyes, epistasis=True, prior=method.prior),
        "ridge": Gaussian(eyes, epistasis=False, prior=method.prior),
        "ranks": Warped(Gaussian(eyes, epistasis=True, prior=method.prior)),
        "forest": Forest(eyes, seed),
    }
    return [made[name] for name in method.surrogates]


def choose(
    eyes: Eyes,
    pool: View,
    free: np.ndarray,
    known: Sequence[Known],
    pending: np.ndarray,
    batch: int,
    seed: int,
    method: Method,
) -> Picks:
    """`free` bool [N]: rows of the pool that may be picked. `pending` uint8 [P, S]: wells under way, which count as
    measured at their predicted value, so that a draw does not ask for the same again. Objectives with fewer than five
    values, or one value alone, take no part."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(free)
    batch = min(batch, len(rows))
    ready = [i for i, k in enumerate(known) if len(k.y) >= 5 and np.ptp(k.y) > 0]
    if batch and ready:
        picks = _learnt(eyes, pool, rows, [known[i] for i in ready], pending, batch, rng, seed, method)
        means, sds = np.full((2, len(known), len(picks.rows)), np.nan)
        means[ready], sds[ready] = picks.means, picks.sds
        contests = {ready[i]: c for i, c in picks.contests.items()}
        return Picks(picks.rows, picks.reasons, means, sds, contests)
    return _first(eyes, pool, rows, batch, rng, method)


def _first(
    eyes: Eyes, pool: View, rows: np.ndarray, batch: int, rng: np.random.Generator, method: Method
) -> Picks:
    picks = Picks()
    informed = method.prior and np.ptp(pool.linear[rows, 0]) > 0 if len(rows) else False
    by_prior = {"half": batch // 2, "prior": batch, "random": 0}[method.first] if informed else 0
    mixed = rng.permutation(rows)
    chosen = mixed[: batch - by_prior]
    rest = mixed[batch - by_prior :]
    low = _standing(pool, rows)[np.searchsorted(rows, rest)] > method.top
    picks.rows = np.r_[rest[~low], rest[low]][:by_prior].tolist()
    picks.reasons = ["prior: drawn from the high zero-shot scores"] * by_prior
    picks.rows += chosen.tolist()
    picks.reasons += ["explores: drawn from the whole space"] * len(chosen)
    return picks


def _standing(pool: View, rows: np.ndarray) -> np.ndarray:
    """float [len(rows)]: each one's rank by zero-shot score, 0 the best and 1 the last, among those of as many
    mutations: a sum over mutations would take the variants with the fewest."""
    scores, counts = pool.linear[rows, 0], pool.linear[rows, 1]
    out = np.empty(len(rows))
    for count in np.unique(counts):
        at = np.flatnonzero(counts == count)
        out[at] = rankdata(-scores[at]) / len(at)
    return out


def _spread(pool: View, order: np.ndarray, want: int) -> list[int]:
    """The first of `order` such that no more than a share CROWD lies within one mutation of a pick."""
    chosen: list[int] = []
    most = max(3, int(CROWD * want))
    for row in order:
        if len(chosen) == want:
            return chosen
        if chosen and int(((pool.codes[chosen] != pool.codes[row]).sum(1) <= 1).sum()) >= most:
            continue
        chosen.append(int(row))
    held = set(chosen)
    return chosen + [int(r) for r in order if int(r) not in held][: want - len(chosen)]


def _utility(values: np.ndarray, known: Sequence[Known]) -> np.ndarray:
    """float [goals, N] of the objectives to raise, with rows that miss a threshold far below."""
    missed = np.zeros(values.shape[1])
    goals = []
    for v, k in zip(values, known, strict=True):
        if k.threshold is not None:
            short = k.threshold - v if k.goal == ">=" else v - k.threshold
            missed += np.maximum(short, 0) / (k.y.std() or 1.0)
        else:
            goals.append(v if k.goal == "max" else -v)
    base = np.array(goals) if goals else np.zeros((1, values.shape[1]))
    return base - missed * 1e3


def _learnt(
    eyes: Eyes,
    pool: View,
    rows: np.ndarray,
    known: Sequence[Known],
    pending: np.ndarray,
    batch: int,
    rng: np.random.Generator,
    seed: int,
    method: Method,
) -> Picks:
    contests, all_means = [], []
    for k in known:
        view = eyes.look(k.codes)
        contest = compete(view, k.y, k.noise, entrants(eyes, method, seed))
        if len(pending):
            waiting = eyes.look(pending)
            codes = np.concatenate([k.codes, pending])
            y = np.concatenate([k.y, contest.winner.mean(waiting)])
            contest.winner.refit(eyes.look(codes), y, np.concatenate([k.noise, np.ones(len(pending))]))
        contests.append(contest)
        all_means.append(contest.winner.mean(pool))
    means = np.array(all_means)
    if all(k.threshold is not None for k in known):  # all that should pass are equal: not the first of them
        rows = rng.permutation(rows)
    total = _utility(means[:, rows], known)
    keep: list[int] = []
    for goal in total:
        keep += rows[np.argsort(-goal, kind="stable")[: max(SHORTLIST - 300, 2 * batch)]].tolist()
    few = rng.choice(rows, min(300, len(rows)), replace=False)
    short = np.unique(np.concatenate([keep, few]).astype(int))
    near = pool[short]
    sds = np.array([c.winner.sd(near) for c in contests])
    count = batch if method.acquisition == "thompson" else 1
    draws = np.array([c.winner.draws(near, count, rng) for c in contests])  # [objectives, count, short]
    centre = means[:, short][:, None]
    temper = method.temper if method.acquisition == "thompson" else 0.0
    draws = centre + temper * (draws - centre)
    chosen: list[int] = []
    taken = np.zeros(len(short), bool)
    close = np.zeros(len(short), int)  # picks within one mutation
    most = max(3, int(CROWD * batch))
    top = _utility(means[:, short], known).sum(0)
    leaders = set(np.argsort(-top, kind="stable")[:batch].tolist())
    for i in range(batch):
        goals = _utility(draws[:, i % count], known)
        bar = taken | (close >= most)
        bar = taken if bar.all() else bar
        at = _front(goals, bar, rng)
        taken[at] = True
        chosen.append(at)
        close += (near.codes != near.codes[at]).sum(1) <= 1
    picks = Picks([int(short[a]) for a in chosen], contests=dict(enumerate(contests)))
    picks.reasons = [
        "exploits: among the highest predicted"
        if a in leaders
        else "explores: high in one draw of the posterior"
        for a in chosen
    ]
    picks.means, picks.sds = means[:, short[chosen]], sds[:, chosen]
    return picks


def _front(goals: np.ndarray, bar: np.ndarray, rng: np.random.Generator) -> int:
    """The best free row; of several goals a random one that no other beats in all (sampled Pareto front)."""
    goals = np.where(bar, -np.inf, goals)
    if len(goals) == 1:
        best = np.flatnonzero(goals[0] == goals[0].max())  # many where thresholds alone are asked for
        return int(best[0] if len(best) == 1 else rng.choice(best))
    order = np.lexsort(-goals[::-1])
    front: list[int] = []
    for at in order:
        if bar[at]:
            break
        if not any((goals[:, f] >= goals[:, at]).all() for f in front):
            front.append(int(at))
    return front[int(rng.integers(len(front)))]

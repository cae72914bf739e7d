"""A round's proposal from a campaign's folder: a pure function of campaign, ledger and seed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bioseq.campaigns.campaign import Campaign, wells
from bioseq.campaigns.ledger import Event
from bioseq.campaigns.state import State
from bioseq.errors import InputError
from training.campaigns.choosing import Known, Method, Picks, choose, entrants
from training.campaigns.surrogates import Eyes, compete


def eyes_of(campaign: Campaign, pool: np.ndarray) -> Eyes:
    eyes = Eyes(campaign.space.wild, campaign.prior[campaign.space.sites])
    eyes.fit_scale(pool)
    return eyes


def known_of(campaign: Campaign, state: State) -> list[Known]:
    """What was measured of each objective; noise is relative to a single well's. Given standard errors are taken in
    units of their median."""
    out = []
    for i, o in enumerate(campaign.objectives):
        rows = state.measured(i)
        codes = campaign.space.encode([campaign.space.read(v) for v in rows])
        noise = np.array([1 / n for _, n, _, _ in rows.values()])
        errors = np.array([np.nan if e is None else e for *_, e, _ in rows.values()], float)
        there = np.isfinite(errors) & (errors > 0)
        if there.any():
            noise[there] = np.clip((errors[there] / np.median(errors[there])) ** 2, 0.05, 20)
        out.append(Known(codes, np.array([v[0] for v in rows.values()]), noise, o.goal, o.threshold))
    return out


def propose(
    campaign: Campaign, *, more: bool = False, after: int | None = None, method: Method | None = None
) -> dict[str, Any]:
    """Writes the next round and returns its summary. A round that nothing happened to yet is returned again instead,
    unless `more`; so is the last if there are more than `after` rounds. Killed anywhere, a repeat gives the same bytes."""
    with campaign.locked():
        state = campaign.state()
        made = after is not None and state.rounds > after
        if made or (state.rounds and state.untouched(state.rounds) and not more):
            campaign.plate(state.rounds)
            return json.loads((campaign.round_folder(state.rounds) / "proposal.json").read_text())
        number = state.rounds + 1
        used = sum(not well.startswith("+") for _, well in state.wells)
        settings = campaign.settings
        batch = min(settings.batch, settings.budget - used) if settings.budget else settings.batch
        if batch <= 0:
            raise InputError(
                f"the budget of {settings.budget} wells is used up.",
                code="campaign.budget",
                hint="Nothing was proposed.",
            )
        known = known_of(campaign, state)
        seed = int.from_bytes(hashlib.sha256(f"{settings.seed}/{number}".encode()).digest()[:4])
        leaders = _leaders(known)
        parents = known[0].codes[leaders] if leaders else np.zeros((0, len(campaign.space.sites)), np.uint8)
        pool = campaign.space.pool(np.random.default_rng(seed), parents)
        eyes = eyes_of(campaign, pool)
        closed = set(state.pending) | state.abandoned
        closed |= {e.variant for e in state.wells.values() if e.event in ("measured", "excluded")}
        rows = {c.tobytes() for c in _encoded(campaign, sorted(closed))}
        free = np.array([row.tobytes() not in rows for row in pool])
        controls = min(settings.controls, batch - 1)
        picks = choose(
            eyes,
            eyes.look(pool),
            free,
            known,
            _encoded(campaign, state.pending),
            batch - controls,
            seed,
            method or Method(),
        )
        if not picks.rows:
            raise InputError("no variant of the space is left to propose.", code="campaign.exhausted")
        names = [str(campaign.space.decode(pool[r])) for r in picks.rows]
        plate = _plate(campaign, number, names, picks, leaders, known, controls, seed)
        summary = _summary(campaign, number, picks, known)
        out = io.StringIO()
        writer = csv.DictWriter(out, list(plate[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plate)
        text = out.getvalue()
        source = hashlib.sha256(text.encode()).hexdigest()
        events = [Event("proposed", number, row["well"], row["variant"], source) for row in plate]
        campaign.record(
            number, {"plate.csv": text, "proposal.json": json.dumps(summary, indent=1) + "\n"}, events
        )
        return summary


def _encoded(campaign: Campaign, names: Sequence[str]) -> np.ndarray:
    variants = [campaign.space.read(v) for v in names]
    return campaign.space.encode([v for v in variants if v.changes])


def _leaders(known: Sequence[Known]) -> list[int]:
    k = known[0]
    return np.argsort(k.y if k.goal in ("min", "<=") else -k.y, kind="stable")[:50].tolist()


def _plate(
    campaign: Campaign,
    number: int,
    names: list[str],
    picks: Picks,
    leaders: list[int],
    known: Sequence[Known],
    controls: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Wells in a random order, so that a place on the plate is not a kind of variant; one of the controls is the best
    variant so far, the others are wild types."""
    kinds = [("variant", n, r) for n, r in zip(names, picks.reasons, strict=True)]
    best = [str(campaign.space.decode(known[0].codes[i])) for i in leaders]
    best = [b for b in best if b != "WT"][: 1 if controls > 1 else 0]
    kinds += [("best so far", b, "control: repeats the best measured variant") for b in best]
    kinds += [("wild type", "WT", "control: plate effects and noise")] * (controls - len(best))
    order = np.random.default_rng([seed, 9]).permutation(campaign.settings.plate)[: len(kinds)]
    grid = wells(campaign.settings.plate)
    out = []
    for i, (kind, variant, reason) in enumerate(kinds):
        row: dict[str, Any] = {
            "round": number,
            "well": grid[order[i]],
            "variant": variant,
            "kind": kind,
            "reason": reason,
        }
        for j, o in enumerate(campaign.objectives):
            shown = kind == "variant" and j in picks.contests
            mean, sd = (picks.means[j][i], picks.sds[j][i]) if shown else (0.0, 0.0)
            row[f"{o.column}_predicted"] = f"{mean:.5g}" if shown else ""
            row[f"{o.column}_low"] = f"{mean - 1.2816 * sd:.5g}" if shown else ""
            row[f"{o.column}_high"] = f"{mean + 1.2816 * sd:.5g}" if shown else ""
        out.append(row)
    return sorted(out, key=lambda r: grid.index(r["well"]))


def _summary(campaign: Campaign, number: int, picks: Picks, known: Sequence[Known]) -> dict[str, Any]:
    believed = {}
    for i, contest in picks.contests.items():
        k = known[i]
        believed[campaign.objectives[i].column] = {
            "surrogate": contest.winner.name,
            "spearman_held_out": contest.scores,
            "interval_coverage_80": round(contest.coverage, 4),
            "measured": [round(float(v), 6) for v in k.y],
            "predicted_held_out": [round(float(v), 6) for v in contest.predicted],
        }
    kinds = {w: sum(r.startswith(w) for r in picks.reasons) for w in ("prior", "exploits", "explores")}
    left_out = [
        f"{o.column}: {len(k.y)} measured variants; 5 with different values are needed to learn from"
        for i, (o, k) in enumerate(zip(campaign.objectives, known, strict=True))
        if i not in picks.contests and len(k.y)
    ]
    summary = {"round": number, "variants": len(picks.rows), "reasons": kinds, "believed": believed}
    return summary | ({"left_out": left_out} if left_out else {})


Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def fitted(campaign: Campaign) -> dict[str, Predict]:
    """By objective with enough data: what gives mean and standard deviation float [N] of codes uint8 [N, S] at the
    campaign's sites, by the surrogate that wins on all data so far. Raises `InputError` where none has."""
    out: dict[str, Predict] = {}
    for objective, known in zip(campaign.objectives, known_of(campaign, campaign.state()), strict=True):
        if len(known.y) >= 5 and np.ptp(known.y) > 0:
            out[objective.column] = _fitted(campaign, known)
    if not out:
        raise _no_data(campaign, 0, 0)
    return out


def _fitted(campaign: Campaign, known: Known) -> Predict:
    eyes = eyes_of(campaign, known.codes)
    rivals = entrants(eyes, Method(), campaign.settings.seed)
    winner = compete(eyes.look(known.codes), known.y, known.noise, rivals).winner

    def predict(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        view = eyes.look(codes)
        return winner.mean(view), winner.sd(view)

    return predict


def _no_data(campaign: Campaign, objective: int, count: int) -> InputError:
    return InputError(
        f"{campaign.objectives[objective].column}: {count} measured variants; a surrogate needs 5 with different values.",
        code="campaign.no_data",
        hint="Ingest results first.",
    )


def score_variants(
    campaign: Campaign, variants: Sequence[str], objective: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation float [N] of the surrogate that wins on all data so far; `variants` may lie outside
    the space's combinations, at its sites."""
    known = known_of(campaign, campaign.state())[objective]
    if len(known.y) < 5 or np.ptp(known.y) == 0:
        raise _no_data(campaign, objective, len(known.y))
    return _fitted(campaign, known)(campaign.space.encode([campaign.space.read(v) for v in variants]))

"""Heads on frozen features: every feature set and model is tried, rows that a fit did not see choose.

Where the validation part has 100 rows or more, of ten families or more, models train on the training rows, and the
validation rows choose, stop training and calibrate. With less, one number on them says little: then grouped
cross-validation over training and validation rows chooses, its out-of-fold outputs calibrate (cross-conformal, Vovk
2015), and the chosen model is fitted again on all of them; networks then train a fixed number of epochs, since there
is nothing to stop on. The test part is never looked at here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bioseq.specs.finetune import PROFILE
from training.finetune.metrics import MAIN, main_score, paired_bootstrap
from training.finetune.models.linear import (
    FREE,
    FREE_GAIN,
    L2_LINEAR,
    L2_RIDGE,
    Net,
    Standard,
    as_probabilities,
    class_weights,
    fit_logistic,
    fit_ridge,
    stack,
    standardise,
)
from training.finetune.models.network import fit_network
from training.finetune.models.rows import Rows, columns

FIXED_EPOCHS = 40
SHARES = {
    False: (0.25, 0.5, 1.0, 1.5, 2.0),
    True: (0.2, 0.35, 0.5, 0.65, 0.8),
}  # of a network beside homologs
ROWS_A_SITE = 10  # below, networks are not tried on variants of one protein
AUGMENTED = ("linear", ("onehot", "masked_marginal"))  # Hsu et al. 2022
BAGS = 5  # ridges on reweighted rows, whose spread shapes the intervals
ANY_PROTEIN = (
    ("embedding",),
    ("embedding", "composition", "dipeptide", "terminal"),
    ("embedding", "composition", "dipeptide", "gapped", "terminal"),
)
ONE_PROTEIN = (
    ("embedding",),
    ("onehot", "masked_marginal"),
    ("embedding", "onehot", "properties", "mutations", "masked_marginal"),
    ("onehot", "properties", "mutations", "masked_marginal"),
)


@dataclass
class Chosen:
    """The winner. `out` raw outputs, `spread` their members' standard deviation and `y` labels of the rows at `rows`,
    by models that did not see them; `tried` every setting with its score."""

    task: str
    blocks: tuple[str, ...]
    standard: Standard
    net: Net
    setting: dict[str, Any]
    out: np.ndarray
    spread: np.ndarray | None
    y: np.ndarray
    rows: np.ndarray
    offset: np.ndarray
    scale: np.ndarray
    tried: list[dict[str, Any]] = field(default_factory=list)

    def raw(self, x: np.ndarray) -> np.ndarray:
        return _raw(self.task, self.net, self.standard(x), self.offset, self.scale)[0]

    def outputs(self, x: np.ndarray) -> np.ndarray:
        """As `training.finetune.metrics` takes them, of a matrix of the chosen blocks."""
        return as_probabilities(self.task, self.raw(x))


def candidates(
    rows: Rows, models: tuple[str, ...], only: tuple[str, ...] | None
) -> list[tuple[str, tuple[str, ...]]]:
    """(model, blocks) to try. The homology block comes last: a network leads it straight to its outputs."""
    if only is not None:
        whole = ("embedding", *(b for b in only if b != "embedding"))
        sets: tuple[tuple[str, ...], ...] = (tuple(b for b in whole if b != PROFILE),)
    elif not rows.context.wild_type:
        sets = ANY_PROTEIN
    else:
        sets = ONE_PROTEIN
        if rows.context.odds is None:
            sets = tuple(dict.fromkeys(tuple(b for b in s if b != "masked_marginal") for s in sets))
        if "properties" in rows.context.absent:
            sets = tuple(dict.fromkeys(tuple(b for b in s if b != "properties") for s in sets))
        if np.isnan(rows.embeddings).any():  # most were not embedded: the sites say more
            sets = tuple(s for s in sets if "embedding" not in s)
    if rows.profile is not None:
        sets = (*sets, (*sets[-1], PROFILE))
    rich = sets[-2:] if rows.context.wild_type else tuple(dict.fromkeys((sets[0], sets[-1])))
    if rows.homology is not None:
        sets = tuple(dict.fromkeys((*sets, *((*s, "homology") for s in sets[-2:]))))
        rich = tuple(dict.fromkeys((rich[-1], *((*s, "homology") for s in rich[-2:]))))
    if "linear" in models and len(rows.y) < ROWS_A_SITE * len(rows.context.sites):
        rich = ()  # what a network adds are interactions of sites, which so few rows do not show
    out = [("linear", s) for s in sets if "linear" in models]
    # networks on few sets only: the others say little more for their time
    return out + [("mlp", s) for s in rich if "mlp" in models]


def fit_frozen(
    task: str,
    rows: Rows,
    n_out: int,
    *,
    models: tuple[str, ...] = ("linear", "mlp"),
    only: tuple[str, ...] | None = None,
    sets: tuple[tuple[str, ...], ...] | None = None,
    balance: str = "auto",
    seed: int = 0,
    tick: Callable[[str], None] | None = None,
) -> Chosen:
    """Try all candidates (every model on `sets` if they are given) and return the best by the task's main score. For
    variants of one protein the augmented model stays unless the paired interval of another's gain lies above zero: the
    more candidates and the fewer rows, the more of the best score is luck."""
    trials = [(m, s) for m in models for s in sets] if sets is not None else candidates(rows, models, only)
    best: tuple[float, _Trial, Any, dict[str, Any]] | None = None
    augmented: tuple[float, _Trial, Any, dict[str, Any]] | None = None
    tried: list[dict[str, Any]] = []
    for model, chosen in trials:
        trial = _Trial(task, rows, n_out, chosen, balance, seed)
        here = -np.inf
        for key, setting, value in trial.linear() if model == "linear" else trial.network():
            record = {"model": model, "blocks": list(chosen), **setting, "valid": round(float(value), 4)}
            tried.append(record)
            here = max(here, value)
            if best is None or value > best[0]:
                best = (value, trial, key, record)
            if (model, chosen) == AUGMENTED and (augmented is None or value > augmented[0]):
                augmented = (value, trial, key, record)
        if tick is not None:
            tick(f"{model} on {' + '.join(chosen)}: {MAIN[task]} {here:.3f} on rows held back")
    assert best is not None
    if augmented is not None:
        other, plain = best[1].out[best[2]], augmented[1].out[augmented[2]]
        if not _clearly_better(task, rows, other, plain, 0.05 / len(trials), seed):  # Bonferroni
            best = augmented
    found = best[1].finish(best[2], best[3])
    found.tried = tried
    return found


def _clearly_better(
    task: str, rows: Rows, out: np.ndarray, plain: np.ndarray, error: float, seed: int
) -> bool:
    """Whether the interval of a model's gain over another, on rows held back, lies above zero; `error` is its level."""
    y = rows.y[rows.out_of_fold]
    a, b = as_probabilities(task, out), as_probabilities(task, plain)

    def gain(r: np.ndarray) -> float:
        return main_score(task, y[r], a[r]) - main_score(task, y[r], b[r])

    groups = np.arange(len(y)) if rows.groups is None else rows.groups[rows.out_of_fold]
    return paired_bootstrap(groups, gain, level=1 - error, seed=seed)[1] > 0


def fit_again(
    task: str, rows: Rows, n_out: int, like: Chosen, *, balance: str = "auto", seed: int = 0
) -> Chosen:
    """The model that was chosen, with its settings, on other rows."""
    trial = _Trial(task, rows, n_out, like.blocks, balance, seed)
    key = "mlp" if like.setting["model"] == "mlp" else ("linear", like.setting["l2"])
    standard, net, offset, scale = trial.on_all(key)
    return replace(like, standard=standard, net=net, offset=offset, scale=scale)


def _target_scale(task: str, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if task != "regression":
        return np.zeros(y.shape[1]), np.ones(y.shape[1])
    return np.nanmean(y, axis=0), np.maximum(np.nanstd(y, axis=0), 1e-12)


def _raw(
    task: str, net: Net, x: np.ndarray, offset: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """(mean over members [N, C], their standard deviation or None)."""
    members = net.members(torch.from_numpy(x)).numpy()
    if task == "regression":
        members = members * scale + offset
    return members.mean(0), members.std(0) if task == "regression" and len(members) > 1 else None


class _Trial:
    """One feature set: its matrix for each fold, and both kinds of model on it."""

    def __init__(self, task: str, rows: Rows, n_out: int, chosen: tuple[str, ...], balance: str, seed: int):
        self.task, self.rows, self.n_out, self.chosen = task, rows, n_out, chosen
        self.balance, self.seed = balance, seed
        fixed = tuple(b for b in chosen if b != "homology")
        self.fixed = columns(fixed, rows.embeddings, rows.sequences, rows.context, profile=rows.profile)
        self.cache: dict[int, Any] = {}
        self.found: dict[Any, list[Any]] = {}
        # raw outputs on the rows held back, in order of the folds
        self.out: dict[Any, np.ndarray] = {}

    def matrix(self, train: np.ndarray) -> tuple[np.ndarray, list[int]]:
        parts = list(self.fixed)
        if "homology" in self.chosen:
            assert self.rows.homology is not None
            parts.append(self.rows.homology(train))
        return np.concatenate(parts, axis=1, dtype=np.float32), [p.shape[1] for p in parts]

    def prepared(
        self, train: np.ndarray, free: bool
    ) -> tuple[Standard, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(standard, standardised matrix, scaled labels, offset, scale)."""
        x, widths = self.matrix(train)
        gains = [FREE_GAIN if free and b in FREE else 1.0 for b in self.chosen]
        standard = standardise(x[train], widths, gains, [free and b == "onehot" for b in self.chosen])
        offset, scale = _target_scale(self.task, self.rows.y[train])
        return standard, standard(x), (self.rows.y - offset) / scale, offset, scale

    def value(self, places: np.ndarray, raw: np.ndarray) -> float:
        found = main_score(self.task, self.rows.y[places], as_probabilities(self.task, raw))
        return found if np.isfinite(found) else -np.inf

    # ------------------------------------------------------------------ linear

    def _path(self, train: np.ndarray, l2s: tuple[float, ...]) -> tuple[Any, list[tuple[float, Net]]]:
        ready = self.prepared(train, free=True)
        _, design, y, _, _ = ready
        weight = self.rows.weight[train]
        if self.task == "regression":
            return ready, fit_ridge(design[train], y[train], weight, l2s)
        positive = class_weights(self.task, self.rows.y[train], self.n_out, self.balance)
        net, fitted = None, []
        for a in l2s:
            net = fit_logistic(self.task, design[train], y[train], weight, positive, self.n_out, a, net)
            fitted.append((a, net))
        return ready, fitted

    def linear(self) -> list[tuple[Any, dict[str, Any], float]]:
        l2s = L2_RIDGE if self.task == "regression" else tuple(sorted(L2_LINEAR, reverse=True))
        outs: dict[float, list[np.ndarray]] = {a: [] for a in l2s}
        for train, valid in self.rows.folds:
            ready, fitted = self._path(train, l2s)
            standard, design, _, offset, scale = ready
            for a, net in fitted:
                outs[a].append(_raw(self.task, net, design[valid], offset, scale)[0])
                self.found.setdefault(("linear", a), []).append((standard, net, offset, scale))
        self.out |= {("linear", a): np.concatenate(outs[a]) for a in l2s}
        held = self.rows.out_of_fold
        return [(("linear", a), {"l2": a}, self.value(held, self.out["linear", a])) for a in l2s]

    def _bagged(self, train: np.ndarray, l2: float) -> Any:
        """The ridge, and around it ridges on rows weighted at random (Rubin 1981), so that their spread tells where
        labels are few. Their mean is moved to the ridge, which needs no averaging."""
        standard, design, y, offset, scale = self.prepared(train, free=True)
        rng, weight = np.random.default_rng(self.seed), self.rows.weight[train]

        def fit(by: np.ndarray | float) -> Net:
            return fit_ridge(design[train], y[train], weight * by, (l2,))[0][1]

        plain, bags = fit(1.0), stack([fit(rng.exponential(size=len(train))) for _ in range(BAGS)])
        layers = [
            (w - w.mean(0) + own, b - b.mean(0) + shift)
            for (w, b), (own, shift) in zip(bags.layers, plain.layers)
        ]
        return standard, Net(layers), offset, scale

    # ----------------------------------------------------------------- network

    def _network(self, train: np.ndarray, valid: np.ndarray) -> Any:
        standard, design, y, offset, scale = self.prepared(train, free=False)
        small = len(self.rows.y) < 1000 or design.shape[1] < 200
        own = self.matrix(train)[1][-1] if "homology" in self.chosen else 0
        width = design.shape[1] - own
        live = np.flatnonzero(
            standard.scale[:width] > 0
        )  # most substitutions of a long protein are in no row
        seen = np.ascontiguousarray(design[:, live])
        epochs = [0]

        def value_of(net: Net) -> float:
            if self.rows.refit:  # nothing to stop on: the last epoch counts as the best
                epochs[0] += 1
                return float(epochs[0])
            return self.value(valid, _raw(self.task, net, seen[valid], offset, scale)[0])

        net, _, epoch = fit_network(
            self.task,
            seen[train],
            y[train],
            self.rows.weight[train],
            class_weights(self.task, self.rows.y[train], self.n_out, self.balance),
            self.n_out,
            value_of,
            members=5 if self.task == "regression" else 3,
            dropout=0.3 if small else 0.5,
            epochs=FIXED_EPOCHS if self.rows.refit else 60,
            batch=64 if small else 256,
            seed=self.seed,
        )
        (first, bias), *rest = net.layers
        whole = torch.zeros(len(first), width, first.shape[2])
        whole[:, live] = first
        net = Net([(whole, bias), *rest])
        if own:
            mixed = [
                self._mixed(net, own, standard, offset, scale, a) for a in SHARES[self.task == "regression"]
            ]
            if self.rows.refit:
                net = mixed[len(mixed) // 2]
            else:
                net = max(
                    mixed,
                    key=lambda m: self.value(valid, _raw(self.task, m, design[valid], offset, scale)[0]),
                )
        return standard, net, offset, scale, epoch

    def _mixed(
        self, net: Net, own: int, standard: Standard, offset: np.ndarray, scale: np.ndarray, share: float
    ) -> Net:
        """share * network + transferred labels (a regression: (1 - share) * them), as one net with a skip from the
        homology block, whose first columns are the transferred labels."""
        beta = 1 - share if self.task == "regression" else 1.0
        (first, first_bias), (last, last_bias) = net.layers
        members, _, hidden = first.shape
        skip, shift = np.zeros((own, self.n_out)), np.zeros(self.n_out)
        mean, by = standard.mean[-own:], standard.scale[-own:]
        for j in range(self.n_out):
            unit, zero = (scale[j], offset[j]) if self.task == "regression" else (1.0, 0.0)
            if by[j] > 0:
                skip[j, j] = beta / by[j] / unit
            shift[j] = beta * (mean[j] - zero) / unit
        return Net(
            [
                (torch.cat([first, torch.zeros(members, own, hidden)], 1), first_bias),
                (last * share, last_bias * share + torch.from_numpy(shift).float()),
            ],
            torch.from_numpy(skip).float().repeat(members, 1, 1),
        )

    def network(self) -> list[tuple[Any, dict[str, Any], float]]:
        outs, last = [], None
        for train, valid in self.rows.folds:
            last = self._network(train, valid)
            standard, net, offset, scale, _ = last
            outs.append(_raw(self.task, net, standard(self.matrix(train)[0][valid]), offset, scale)[0])
            self.found.setdefault("mlp", []).append(last[:4])
        assert last is not None
        setting = {"hidden": 96, "members": len(last[1].layers[0][0]), "epochs": last[4]}
        self.out["mlp"] = np.concatenate(outs)
        return [("mlp", setting, self.value(self.rows.out_of_fold, self.out["mlp"]))]

    # ------------------------------------------------------------------ winner

    def on_all(self, key: Any) -> Any:
        """The model of a setting, fitted on all rows."""
        everything = np.arange(len(self.rows.y))
        if key == "mlp":
            return self._network(everything, everything[:0])[:4]
        if self.task == "regression":
            # the folds' penalty was in proportion to their rows: it must not grow with those that are added
            share = float(np.mean([len(train) for train, _ in self.rows.folds or [(everything, everything)]]))
            return self._bagged(everything, key[1] * share / len(everything))
        (standard, _, _, offset, scale), fitted = self._path(everything, (key[1],))
        return standard, fitted[0][1], offset, scale

    def finish(self, key: Any, record: dict[str, Any]) -> Chosen:
        """The final model, and outputs of models that did not see the rows that calibrate."""
        models = self.found[key]
        if key != "mlp" and self.task == "regression":
            models = [self._bagged(train, key[1]) for train, _ in self.rows.folds]
        outs, spreads = [], []
        for (train, valid), (standard, net, offset, scale) in zip(self.rows.folds, models):
            out, spread = _raw(self.task, net, standard(self.matrix(train)[0][valid]), offset, scale)
            outs.append(out)
            spreads.append(spread)
        final = self.on_all(key) if self.rows.refit else models[0]
        held = self.rows.out_of_fold
        order = np.argsort(held, kind="stable")
        standard, net, offset, scale = final
        return Chosen(
            self.task,
            self.chosen,
            standard,
            net,
            record,
            np.concatenate(outs)[order],
            np.concatenate([s for s in spreads if s is not None])[order] if spreads[0] is not None else None,
            self.rows.y[held[order]],
            held[order],
            offset,
            scale,
        )

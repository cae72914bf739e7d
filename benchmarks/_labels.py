"""Heads on few labels, and whether their intervals hold: on avGFP (Sarkisyan et al. 2016) and GB1 (Wu et al. 2016)."""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SIZES = (24, 96, 384)
UNIVERSE = 3000  # random variants that labels and tests are drawn from; all singles beside them, to test on
HELD = 0.25  # share of the varied positions that no training variant mutates


def avgfp(data: Path) -> tuple[str, Any]:
    """(wild type, labels) of the variants that agree with P42212, in a fixed shuffled order."""
    from bioseq.sequences.fasta import read_fasta
    from training.tables.labels import read_labels

    wild = next(r.sequence for r in read_fasta(data / "swissprot_train.fasta.gz") if r.id == "P42212")
    rows = []
    with gzip.open(data / "avgfp.csv.gz", "rt") as handle:
        for row in csv.DictReader(handle, delimiter=";"):
            found = [m for m in row["variant"].split("/") if m]
            if found and all(
                m[1:-1].isdigit()
                and int(m[1:-1]) <= len(wild)
                and wild[int(m[1:-1]) - 1] == m[0]
                and m[-1] in "ACDEFGHIKLMNPQRSTVWY"
                for m in found
            ):
                rows.append((":".join(found), row["fitness"]))
    random.Random(0).shuffle(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "avgfp.csv"
        path.write_text("mutant,fitness\n" + "".join(f"{m},{y}\n" for m, y in rows))
        return wild, read_labels(path, ["fitness"], wild_type=wild, replicates="mean")


def universe(args: argparse.Namespace, model: Any) -> SimpleNamespace:
    """What all draws share, computed once: labels, embeddings, and the backbone's score mixed with homologs. The rules
    were settled on draws from `--part settling`; figures come from `reporting`, which shares no variant with it."""
    from bioseq.heads.features import Context, compute
    from training.finetune.embeddings import embed_cached
    from training.tables.variants import differences

    wild, labels = avgfp(Path(args.data))
    order = differences(labels.sequences, wild).sum(1)
    settling = drawn = np.random.default_rng(0).choice(len(labels), UNIVERSE, replace=False)
    if args.part == "reporting":
        others = np.setdiff1d(np.arange(len(labels)), settling)
        drawn = np.random.default_rng(1).choice(others, UNIVERSE, replace=False)
    singles = np.setdiff1d(np.flatnonzero(order == 1), np.concatenate([settling, drawn]))
    some = labels.take(np.concatenate([drawn, singles]))
    odds = np.asarray(model.scan(wild, strategy="masked-marginals", homologs="auto"), np.float32)
    found, _ = embed_cached(model, some.sequences, cache=args.cache, label="embedding the variants")
    return SimpleNamespace(
        wild=wild,
        labels=some,
        differs=differences(some.sequences, wild),
        odds=odds,
        score=compute("masked_marginal", some.sequences, Context(wild, (), odds))[:, 0],
        embeddings=np.stack(found).reshape(len(found), -1),
    )


def draw(u: SimpleNamespace, seed: int, unseen: bool) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, in an order whose beginnings are the smaller sets; rows to test on)."""
    rng = np.random.default_rng(seed)
    if not unseen:
        order = rng.permutation(UNIVERSE)
        return order[1000:], order[:1000]
    held = np.zeros(len(u.wild), bool)
    sites = np.flatnonzero(u.differs.any(0))
    held[rng.permutation(sites)[: int(HELD * len(sites))]] = True
    inside, outside = (u.differs & held).any(1), (u.differs & ~held).any(1)
    return rng.permutation(np.flatnonzero(~inside[:UNIVERSE])), np.flatnonzero(inside & ~outside)


def table(u: SimpleNamespace, train: np.ndarray, test: np.ndarray, seed: int) -> tuple[Any, Any, str]:
    """(rows, held, by what the folds are grouped), as `bioseq finetune` makes them of a table with a `set` column."""
    from dataclasses import replace

    from bioseq.heads.features import Context
    from training.finetune.models.rows import Held, Rows
    from training.tables.labels import TEST, TRAIN
    from training.tables.splits import make_split

    every = np.concatenate([train, test])
    labels = replace(u.labels.take(every), part=np.repeat([TRAIN, TEST], [len(train), len(test)]))
    split = make_split(labels, seed=seed, measure=False)
    both = np.arange(len(train))
    folds, by = split.folds(both, seed=seed)
    context = Context(u.wild, tuple(np.flatnonzero(u.differs[train].any(0)).tolist()), u.odds)
    texts = labels.sequences
    rows = Rows(
        u.embeddings[train], texts[: len(train)], labels.y[both], np.ones(len(train)), folds, True, context
    )
    return rows, Held(u.embeddings[test], texts[len(train) :]), by


def hsu(u: SimpleNamespace, train: np.ndarray, test: np.ndarray, seed: int, score: bool) -> np.ndarray:
    """The augmented ridge of Hsu et al. 2022, by scikit-learn: one-hot residues of the whole sequence, and with `score`
    the zero-shot score, standardised and all but unpenalised; the penalty by 5-fold cross-validated Spearman."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold

    from bioseq.ranking import spearman

    letters = np.frombuffer("".join(u.labels.sequences).encode(), np.uint8).reshape(len(u.labels), -1)

    def design(rows: np.ndarray) -> np.ndarray:
        hot = (letters[rows][:, :, None] == np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)).reshape(
            len(rows), -1
        )
        if not score:
            return hot.astype(float)
        z = (u.score[rows] - u.score[train].mean()) / u.score[train].std()
        return np.column_stack([hot, 100 * z])  # its penalty is 1e-4 of the others

    x, y, z = design(train), u.labels.y[train, 0], design(test)
    best, at = -np.inf, 1.0
    for alpha in np.logspace(-3, 3, 13):
        out = np.empty(len(y))
        for a, b in KFold(5, shuffle=True, random_state=seed).split(x):
            out[b] = Ridge(alpha=alpha, solver="cholesky").fit(x[a], y[a]).predict(x[b])
        found = spearman(y, out)
        if np.isfinite(found) and found > best:
            best, at = found, alpha
    return Ridge(alpha=at, solver="cholesky").fit(x, y).predict(z)


def few(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """24, 96 and 384 labelled variants of avGFP, tested on positions never seen and at random."""
    from bioseq.ranking import spearman
    from training.finetune.models.frozen import fit_frozen

    u = universe(args, model)
    out: dict[str, Any] = {
        "backbone": model.weights_hash,
        "part": args.part,
        "universe": len(u.labels),
        "tests": {},
    }
    for name in ("unseen positions", "random"):
        for size in SIZES:
            scores: dict[str, list[float]] = {}
            chosen, grouped, tested = [], set(), []
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                pool, test = draw(u, seed, name != "random")
                train = pool[:size]
                rows, held, by = table(u, train, test, seed)
                best = fit_frozen("regression", rows, 1, seed=seed)
                truth = u.labels.y[test, 0]
                values = {
                    "head": best.outputs(held.matrix(best.blocks, rows.context, rows.trained))[:, 0],
                    "onehot_ridge": hsu(u, train, test, seed, False),
                    "zero_shot_with_homologs": u.score[test],
                    "augmented_ridge": hsu(u, train, test, seed, True),
                }
                for key, value in values.items():
                    found = spearman(truth, value)
                    scores.setdefault(key, []).append(found if np.isfinite(found) else 0.0)
                chosen.append(f"{best.setting['model']}: {' + '.join(best.blocks)}")
                grouped.add(by)
                tested.append(len(test))
            mean = {key: statistics.mean(v) for key, v in scores.items()}
            others = {k: v for k, v in mean.items() if k != "head"}
            rival = max(others, key=lambda k: others[k])
            paired = np.array(scores["head"]) - np.array(scores[rival])
            out["tests"][f"{name}, {size} labels"] = {
                "mean_spearman": mean,
                "best_other": rival,
                "head_less_best_other": {
                    "mean": float(paired.mean()),
                    "standard_error": float(paired.std(ddof=1) / len(paired) ** 0.5)
                    if len(paired) > 1
                    else None,
                },
                "at_least_as_good": bool(paired.mean() >= -0.0005),
                "seeds": [args.first_seed, args.first_seed + args.seeds - 1],
                "test_rows": [min(tested), max(tested)],
                "folds_grouped_by": sorted(grouped),
                "chosen": {c: chosen.count(c) for c in sorted(set(chosen))},
                "each": scores,
            }
            print(name, size, {k: round(v, 3) for k, v in mean.items()}, flush=True)
    return out


def interval(best: Any, rows: Any, held: Any, truth: np.ndarray) -> dict[str, Any]:
    """Coverage and mean width of the 90 % intervals of a fitted model on the test rows."""
    import torch

    from bioseq.heads.calibration import half_widths
    from training.finetune.evaluation.calibrate import calibrate
    from training.finetune.evaluation.calibrate import coverage as covered

    fitted = calibrate(SimpleNamespace(task="regression"), best.out, best.y, 0.9, best.spread)  # type: ignore[arg-type]
    x = torch.from_numpy(best.standard(held.matrix(best.blocks, rows.context, rows.trained)))
    members = best.net.members(x).numpy() * best.scale + best.offset
    value, half = members.mean(0)[:, 0], half_widths(members.std(0), fitted)[:, 0]
    return {
        "coverage": covered(truth, value - half, value + half),
        "mean_width": float(2 * half.mean()),
        "width_over_spread_of_labels": float(2 * half.mean() / truth.std()),
        "calibrated_on": len(best.y),
        "varies": "spread" in fitted,
    }


def coverage(args: argparse.Namespace, model: Any, gb1: Any, sets: Any) -> dict[str, Any]:
    """90 % intervals on test rows that chose nothing: three exchangeable splits, and GB1 two_vs_rest beside them, whose
    test variants have more mutations than those that calibrate."""
    from training.finetune.models.frozen import fit_frozen

    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("sampled", "two_vs_rest"):
        parts, rows, held = gb1(args, model, name)
        for seed in range(args.seeds):
            best = fit_frozen("regression", rows, 1, sets=sets[2:3], seed=seed)
            found.setdefault(f"gb1 {name}", []).append(interval(best, rows, held, parts["test"].y[:, 0]))
            print(name, found[f"gb1 {name}"][-1], flush=True)
    u = universe(args, model)
    for name, size, valid in (
        ("avgfp, 1600 labels and 400 to calibrate", 2000, 400),
        ("avgfp, 384 labels, folds", 384, 0),
    ):
        for seed in range(2 * args.seeds):
            pool, test = draw(u, seed, False)
            rows, held, _ = table(u, pool[:size], test, seed)
            if valid:
                rows.folds, rows.refit = [(np.arange(size - valid), np.arange(size - valid, size))], False
            best = fit_frozen(
                "regression", rows, 1, models=("linear",), sets=(("onehot", "masked_marginal"),), seed=seed
            )
            found.setdefault(name, []).append(interval(best, rows, held, u.labels.y[test, 0]))
        print(name, found[name][-1], flush=True)
    out: dict[str, Any] = {"backbone": model.weights_hash, "level": 0.9, "splits": {}}
    for name, each in found.items():
        mean = statistics.mean(e["coverage"] for e in each)
        out["splits"][name] = {
            "exchangeable": "two_vs_rest" not in name,
            "mean_coverage": mean,
            "mean_width": statistics.mean(e["mean_width"] for e in each),
            "within_88_92": 0.88 <= mean <= 0.92,
            "seeds": each,
        }
    return out

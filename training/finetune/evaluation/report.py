"""Calibrate a fitted head on rows that it did not train on, then measure it once on the test part, beside baselines
that saw the same rows. It passes only if the paired interval of its gain lies above zero for every one of them, and the
test part holds groups enough for an interval to mean something."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import numpy as np

from bioseq.heads.features import clean
from bioseq.heads.head import Head
from bioseq.heads.relatives import Links
from bioseq.inference.predictor import Predictor
from bioseq.specs.finetune import FinetuneSpec
from training.finetune import metrics
from training.finetune.evaluation import baselines, uncertainty
from training.finetune.evaluation.calibrate import Reliability, calibrate, reliability
from training.finetune.fit import Fit, n_outputs
from training.finetune.metrics import MAIN, Scorer
from training.finetune.ood import shuffled
from training.tables.labels import Labels
from training.tables.splits import Split

SHUFFLED = 200  # test proteins whose shuffled residues the out-of-domain score is tried on
CURVE, REPEATS = (24, 96, 384), 3
FEWEST = 6  # groups in the test part; of fewer, a head without any gain passes in more than 1 case of 20


def scorer(task: str, labels: Labels, output: Any, thresholds: list[float] | None = None) -> Scorer:
    """A function from places of test rows to scores; per residue it counts, so resampling proteins is cheap."""
    if task != "per_residue":
        return lambda rows: metrics.score(task, labels.y[rows], output[rows], thresholds=thresholds)
    assert labels.residues is not None
    counts = [metrics.confusion(t.astype(float), p) for t, p in zip(labels.residues, output)]
    tables, losses = np.stack([t for t, _ in counts]), np.array([loss for _, loss in counts])
    return lambda rows: metrics.from_confusion(tables[rows].sum(0), losses[rows].sum())


def main_scorer(task: str, labels: Labels, output: Any) -> Any:
    """A function from places of test rows to the main score alone."""
    if task != "per_residue":
        return lambda rows: metrics.main_score(task, labels.y[rows], output[rows])
    assert labels.residues is not None
    right = np.array([((t >= 0) & (p.argmax(1) == t)).sum() for t, p in zip(labels.residues, output)])
    total = np.array([(t >= 0).sum() for t in labels.residues])
    return lambda rows: float(right[rows].sum() / max(total[rows].sum(), 1))


def _outputs(
    head: Head, fit: Fit, part: str, labels: Labels, links: Links | None
) -> tuple[Any, np.ndarray | None]:
    """(raw outputs, members' outputs [M, N, C] or None per residue)."""
    texts = [clean(s) for s in labels.sequences]
    features = fit.features[part]
    told = fit.told(part, links)
    raw: list[Any] = []
    members = []
    for at in range(0, len(texts), 512):
        some = np.arange(at, min(at + 512, len(texts)))
        args = [texts[i] for i in some], told.take(some)
        if head.per_residue:
            raw.extend(head.raw(features[at : at + 512], *args))
        else:
            members.append(head.members(features[some], *args))
    if head.per_residue:
        return raw, None
    each = np.concatenate(members, axis=1)
    return each.mean(0), each


def _as_metric(head: Head, raw: Any) -> Any:
    if head.task == "regression":
        return raw
    return [head.probabilities(r) for r in raw] if head.per_residue else head.probabilities(raw)


def report(
    spec: FinetuneSpec,
    head: Head,
    labels: Labels,
    split: Split,
    places: dict[str, np.ndarray],
    parts: dict[str, Labels],
    fit: Fit,
    predictor: Predictor,
    method: str,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Reliability]]:
    """(calibration, evidence, reliability curves on the test part). Sets `head.calibration`."""
    task, test = labels.task, parts["test"]
    far = {part: links.distant() for part, links in fit.links.items()}
    cal_out, cal_y, cal_spread = fit.cal_out, fit.cal_y, fit.cal_spread
    if cal_out is None or cal_y is None:
        raw, each = _outputs(head, fit, "valid", parts["valid"], far.get("valid"))
        if task == "per_residue":
            assert parts["valid"].residues is not None
            cal_out = np.concatenate(raw)
            cal_y = np.concatenate(parts["valid"].residues).astype(float)
        else:
            cal_out, cal_y = raw, parts["valid"].y
            cal_spread = each.std(0) if each is not None and len(each) > 1 else None
    calibration = calibrate(head, cal_out, cal_y, spec.level, cal_spread)
    head.calibration = calibration
    raw, members = _outputs(head, fit, "test", test, far.get("test"))
    output = _as_metric(head, raw)
    own = scorer(task, test, output, calibration.get("thresholds"))
    everything, (groups, by) = np.arange(len(test)), split.tested(places["test"])
    distinct = len(np.unique(groups))
    others = _baselines(spec, task, parts, fit) | fit.baselines
    scores = {name: scorer(task, test, out)(everything) for name, out in others.items()}
    main = MAIN[task]
    gains = _gains(spec, task, test, output, others, groups)
    best = max(scores, key=lambda k: scores[k][main] if np.isfinite(scores[k][main]) else -np.inf)
    hardest = min(gains, key=lambda k: gains[k]["low"])
    evidence: dict[str, Any] = {
        "task": task,
        "targets": list(labels.targets or labels.classes),
        "method": method,
        "main": main,
        "metrics": own(everything),
        "intervals": metrics.bootstrap(groups, own, rounds=spec.bootstrap, seed=spec.seed),
        "resampled": {"by": by, "groups": distinct, "least": FEWEST},
        "baselines": scores,
        "best_baseline": best,
        "gains": gains,
        "hardest_baseline": hardest,
        "gain": gains[hardest],
        "beats_baseline": distinct >= FEWEST and all(g["low"] > 0 for g in gains.values()),
        "too_few_groups": _too_few(distinct, by),
        "rows": {p: len(some) for p, some in parts.items()},
        "labelled": {p: some.labelled() for p, some in parts.items()},
        # convolutions that read embeddings were fitted on embedded rows alone, and say so
        "trained_on": fit.chosen.get("rows", len(fit.trained)),
        "calibrated": fit.calibrated,
        "split": split.how,
        "warnings": list(split.warnings),
        "notes": _notes(spec, labels, split, parts, fit),
        "chosen": fit.chosen,
        "tried": fit.tried,
        "cost": fit.cost,
        "data_hash": labels.data_hash,
        "seed": spec.seed,
        "licence": spec.licence,
        "versions": versions(),
    }
    if fit.links:
        evidence["homologs"] = _homologs(head, fit, test, own(everything)[main])
    if task == "multilabel":
        evidence["per_label"] = {
            label: {
                "positives": int(np.nansum(test.y[:, j])),
                **metrics.binary(test.y[:, j], output[:, j], calibration["thresholds"][j]),
            }
            for j, label in enumerate(labels.classes)
        }
    if task == "regression" and len(labels.targets) > 1:
        evidence["per_target"] = {
            t: metrics.regression(test.y[:, j], output[:, j]) for j, t in enumerate(labels.targets)
        }
    curves = _curves(head, test, output)
    if task == "regression":
        assert members is not None
        evidence["calibration"] = uncertainty.of_intervals(spec, head, test, fit, members, len(cal_y))
    else:
        evidence["calibration"] = {
            "rows": len(cal_y),
            "ece": float(np.mean([c.ece for c in curves.values()])),
            "ece_by_label": {name: c.ece for name, c in curves.items()},
        }
    evidence["ood"] = _ood(spec, head, test, fit, predictor, method)
    if fit.relearn is not None and fit.rows is not None:
        evidence["learning_curve"] = _learning_curve(task, test, fit, evidence["metrics"][main])
    return calibration, evidence, curves


def _too_few(groups: int, by: str) -> str | None:
    """Why no interval of this test part can be trusted."""
    if groups >= FEWEST:
        return None
    return f"the test part holds {groups} group{'s' * (groups != 1)} by {by}; an interval needs at least {FEWEST} to resample"


def _gains(
    spec: FinetuneSpec, task: str, test: Labels, output: Any, others: dict[str, Any], groups: np.ndarray
) -> dict[str, dict[str, float]]:
    """What the head's main score is above each baseline's, on the same resamples."""
    mine = main_scorer(task, test, output)
    out = {}
    for name, theirs in others.items():
        other = main_scorer(task, test, theirs)

        def difference(rows: np.ndarray, other: Any = other) -> float:
            value = other(rows)
            return mine(rows) - (value if np.isfinite(value) else 0.0)  # a constant ranks nothing

        found = metrics.paired_bootstrap(groups, difference, rounds=spec.bootstrap, seed=spec.seed)
        out[name] = dict(zip(("value", "low", "high"), found))
    return out


def _baselines(spec: FinetuneSpec, task: str, parts: dict[str, Labels], fit: Fit) -> dict[str, Any]:
    if task == "per_residue":
        sequences = {p: [clean(s) for s in some.sequences] for p, some in parts.items()}
        states = {p: some.residues or [] for p, some in parts.items()}
        classes = len(parts["train"].classes)
        out: dict[str, Any] = baselines.residue_baselines(sequences, states, classes)
        if fit.blocks:
            out["homology_transfer"] = [np.exp(b[:, :classes]) for b in fit.blocks["test"]]
        return out
    assert fit.rows is not None and fit.held is not None
    return baselines.sequence_baselines(task, fit.rows, fit.held, n_outputs(parts["train"]), spec.seed)


def _homologs(head: Head, fit: Fit, test: Labels, main: float) -> dict[str, Any]:
    """How many test rows have homologs among the training rows, and the main score with near-identical ones counted."""
    links = fit.links["test"]
    near = np.bincount(links.owner[links.identity > 0.95], minlength=links.count) > 0
    some = np.bincount(links.distant().owner, minlength=links.count) > 0
    out: dict[str, Any] = {
        "training_rows": len(fit.trained),
        "share_with_homologs": float(some.mean()),
        "share_with_near_identical": float(near.mean()),
        "main_without_near_identical": main,
    }
    if not head.per_residue:
        raw, _ = _outputs(head, fit, "test", test, links)
        out["main_with_near_identical"] = main_scorer(head.task, test, _as_metric(head, raw))(
            np.arange(len(test))
        )
    return out


def _learning_curve(task: str, test: Labels, fit: Fit, whole: float) -> list[dict[str, Any]]:
    """The main score on the test part with fewer rows, where there are enough to draw from."""
    assert fit.rows is not None and fit.relearn is not None
    trained = fit.rows.trained
    out: list[dict[str, Any]] = []
    for size in CURVE:
        if size > 0.7 * len(trained):
            break
        found = []
        for seed in range(REPEATS):
            some = np.sort(np.random.default_rng(seed).choice(trained, size, replace=False))
            try:
                found.append(main_scorer(task, test, fit.relearn(some, seed))(np.arange(len(test))))
            except (ValueError, IndexError, AssertionError):  # too few of a class among so few rows
                continue
        if found:
            out.append(
                {
                    "rows": size,
                    "value": float(np.mean(found)),
                    "spread": float(np.std(found)),
                    "draws": len(found),
                }
            )
    return [*out, {"rows": len(trained), "value": whole, "spread": None, "draws": 1}] if out else []


def _curves(head: Head, test: Labels, output: Any) -> dict[str, Reliability]:
    if head.task == "regression":
        return {}
    if head.task == "per_residue":
        assert test.residues is not None
        truth, p = np.concatenate(test.residues), np.concatenate(output)
        keep = truth >= 0
        return {c: reliability((truth[keep] == i) * 1.0, p[keep, i]) for i, c in enumerate(head.classes)}
    if head.task == "multiclass":
        present = np.where(np.isnan(test.y[:, 0]), np.nan, 1.0)
        return {
            c: reliability((test.y[:, 0] == i) * present, output[:, i]) for i, c in enumerate(head.classes)
        }
    names = head.classes[-1:] if head.task == "binary" else head.classes
    p = output[:, -len(names) :]
    return {c: reliability(test.y[:, i], p[:, i]) for i, c in enumerate(names)}


def _ood(
    spec: FinetuneSpec, head: Head, test: Labels, fit: Fit, predictor: Predictor, method: str
) -> dict[str, Any]:
    how = (
        "ood = sqrt(d^2 + u^2). d: Mahalanobis distance of the mean embedding in 64 whitened, shrunken directions, "
        "over the square root of 64 (about 1 on training proteins)."
    )
    if head.ood.order is None:
        return {"how": how + " u is 0: this head is for variants of one protein.", "auroc_shuffled": None}
    how += (
        " u: how far the order of residues falls below the training proteins' median, in their interquartile "
        "ranges, by a log-density ratio between training proteins and their shuffled residues."
    )
    if method != "frozen":
        return {"how": how, "auroc_shuffled": None}
    chosen = np.random.default_rng(spec.seed).permutation(len(test))[:SHUFFLED]
    natural = [clean(test.sequences[i]) for i in chosen]
    noise = shuffled(natural, spec.seed + 77)
    inside = head.ood.score(head.pooled([fit.features["test"][i] for i in chosen]), natural)
    embedded = np.asarray(predictor.embed(noise, long_sequences="window"))
    outside = head.ood.score(embedded, noise)
    truth = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    return {"how": how, "auroc_shuffled": metrics.auroc(truth, np.r_[inside, outside]), "pairs": len(chosen)}


def _notes(spec: FinetuneSpec, labels: Labels, split: Split, parts: dict[str, Labels], fit: Fit) -> list[str]:
    notes = list(labels.notes)
    if fit.embedded is not None and len(fit.embedded) < len(fit.trained):
        notes.append(
            f"{len(fit.embedded)} of the training rows were embedded; the others gave sequence features and "
            "homologs alone"
        )
    for name, count in (("train", spec.max_train), ("valid", spec.max_valid), ("test", spec.max_test)):
        if count is not None and split.how[name] > len(parts[name]):
            notes.append(f"a seeded {len(parts[name])} of {split.how[name]} {name} rows were used")
    if labels.task == "multilabel":
        notes.append("a 0 means not annotated, which is weaker than not so")
    if fit.training is None:
        notes.append(
            "the bundle holds no training sequence"
            + (" but the wild type (given, or the consensus)" if fit.settings.get("wild_type") else "")
            + ", so predictions name no nearest training row by alignment"
        )
    else:
        notes.append(
            f"the bundle holds the {len(fit.training.ids)} training sequences, to search them; make it with "
            "--homologs none where they are confidential"
        )
    return notes


def versions() -> dict[str, str]:
    """Versions that decide the numbers."""
    out = {"python": platform.python_version()}
    for package in ("bioseq", "torch", "numpy", "scikit-learn", "scipy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "unknown"
    return out

"""Calibrate a fitted head on rows that it did not train on, then judge it once on the test part, beside the
trivial baselines that saw the same rows."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.heads.features import Context
from bioseq.heads.head import Head, clean
from bioseq.specs.finetune import FinetuneSpec
from training.finetune import metrics
from training.finetune.evaluation import baselines
from training.finetune.evaluation.calibrate import Reliability, calibrate, coverage, reliability
from training.finetune.fit import Fit, pooled
from training.finetune.metrics import MAIN, Scorer, auroc
from training.finetune.ood import shuffled
from training.tables.labels import Labels
from training.tables.splits import Split, consensus, mutated

if TYPE_CHECKING:
    from bioseq.inference.predictor import Predictor

SHUFFLED = 200  # test proteins whose shuffled residues the out-of-domain score is tried on


def _outputs(head: Head, features: Any, labels: Labels) -> Any:
    raw: list[Any] = []
    texts = [clean(s) for s in labels.sequences]
    for at in range(0, len(texts), 512):
        raw.extend(head.raw(features[at : at + 512], texts[at : at + 512]))
    return raw if head.per_residue else np.stack(raw)


def _as_metric(head: Head, raw: Any) -> Any:
    if head.task == "regression":
        return raw
    return [head.probabilities(r) for r in raw] if head.per_residue else head.probabilities(raw)


def scorer(task: str, labels: Labels, output: Any, thresholds: list[float] | None = None) -> Scorer:
    """A function from places of test rows to scores; per residue it counts, so resampling proteins is cheap."""
    if task != "per_residue":
        return lambda rows: metrics.score(task, labels.y[rows], output[rows], thresholds=thresholds)
    assert labels.residues is not None
    counts = [metrics.confusion(t.astype(float), p) for t, p in zip(labels.residues, output)]
    tables, losses = np.stack([t for t, _ in counts]), np.array([loss for _, loss in counts])
    return lambda rows: metrics.from_confusion(tables[rows].sum(0), losses[rows].sum())


def report(
    spec: FinetuneSpec,
    head: Head,
    labels: Labels,
    split: Split,
    parts: dict[str, Labels],
    fit: Fit,
    predictor: Predictor,
    method: str,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Reliability]]:
    """(calibration, evidence, reliability curves on the test part). Sets `head.calibration`."""
    task, test = labels.task, parts["test"]
    cal_out, cal_y = fit.cal_out, fit.cal_y
    if cal_out is None or cal_y is None:
        raw = _outputs(head, fit.features["valid"], parts["valid"])
        if task == "per_residue":
            assert parts["valid"].residues is not None
            cal_out = np.concatenate(raw)
            cal_y = np.concatenate(parts["valid"].residues).astype(float)
        else:
            cal_out, cal_y = raw, parts["valid"].y
    calibration = calibrate(head, cal_out, cal_y, spec.level)
    head.calibration = calibration
    raw = _outputs(head, fit.features["test"], test)
    output = _as_metric(head, raw)
    own = scorer(task, test, output, calibration.get("thresholds"))
    everything = np.arange(len(test))
    others = _baselines(task, parts, fit)
    scorers = {name: scorer(task, test, out) for name, out in others.items()}
    scores = {name: s(everything) for name, s in scorers.items()}
    main = MAIN[task]
    best = max(scores, key=lambda k: scores[k][main] if np.isfinite(scores[k][main]) else -np.inf)
    gain = metrics.paired_bootstrap(
        everything, lambda r: own(r)[main] - scorers[best](r)[main], rounds=spec.bootstrap, seed=spec.seed
    )
    mine = own(everything)
    evidence: dict[str, Any] = {
        "task": task,
        "targets": list(labels.targets or labels.classes),
        "method": method,
        "main": main,
        "metrics": mine,
        "intervals": metrics.bootstrap(everything, own, rounds=spec.bootstrap, seed=spec.seed),
        "baselines": scores,
        "best_baseline": best,
        "beats_baseline": bool(mine[main] > scores[best][main]),
        "gain": dict(zip(("value", "low", "high"), gain)),
        "rows": {p: len(some) for p, some in parts.items()},
        "split": split.how,
        "warnings": list(split.warnings),
        "notes": _notes(spec, labels, split, parts),
        "chosen": fit.chosen,
        "tried": fit.tried,
        "cost": fit.cost,
        "data_hash": labels.data_hash,
        "seed": spec.seed,
        "licence": spec.licence,
        "versions": versions(),
    }
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
    evidence["calibration"] = _calibration(spec, head, test, output, curves, len(cal_y))
    evidence["ood"] = _ood(spec, head, test, fit, predictor, method)
    return calibration, evidence, curves


def _baselines(task: str, parts: dict[str, Labels], fit: Fit) -> dict[str, Any]:
    sequences = {p: [clean(s) for s in some.sequences] for p, some in parts.items()}
    if task == "per_residue":
        states = {p: some.residues or [] for p, some in parts.items()}
        return baselines.residue_baselines(sequences, states, len(parts["train"].classes))
    context = None
    everything = sequences["train"] + sequences["valid"] + sequences["test"]
    wild = parts["train"].wild_type or consensus(everything)
    if wild is not None and all(len(s) == len(wild) for s in everything):
        sites = {int(p) for ps in mutated(sequences["train"] + sequences["valid"], wild) for p in ps}
        context = Context(wild, tuple(sorted(sites)))
    n_out = len(parts["train"].classes) if task == "multiclass" else parts["train"].y.shape[1]
    return baselines.sequence_baselines(
        task,
        sequences,
        {p: pooled(task, f) for p, f in fit.features.items()},
        {p: some.y for p, some in parts.items()},
        parts["train"].weights,
        n_out,
        context,
        fit.embedded,
    )


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


def _calibration(
    spec: FinetuneSpec, head: Head, test: Labels, output: Any, curves: dict[str, Reliability], rows: int
) -> dict[str, Any]:
    if head.task == "regression":
        radius = head.calibration["radius"]
        return {
            "level": spec.level,
            "rows": rows,
            "radius": radius,
            "coverage": {
                t: coverage(test.y[:, j], output[:, j] - radius[j], output[:, j] + radius[j])
                for j, t in enumerate(test.targets)
            },
        }
    return {
        "rows": rows,
        "ece": float(np.mean([c.ece for c in curves.values()])),
        "ece_by_label": {name: c.ece for name, c in curves.items()},
    }


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
    inside = head.ood.score(pooled(head.task, [fit.features["test"][i] for i in chosen]), natural)
    embedded = np.asarray(predictor.embed(noise, long_sequences="window"))
    outside = head.ood.score(embedded, noise)
    truth = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    return {"how": how, "auroc_shuffled": auroc(truth, np.r_[inside, outside]), "pairs": len(chosen)}


def _notes(spec: FinetuneSpec, labels: Labels, split: Split, parts: dict[str, Labels]) -> list[str]:
    notes = list(labels.notes)
    embedded = spec.max_embedded
    if embedded is not None and embedded < len(parts["train"]) and (spec.method or "frozen") == "frozen":
        notes.append(
            f"{embedded} of the training rows were embedded; the others trained the sequence features alone"
        )
    for name, count in (("train", spec.max_train), ("valid", spec.max_valid), ("test", spec.max_test)):
        if count is not None and split.how[name] > len(parts[name]):
            notes.append(f"a seeded {len(parts[name])} of {split.how[name]} {name} rows were used")
    if labels.task == "multilabel":
        notes.append("a 0 means not annotated, which is weaker than not so")
    return notes


def versions() -> dict[str, str]:
    """Versions that decide the numbers."""
    out = {"python": platform.python_version()}
    for package in ("bioseq", "torch", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "unknown"
    return out

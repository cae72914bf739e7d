"""What a head's bundle says of it: evidence.json for programs, card.md for people, a reliability plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bioseq.specs.finetune import FinetuneSpec
from training.finetune.evaluation.calibrate import Reliability
from training.finetune.metrics import MAIN

PLOT = "reliability.png"


def plain(value: Any) -> Any:
    """JSON without NaN and numpy: numbers rounded to 5 digits, what is undefined null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return None if not np.isfinite(value) else float(f"{value:.5g}")
    return value


def reliability_plot(file: Path, curves: dict[str, Reliability]) -> None:
    """Observed share against predicted probability, a line a label."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.2, 4.2), dpi=80)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, curve in curves.items():
        axes.plot(curve.predicted, curve.observed, marker="o", markersize=3, linewidth=1, label=name)
    axes.set(xlabel="predicted probability", ylabel="observed share (test)", xlim=(0, 1), ylim=(0, 1))
    if len(curves) <= 10:
        axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, metadata={"Software": None})
    pyplot.close(figure)


def verdict(evidence: dict[str, Any]) -> str:
    """One line on how the head did."""
    best = evidence["best_baseline"]
    main = evidence["main"]
    return (
        f"{main} {evidence['metrics'][main]:.3f} on {evidence['rows']['test']} held-out rows; best baseline "
        f"({best}) {evidence['baselines'][best][main]:.3f}"
        + ("" if evidence["beats_baseline"] else ": WEAK, it does not beat the baseline")
    )


def _number(value: Any) -> str:
    return "–" if value is None or (isinstance(value, float) and not np.isfinite(value)) else f"{value:.3f}"


def card(evidence: dict[str, Any], spec: FinetuneSpec, name: str) -> str:
    """card.md. Weakness is said first."""
    task, main = evidence["task"], MAIN[evidence["task"]]
    head, best = evidence["metrics"][main], evidence["best_baseline"]
    lines = [f"# {name}", ""]
    if not evidence["beats_baseline"]:
        lines += [
            f"> **Weak.** This head does not beat its best baseline ({best}) on held-out data: {main} "
            f"{_number(head)} against {_number(evidence['baselines'][best][main])}. "
            "Do not use it in place of the baseline.",
            "",
        ]
    what = ", ".join(evidence["targets"]) or "a state for every residue"
    lines += [
        f"Task: {task}. Predicts: {what}." + (f" Unit: {spec.units}." if spec.units else ""),
        f"Backbone: {evidence['base']['name']} ({evidence['base']['hash']}). Method: {evidence['method']}.",
        "",
        "## How good it is",
        "",
        f"Held-out part: {evidence['rows']['test']} rows"
        + (f" ({evidence['split']['held_out']})" if "held_out" in evidence["split"] else "")
        + f"; trained on {evidence['rows']['train']}, chosen and calibrated on {evidence['rows']['valid']}.",
        "",
    ]
    keys = list(evidence["metrics"])
    lines += ["| | " + " | ".join(keys) + " |", "|" + "---|" * (len(keys) + 1)]
    with_range = [
        f"{_number(evidence['metrics'][k])} [{', '.join(_number(v) for v in evidence['intervals'].get(k, ()))}]"
        for k in keys
    ]
    lines.append(f"| **{name}** (95 % bootstrap) | " + " | ".join(with_range) + " |")
    for other, scores in evidence["baselines"].items():
        lines.append(f"| {other} | " + " | ".join(_number(scores.get(k)) for k in keys) + " |")
    gain = evidence["gain"]
    lines += [
        "",
        f"{main} over the best baseline ({best}): {gain['value']:+.3f} "
        f"[{gain['low']:+.3f}, {gain['high']:+.3f}], paired bootstrap.",
    ]
    if evidence.get("per_label"):
        lines += [
            "",
            "| label | positives | AUROC | average precision | F1 | MCC |",
            "|---|---|---|---|---|---|",
        ]
        for label, s in evidence["per_label"].items():
            lines.append(
                f"| {label} | {s['positives']} | "
                + " | ".join(_number(s[k]) for k in ("auroc", "average_precision", "f1", "mcc"))
                + " |"
            )
    lines += ["", "## Calibration", "", *_calibration(evidence)]
    lines += ["", "## Out of domain", "", *_ood(evidence)]
    lines += ["", "## Split", ""]
    lines += [f"- {k}: {v}" for k, v in evidence["split"].items() if k != "leakage"]
    for k, v in evidence["split"].get("leakage", {}).items():
        lines.append(f"- leakage, {k}: {v}")
    lines += [f"- **warning**: {w}" for w in evidence["warnings"]]
    lines += ["", "## How it was made", "", f"- chosen: {evidence['chosen']}"]
    lines += [f"- tried {len(evidence['tried'])} settings, listed in evidence.json; validation chose"]
    lines += [f"- data {evidence['data_hash']}; seed {spec.seed}; licence {spec.licence}"]
    lines += ["- " + ", ".join(f"{k} {v}" for k, v in evidence["versions"].items())]
    lines += [f"- note: {note}" for note in evidence["notes"]]
    if spec.citation:
        lines += ["", "## Cite", "", *(f"- {c}" for c in spec.citation)]
    return "\n".join(lines) + "\n"


def _calibration(evidence: dict[str, Any]) -> list[str]:
    c = evidence["calibration"]
    if evidence["task"] == "regression":
        return [
            f"Intervals at {c['level']:.0%}: split conformal (Lei et al. 2018) on {c['rows']} rows that the model "
            "did not train on; they hold on average over proteins like those, not for each one.",
            *(f"- {t}: covered {v:.1%} of the held-out rows" for t, v in c["coverage"].items()),
        ]
    way = (
        "temperature scaling (Guo et al. 2017)"
        if evidence["task"] in ("multiclass", "per_residue")
        else "Platt scaling (Platt 1999) of each label; calls are made over thresholds that give the best F1"
    )
    return [
        f"Probabilities: {way}, fitted on the validation part. Expected calibration error on the test part: "
        f"{_number(c['ece'])}. Plot: {PLOT}.",
    ]


def _ood(evidence: dict[str, Any]) -> list[str]:
    d = evidence["ood"]
    lines = [d["how"]]
    if d.get("auroc_shuffled") is not None:
        lines.append(
            f"Held-out proteins against the same residues shuffled: AUROC {d['auroc_shuffled']:.3f} "
            f"({d['pairs']} pairs)."
        )
    return lines

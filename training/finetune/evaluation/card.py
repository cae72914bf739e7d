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
    best, main, gain = evidence["best_baseline"], evidence["main"], evidence["gain"]
    return (
        f"{main} {_number(evidence['metrics'][main])} on {evidence['rows']['test']} held-out rows; best baseline "
        f"({best}) {_number(evidence['baselines'][best][main])}"
        + ("" if evidence["beats_baseline"] else f": WEAK, {_weakness(evidence, gain)}")
    )


def _weakness(evidence: dict[str, Any], gain: dict[str, Any]) -> str:
    few: str | None = evidence["too_few_groups"]
    return few or f"its gain over {evidence['hardest_baseline']} is not above zero ({_range(gain)})"


def _number(value: Any) -> str:
    return "–" if value is None or (isinstance(value, float) and not np.isfinite(value)) else f"{value:.3f}"


def _range(gain: dict[str, Any]) -> str:
    value, low, high = (gain[k] for k in ("value", "low", "high"))
    if None in (value, low, high):
        return "undefined"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(r)} |" for r in body)]


def card(evidence: dict[str, Any], spec: FinetuneSpec, name: str) -> str:
    """card.md. Weakness is said first."""
    main = MAIN[evidence["task"]]
    lines = [f"# {name}", ""]
    if not evidence["beats_baseline"]:
        hardest, few = evidence["hardest_baseline"], evidence["too_few_groups"]
        lines += [
            f"> **Weak.** On held-out data this head is not shown to be better than {hardest}: "
            + (f"{few}." if few else f"the interval of its gain in {main} is {_range(evidence['gain'])}.")
            + " Do not use it in place of that baseline.",
            "",
        ]
    what = ", ".join(evidence["targets"]) or "a state for every residue"
    lines += [
        f"Task: {evidence['task']}. Predicts: {what}." + (f" Unit: {spec.units}." if spec.units else ""),
        f"Backbone: {evidence['base']['name']} ({evidence['base']['hash']}). Method: {evidence['method']}.",
        *("", "## How good it is", "", *_scores(evidence, name), *_beside(evidence), *_labels(evidence)),
        *("", "## Calibration", "", *_calibration(evidence)),
        *_homologs(evidence),
        *_curve(evidence),
        *("", "## Out of domain", "", *_ood(evidence)),
        *("", "## Split", "", *_split(evidence)),
        *("", "## How it was made", "", f"- chosen: {evidence['chosen']}"),
        f"- tried {len(evidence['tried'])} settings, listed in evidence.json; rows held back chose",
        f"- data {evidence['data_hash']}; seed {spec.seed}; licence {spec.licence}",
        "- " + ", ".join(f"{k} {v}" for k, v in evidence["versions"].items()),
        *(f"- note: {note}" for note in evidence["notes"]),
    ]
    if spec.citation:
        lines += ["", "## Cite", "", *(f"- {c}" for c in spec.citation)]
    return "\n".join(lines) + "\n"


def _scores(evidence: dict[str, Any], name: str) -> list[str]:
    rows, labelled, main = evidence["rows"], evidence["labelled"], evidence["main"]
    lines = [
        f"Held-out part: {rows['test']} rows"
        + (f" ({evidence['split']['held_out']})" if "held_out" in evidence["split"] else "")
        + f", of which {labelled['test']} have a label; fitted on {evidence['trained_on']} rows. The baselines were "
        "fitted on the same rows, as far as they use them: nearest neighbours on embedded rows, the window of letters on at "
        "most 60,000 residues.",
        "",
    ]
    keys = list(evidence["metrics"])
    mine = [
        f"{_number(evidence['metrics'][k])} [{', '.join(_number(v) for v in evidence['intervals'].get(k, ()))}]"
        for k in keys
    ]
    table = [["", *keys, f"gain in {main}"], [f"**{name}** (95 % bootstrap)", *mine, ""]]
    for other, scores in evidence["baselines"].items():
        table.append([other, *(_number(scores.get(k)) for k in keys), _range(evidence["gains"][other])])
    by = evidence["resampled"]
    return [
        *lines,
        *_table(table),
        "",
        f"Intervals: 95 % of resamples of the test part by {by['by']} ({by['groups']} groups); gains are paired. The head "
        f"passes if every gain's lower end lies above zero and there are at least {by['least']} groups.",
    ]


def _beside(evidence: dict[str, Any]) -> list[str]:
    """The same table under other splits, the hardest first."""
    main = evidence["main"]
    found = [(evidence["split"]["kind"], evidence)] + list(evidence.get("also", {}).items())
    if len(found) == 1:
        return []
    found.sort(key=lambda f: f[1]["metrics"][main] if f[1]["metrics"][main] is not None else -1.0)
    table = [["split", main, "best baseline", "hardest gain", "test rows", "resampled by"]]
    for kind, e in found:
        best = e["best_baseline"]
        table.append(
            [
                f"{kind}{' (this head)' if e is evidence else ''}",
                f"{_number(e['metrics'][main])} [{', '.join(_number(v) for v in e['intervals'][main])}]",
                f"{best} {_number(e['baselines'][best][main])}",
                _range(e["gain"]),
                str(e["rows"]["test"]),
                f"{e['resampled']['by']} ({e['resampled']['groups']} groups)",
            ]
        )
    return ["", "Under each split, the hardest first:", "", *_table(table)]


def _labels(evidence: dict[str, Any]) -> list[str]:
    if not evidence.get("per_label"):
        return []
    table = [["label", "positives", "AUROC", "average precision", "F1", "MCC"]]
    for label, s in evidence["per_label"].items():
        keys = ("auroc", "average_precision", "f1", "mcc")
        table.append([label, str(s["positives"]), *(_number(s[k]) for k in keys)])
    return ["", *_table(table)]


def _calibration(evidence: dict[str, Any]) -> list[str]:
    c = evidence["calibration"]
    on = (
        f"{c['rows']} {'residues' if evidence['task'] == 'per_residue' else 'rows'}: {evidence['calibrated']}"
    )
    if evidence["task"] != "regression":
        way = (
            "temperature scaling with a bias a class (Guo et al. 2017)"
            if evidence["task"] in ("multiclass", "per_residue")
            else "Platt scaling (Platt 1999) of each label; calls are made over thresholds that give the best F1"
        )
        return [
            f"Probabilities: {way}, fitted on {on}. Expected calibration error on the test part: {_number(c['ece'])}. "
            f"Plot: {PLOT}.",
        ]
    width = (
        "wider where the members of the ensemble disagree" if c["varies"] else "of one width for every row"
    )
    lines = [
        f"Intervals at {c['level']:.0%}: conformal prediction (Lei et al. 2018), {width}, fitted on {on}. They hold on "
        "average over proteins like those, not for each one.",
        *(
            f"- {t}: covered {v:.1%} of the held-out rows, mean width {c['width'][t]:.3g}"
            for t, v in c["coverage"].items()
        ),
    ]
    for by, words in (("spread", "the members' spread"), ("distance", "the distance from training")):
        if f"by_{by}" in c:
            parts = (f"{k} {v['coverage']:.1%} (width {v['width']:.3g})" for k, v in c[f"by_{by}"].items())
            lines.append(f"- by tercile of {words}: {', '.join(parts)}")
    return lines


def _homologs(evidence: dict[str, Any]) -> list[str]:
    h, main = evidence.get("homologs"), evidence["main"]
    if not h:
        return []
    lines = [
        f"{h['share_with_homologs']:.0%} of the test rows have homologs among the {h['training_rows']} training rows. All "
        "figures above were computed without hits of more than 95 % identity, for the head and for homology transfer."
    ]
    if h.get("main_with_near_identical") is not None:
        lines.append(
            f"{h['share_with_near_identical']:.1%} of the test rows have such a hit; with them {main} is "
            f"{_number(h['main_with_near_identical'])}."
        )
    return ["", "## Homologs", "", *lines]


def _curve(evidence: dict[str, Any]) -> list[str]:
    points = evidence.get("learning_curve")
    if not points:
        return []
    table = [["training rows", evidence["main"], "standard deviation over draws"]]
    table += [[str(p["rows"]), _number(p["value"]), _number(p["spread"])] for p in points]
    return [
        "",
        "## Fewer labels",
        "",
        "The features, model and penalty that all rows chose, fitted again on fewer of them. They were not chosen again at "
        "each size, so a table of that size alone may do somewhat worse:",
        "",
        *_table(table),
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


def _split(evidence: dict[str, Any]) -> list[str]:
    lines = [f"- {k}: {v}" for k, v in evidence["split"].items() if k not in ("leakage", "families")]
    if "families" in evidence["split"]:
        parts = (f"{part} {count}" for part, count in evidence["split"]["families"].items())
        lines.append(f"- families (groups by {evidence['split']['groups']}): {', '.join(parts)}")
    lines += [f"- leakage, {k}: {v}" for k, v in evidence["split"].get("leakage", {}).items()]
    return [*lines, *(f"- **warning**: {w}" for w in evidence["warnings"])]

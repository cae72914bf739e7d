"""A head's report: what it predicts, how good it is beside what one would do without it, and what it has seen."""

from __future__ import annotations

from typing import Any

from bioseq.bundles.bundle import Bundle
from bioseq.errors import BundleError
from bioseq.reports.page import Picture, Section, page

PLOT = "reliability.png"
_BASELINES = {
    "majority": "always the commonest answer",
    "mean": "always the mean",
    "composition_dipeptides": "residues and pairs counted",
    "nearest_10": "the 10 training proteins nearest by embedding",
    "homology_transfer": "labels of the homologs in the training data",
    "blosum62": "BLOSUM62",
    "one_hot_ridge": "one-hot ridge regression",
    "mutation_count": "number of mutations",
}


def head_report(bundle: Bundle) -> str:
    """The page's text. Raises `BundleError` for a backbone."""
    m = bundle.manifest
    if m.kind != "head":
        raise BundleError(
            f"{m.name} is a {m.kind}; reports are of heads.", hint="bioseq models show NAME has its card."
        )
    e = bundle.evidence()
    sections = [Section("How good it is", _verdict(e), _pictures(bundle, e), *_table(e))]
    if "per_label" in e:
        names = list(next(iter(e["per_label"].values())))
        rows = [(label, *(found.get(n) for n in names)) for label, found in e["per_label"].items()]
        sections.append(
            Section("By label", header=("label", *(n.replace("_", " ") for n in names)), rows=rows)
        )
    sections.append(Section("What it has seen", _seen(e)))
    if warnings := [*e.get("warnings", ()), *e.get("notes", ())]:
        sections.append(Section("To be known", warnings))
    sections.append(
        Section("The whole card", fixed=(bundle.path / "card.md").read_text("utf-8"), folded=True)
    )
    rows = e.get("rows", {})
    tiles = [
        (rows[k], f"rows to {what}")
        for k, what in (("train", "train"), ("valid", "validate"), ("test", "test"))
        if k in rows
    ]
    lead = f"{(m.task or '').replace('_', ' ')} of {', '.join(m.labels)}; licence {m.licence}."
    version = f"@{m.version}" if m.version else ""
    return page(f"Head {m.name}{version}", lead=lead, tiles=tiles, sections=sections)


def _verdict(e: dict[str, Any]) -> list[str]:
    if "main" not in e:
        return ["Nothing was measured."]
    main, best, gain = e["main"].replace("_", " "), e.get("best_baseline"), e.get("gain") or {}
    said = [f"{main} {e['metrics'][e['main']]:.3f} on rows that it did not train on."]
    if best and None not in (gain.get("low"), gain.get("high"), gain.get("value")):
        hardest = e.get("hardest_baseline", best)
        said.append(
            f"The hardest to beat of the simple ways is {_BASELINES.get(hardest, hardest)}: the head gains {gain['value']:+.3f} over it "
            f"(95 % interval {gain['low']:+.3f} to {gain['high']:+.3f})."
        )
    if not e.get("beats_baseline", True):
        said.append("It is WEAK: it does not beat every simple way. Use the simple way instead.")
    return said


def _table(e: dict[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(header, rows): the head and each baseline by metric."""
    if "metrics" not in e:
        return [], []
    names = list(e["metrics"])
    spans = e.get("intervals", {})
    own = [
        f"{e['metrics'][n]:.3f} ({spans[n][0]:.3f} to {spans[n][1]:.3f})"
        if n in spans and None not in spans[n]
        else e["metrics"][n]
        for n in names
    ]
    rows = [("this head", *own)]
    rows += [
        (_BASELINES.get(b, b.replace("_", " ")), *(v.get(n) for n in names))
        for b, v in e.get("baselines", {}).items()
    ]
    return ["", *(n.replace("_", " ") for n in names)], rows


def _pictures(bundle: Bundle, e: dict[str, Any]) -> list[Picture]:
    """The main score beside the baselines', and how calibrated the probabilities are."""
    found = []
    if "main" in e and e.get("baselines"):
        from matplotlib.figure import Figure

        main = e["main"]
        ways = [(b, v.get(main)) for b, v in e["baselines"].items() if v.get(main) is not None]
        names = [_BASELINES.get(b, b.replace("_", " ")) for b, _ in ways] + ["this head"]
        values = [v for _, v in ways] + [e["metrics"][main]]
        figure = Figure(figsize=(6.4, 0.5 + 0.34 * len(values)), layout="constrained")
        axes = figure.subplots()
        axes.barh(names, values, color=["#c3ccd4"] * len(ways) + ["#0b6e8f"])
        span = e.get("intervals", {}).get(main)
        if span and None not in span:
            axes.plot(span, [names[-1]] * 2, color="black", linewidth=2)
        axes.set(xlabel=main.replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
        alt = ", ".join(f"{n} {v:.3f}" for n, v in zip(names, values))
        found.append(
            Picture.of(
                figure, f"{main.replace('_', ' ')}: {alt}", "The head and the simple ways, on the same rows"
            )
        )
    if PLOT in bundle.manifest.files:
        found.append(
            Picture(
                bundle.file(PLOT).read_bytes(),
                "Observed share against predicted probability",
                "Calibration on the test rows",
            )
        )
    return found


def _seen(e: dict[str, Any]) -> list[str]:
    split = e.get("split", {})
    said = []
    if split:
        said.append(
            f"Test rows: {split.get('held_out', split.get('kind'))}. Groups: {split.get('groups', 'each row by itself')}."
        )
    leak = split.get("leakage") or {}
    if leak.get("share_over_30") is not None:
        said.append(
            f"{leak['share_over_30']:.0%} of the test sequences have a training sequence of at least 30 % identity, "
            f"{leak.get('share_over_50', 0):.0%} of at least 50 %: expect worse on proteins further away."
        )
    if e.get("calibrated"):
        said.append(f"Calibrated on {e['calibrated']}.")
    if "ood" in e and "how" in e["ood"]:
        said.append("Distance from the training data: " + e["ood"]["how"])
    return said or ["It is not recorded."]

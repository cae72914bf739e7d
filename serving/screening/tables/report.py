"""report.html of a finished run: one self-contained page, pictures inside, no scripts, no sequences."""

from __future__ import annotations

import base64
import csv
import io
import itertools
from pathlib import Path
from typing import Any

from bioseq.errors import OutputError
from bioseq.output import atomic_file
from bioseq.reports.page import environment, number
from serving.screening.folder import read_json
from serving.screening.tables.reasons import reason

TOP = 50
INK, ACCENT, MUTED = "#1c2733", "#0b6e8f", "#c3ccd4"


def write_report(output: str, summary: dict[str, Any] | None = None) -> str:
    """Write report.html into the run folder; returns its path. Raises `OutputError` if the run is not complete."""
    folder = Path(output)
    if summary is None:
        if not (folder / "summary.json").is_file():
            raise OutputError(
                f"{folder} holds no finished run.",
                hint="Give a run folder that `bioseq screen` has completed.",
            )
        summary = read_json(folder / "summary.json")
    facts = read_json(folder / "run.json")
    cards = read_json(folder / "cards.json") if (folder / "cards.json").is_file() else {}
    header, rows, hits = _top(folder / "hits.csv", summary["manifest_heads"])
    made = environment()
    page = made.from_string((Path(__file__).parent / "report.html").read_text("utf-8")).render(
        summary=summary,
        facts=facts,
        cards=cards,
        header=header,
        rows=rows,
        hits=hits,
        pictures=_pictures(folder, summary),
        settings=_settings(summary["settings"]),
        name=folder.name,
    )
    with atomic_file(folder / "report.html", force=True) as temporary:
        temporary.write_text(page, "utf-8")
    return str(folder / "report.html")


def _top(path: Path, heads: list[dict[str, Any]]) -> tuple[list[str], list[list[str]], list[dict[str, str]]]:
    """The first hits: names of columns and cells, and of each in words `rank`, `id`, `length`, `score` and `why`."""
    with open(path, encoding="utf-8", newline="") as handle:
        reader = csv.reader(handle)
        header = next(reader)
        rows = list(itertools.islice(reader, TOP))
    # The rank first, and no column that is the same for every hit
    order = [header.index("rank"), header.index("id"), header.index("score")]
    order += [i for i, n in enumerate(header) if i not in order and n not in ("status", "error")]
    if not any(row[header.index("notes")] for row in rows):
        order.remove(header.index("notes"))
    named = [dict(zip(header, row, strict=True)) for row in rows]
    hits = [
        {k: _shown(row[k]) for k in ("rank", "id", "length", "score")} | {"why": reason(row, heads)}
        for row in named
    ]
    return [header[i] for i in order], [[_shown(row[i]) for i in order] for row in rows], hits


def _shown(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    return text if text.isdigit() else number(value)


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (k, ", ".join(map(str, v)) if isinstance(v, list) else str(v))
        for k, v in settings.items()
        if v not in (None, [])
    ]


def _pictures(folder: Path, summary: dict[str, Any]) -> list[dict[str, str]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}
    )
    pictures = []

    def keep(figure: Any, title: str, alt: str, group: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        plt.close(figure)
        data = base64.b64encode(buffer.getvalue()).decode()
        pictures.append({"title": title, "alt": alt, "data": data, "group": group})

    def bars(several: dict[str, dict[str, Any]], title: str, group: str) -> None:
        """Small multiples: a histogram each, side by side, in one picture."""
        if not several:
            return
        across = min(len(several), 5)
        down = -(-len(several) // across)
        figure, grid = plt.subplots(
            down, across, figsize=(2.1 * across + 0.4, 1.35 * down + 0.3), squeeze=False
        )
        for axes, (label, found) in zip(grid.flat, several.items(), strict=False):
            step = (found["max"] - found["min"]) / len(found["bins"]) or 1.0
            places = [found["min"] + step * (i + 0.5) for i in range(len(found["bins"]))]
            axes.bar(places, found["bins"], width=step, color=ACCENT)
            axes.set_title(label, fontsize=8)
        for axes in list(grid.flat)[len(several) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel("records")
        figure.tight_layout()
        count = next(iter(several.values()))["count"]
        keep(figure, title, f"Histograms over {count} records: {', '.join(several)}", group)

    if summary["length"]:
        bars({"length, residues": summary["length"]}, "", "library")
    for name, head in summary["heads"].items():
        shown: dict[str, dict[str, dict[str, Any]]] = {"heads": {}, "ood": {}}
        for column, found in head["columns"].items():
            last = column.rsplit(".", 1)[-1]
            if found and last not in ("low", "high"):
                shown["ood" if last in ("ood", "ood_percentile") else "heads"][
                    column.removeprefix(f"{name}.")
                ] = found
        bars(shown["heads"], f"{name}: what it predicts", "heads")
        bars(shown["ood"], f"{name}: distance from its training proteins", "ood")
        if head["labels"]:
            figure, axes = plt.subplots(figsize=(3.2, 0.5 + 0.22 * len(head["labels"])))
            labels = list(head["labels"])[::-1]
            axes.barh(labels, [head["labels"][k] for k in labels], color=ACCENT)
            axes.set_xlabel("records")
            keep(figure, f"{name}, label", f"Records by label of {name}", "heads")
    _map(folder / "map.parquet", plt, keep)
    return pictures


def _map(path: Path, plt: Any, keep: Any) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    if not path.is_file():
        return
    table = pq.read_table(path)
    if not len(table):
        return
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    score = np.array([np.nan if s is None else s for s in table["score"].to_pylist()], dtype=float)
    known = np.isfinite(score)
    figure, axes = plt.subplots(figsize=(5.2, 4.0))
    axes.scatter(x[~known], y[~known], s=7, color=MUTED, linewidths=0, label="not among those that passed")
    if known.any():
        dots = axes.scatter(x[known], y[known], s=10, c=score[known], cmap="viridis", linewidths=0)
        figure.colorbar(dots, label="score")
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second")
    keep(figure, "embedding map", f"Map of {len(table)} distinct sequences by their embeddings", "map")

"""Pictures of a protein: a scan (residues along it, substitutions down, colour for the score), contacts, a track."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bioseq.errors import OutputError
from bioseq.reports.page import Picture, Section, page

if TYPE_CHECKING:
    from bioseq.inference.variants import Scored

FORMATS = ("png", "svg", "pdf")
_DEEP = 100.0  # effective homologs; a column as deep is black
_MAX_INCHES = 300.0  # Agg draws at most 2^16 pixels a side


def picture_format(path: str | Path) -> str:
    """png, svg or pdf by a file's ending. Raises `OutputError`."""
    ending = Path(path).suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise OutputError(
            f"{path}: a picture cannot be written as {ending or 'a name without ending'!r}.",
            hint="Use .png, .svg or .pdf.",
        )
    return ending


def draw_scan(
    path: str | Path | io.BytesIO,
    scores: np.ndarray,
    sequence: str,
    *,
    letters: str,
    title: str,
    kind: str = "png",
    depth: np.ndarray | None = None,
) -> None:
    """Write the heat map of one scan.

    `scores` float [L, len(letters)] (0 is the wild type, drawn white and dotted; red is less likely, blue more,
    on one symmetric scale that ends at the 99th percentile of |score|); `sequence` the L wild-type residues;
    `depth` [L], the effective number of homologs in each column, is a grey strip under the letters. Long proteins
    are broken into panels, one under the other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize, SymLogNorm
    from matplotlib.figure import Figure

    length = len(sequence)
    per_panel = 100 if length <= 1000 else 200
    panels = -(-length // per_panel)
    widest = min(length, per_panel)
    width = max(6.0, 2.0 + 0.14 * widest)
    height = min(1.0 + 3.3 * panels, _MAX_INCHES)
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    shown = np.abs(scores[np.isfinite(scores)])
    limit = float(np.percentile(shown, 99)) if len(shown) else 1.0
    scale = Normalize(-(limit or 1.0), limit or 1.0)
    image, strip = None, None
    last = len(letters) - 0.5
    for panel, ax in enumerate(axes):
        start = panel * per_panel
        part = sequence[start : start + per_panel]
        image = ax.imshow(
            scores[start : start + len(part)].T,
            cmap="RdBu",
            norm=scale,
            aspect="auto",
            interpolation="nearest",
            extent=(start + 0.5, start + len(part) + 0.5, last, -0.5),
        )
        if depth is not None:
            strip = ax.imshow(
                np.asarray(depth, dtype=float)[None, start : start + len(part)],
                cmap="Greys",
                norm=SymLogNorm(1.0, vmin=0.0, vmax=max(_DEEP, float(np.max(depth)))),
                aspect="auto",
                interpolation="nearest",
                extent=(start + 0.5, start + len(part) + 0.5, last + 1.6, last + 0.4),
            )
            ax.set_ylim(last + 1.6, -0.5)
        known = [(start + i + 1, letters.index(a)) for i, a in enumerate(part) if a in letters]
        ax.plot([x for x, _ in known], [y for _, y in known], ".", color="black", markersize=3)
        # Panels share one scale of residues, so the last one is not stretched.
        ax.set_xlim(start + 0.5, start + widest + 0.5)
        rows, names = [float(i) for i in range(len(letters))], list(letters)
        if depth is not None:
            rows, names = [*rows, last + 1.0], [*names, "homologs"]
        ax.set_yticks(rows, names, fontsize=7)
        ax.set_ylabel("substitution")
        step = 10 if widest > 20 else 1
        ax.set_xticks([x for x in range(start + 1, start + len(part) + 1) if x % step == 0 or x == 1])
        if per_panel <= 100:
            top = ax.secondary_xaxis("top")
            top.set_xticks(range(start + 1, start + len(part) + 1), list(part), fontsize=6)
            top.tick_params(length=0, pad=1)
            top.spines["top"].set_visible(False)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[-1].set_xlabel("position (one-based); wild type above and as dots")
    figure.suptitle(title, fontsize=10, parse_math=False)
    assert image is not None
    bar = figure.colorbar(
        image, ax=list(axes), extend="both", aspect=15 * panels, pad=0.01, shrink=min(1.0, 0.9)
    )
    bar.set_label("score (0: as likely as the wild type)")
    if strip is not None:
        under = figure.colorbar(strip, ax=list(axes), aspect=15 * panels, pad=0.01, shrink=0.9)
        under.set_label("homologs in the column (effective number)")
    figure.savefig(
        path, format=kind, metadata={"Title": "bioseq scan"} if kind != "png" else {"Software": "bioseq"}
    )


def draw_contacts(path: str | Path, contacts: np.ndarray, *, title: str, kind: str = "png") -> None:
    """Write a contact map: float [L, L] probabilities, white 0, black 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 6.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ends = (0.5, len(contacts) + 0.5)
    image = ax.imshow(
        contacts, cmap="Greys", vmin=0, vmax=1, extent=(*ends, *ends[::-1]), interpolation="nearest"
    )
    ax.set(title=title, xlabel="residue", ylabel="residue")
    figure.colorbar(image, ax=ax, label="probability of a contact")
    figure.savefig(path, format=kind)


def draw_track(
    path: str | Path, values: np.ndarray, sequence: str, *, title: str, label: str, kind: str = "png"
) -> None:
    """Write one bar a residue: float [L], blue above 0, orange below; letters under the bars. Long proteins are broken into
    panels on one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    length, per_panel = len(sequence), 100
    panels = -(-length // per_panel)
    widest = min(length, per_panel)
    size = (max(6.0, 1.5 + 0.14 * widest), min(0.8 + 1.9 * panels, _MAX_INCHES))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False, sharey=True)[:, 0]
    for panel, ax in enumerate(axes):
        part = slice(panel * per_panel, (panel + 1) * per_panel)
        places = np.arange(1, length + 1)[part]
        colours = np.where(values[part] >= 0, "#0072b2", "#d55e00")  # Okabe and Ito: told apart by everyone
        ax.bar(places, values[part], width=0.9, color=colours)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_xlim(places[0] - 0.6, places[0] - 0.4 + widest)
        ax.set_xticks(places, list(sequence[part]), fontsize=7, family="monospace")
        ax.tick_params(axis="x", length=0)
        ax.set_xlabel(f"residues {places[0]} to {places[-1]}")
    figure.suptitle(title)
    figure.supylabel(label)
    figure.savefig(path, format=kind)


def pictures(first: str | None, count: int, most: int) -> list[Path]:
    """Names of the pictures of `count` records: by place, never by id; the first `most`."""
    if first is None:
        return []
    path = Path(first)
    return (
        [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(1, min(count, most) + 1)]
    )


def scan_sections(name: str, sequence: str, scored: Scored, letters: str) -> list[Section]:
    """What a scan's report says of one protein: its heat map, and a line a residue."""
    homologs = scored.homologs
    depth = None if homologs is None else homologs.depth
    image = io.BytesIO()
    draw_scan(image, scored.values, sequence, letters=letters, title=name, depth=depth)
    behind = (
        "No homologs were sought: the scores are the model's alone."
        if homologs is None
        else f"Behind the scores stand {homologs.number:,} homologs from {homologs.source} (effective number {homologs.effective:.1f}) beside "
        "the model and a substitution matrix."
        if homologs.number
        else f"No homolog was found in {homologs.source}: the scores are the model's and a substitution matrix's alone."
    )
    rows = []
    for place, (wild, scores) in enumerate(zip(sequence, scored.values)):
        order = [i for i in np.argsort(-scores, kind="stable") if letters[i] != wild]
        rows.append(
            (
                place + 1, wild, float(np.mean([scores[i] for i in order])),
                ", ".join(f"{letters[i]} {scores[i]:.2f}" for i in order[:3]),
                ", ".join(f"{letters[i]} {scores[i]:.2f}" for i in order[-3:]),
                *(() if depth is None else (float(depth[place]),)),
            )
        )  # fmt: skip
    header = [
        "residue",
        "is",
        "mean score",
        "likeliest changes",
        "least likely",
        *([] if depth is None else ["homologs"]),
    ]
    held = sorted(rows, key=lambda row: row[2])[:10]
    return [
        Section(
            name,
            [
                behind,
                "Above 0 a residue is likelier than the one that is there, below 0 less likely (natural logarithm of the ratio); scores rank "
                "variants and have no unit of fitness.",
                "Least open to change: " + ", ".join(f"{r[1]}{r[0]}" for r in held) + ".",
                *scored.notes,
            ],
            [Picture(image.getvalue(), f"Heat map of all substitutions of {name}")],
        ),
        Section(f"{name}: every residue", header=header, rows=rows, folded=True),
    ]


def scan_page(model: str, strategy: str, sections: list[Section]) -> str:
    """The report of a scan."""
    return page("Every substitution", lead=f"Model {model}, {strategy}.", sections=sections)

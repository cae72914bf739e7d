"""A campaign's report: one HTML file with its pictures inside."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.campaigns.campaign import PLATES, Campaign
from bioseq.homologs.database import LETTERS
from bioseq.output import atomic_file
from bioseq.ranking import spearman
from bioseq.reports.page import Picture, Section, page


def report(campaign: Campaign, path: str | Path, *, force: bool = False) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    state = campaign.state()
    pictures: list[Section] = []
    models: list[tuple[Any, ...]] = []

    def keep(figure: Any, title: str, text: str) -> None:
        pictures.append(Section(title, [text], [Picture.of(figure, title)]))
        plt.close(figure)

    proposals = []
    for number in range(1, state.rounds + 1):
        file = campaign.round_folder(number) / "proposal.json"
        proposals.append(json.loads(file.read_text()) if file.exists() else {"believed": {}})
        for column, b in proposals[-1]["believed"].items():
            scores = ", ".join(f"{k} {v:.3f}" for k, v in b["spearman_held_out"].items())
            models.append((number, column, b["surrogate"], scores, f"{b['interval_coverage_80']:.2f}"))
    for i, o in enumerate(campaign.objectives):
        rows = {k: v for k, v in state.measured(i).items() if k != "WT"}
        if not rows:
            continue
        values = np.array([v[0] for v in rows.values()])
        rounds = np.array([v[3] for v in rows.values()])
        sign = -1 if o.goal in ("min", "<=") else 1
        figure, axes = plt.subplots(figsize=(5, 3))
        axes.plot(rounds + np.linspace(-0.15, 0.15, len(rounds)), values, ".", alpha=0.4)
        numbers = sorted(set(rounds.tolist()))
        axes.step(
            numbers, [sign * (sign * values[rounds <= r]).max() for r in numbers], where="post", color="k"
        )
        axes.set(xlabel="round", ylabel=o.column, xticks=numbers)
        keep(figure, f"{o.column} by round", "Each point is a variant; the line is the best so far.")
        codes = campaign.space.encode([campaign.space.read(k) for k in rows])
        prior = sum(campaign.prior[s][codes[:, j]] for j, s in enumerate(campaign.space.sites))
        first = rounds == rounds.min()
        if first.sum() > 2 and np.ptp(prior) > 0:
            figure, axes = plt.subplots(figsize=(4, 3))
            axes.plot(prior[first], values[first], ".")
            axes.set(xlabel="zero-shot score", ylabel=o.column)
            rho = float(spearman(sign * prior[first], values[first]))
            warn = " The prior misleads here." if rho < 0.1 else ""
            keep(figure, f"{o.column}: prior against measured", f"First round, Spearman {rho:.2f}.{warn}")
        keep(_sites(plt, campaign, codes, values), f"{o.column}: mean by site and residue",
             "Mean of the measured variants with a residue at a site, less the mean of all; the 40 sites that vary most.")  # fmt: skip
        believed = [p["believed"][o.column] for p in proposals if o.column in p["believed"]]
        if believed:
            last = believed[-1]
            figure, axes = plt.subplots(figsize=(4, 3))
            axes.plot(last["predicted_held_out"], last["measured"], ".", alpha=0.5)
            axes.set(xlabel="predicted, held out", ylabel="measured")
            keep(
                figure, f"{o.column}: measured against predicted", f"The latest round's {last['surrogate']}."
            )
    if state.rounds:
        keep(
            _plate(plt, campaign, state.rounds), f"Plate of round {state.rounds}", "Why each well was filled."
        )
    status = campaign.status()
    best = [(o, b["variant"], b["value"]) for o, b in status["best"].items()]
    header = ("round", "objective", "surrogate", "Spearman, held out", "coverage of 80 % intervals")
    text = page(
        f"Campaign {campaign.folder.resolve().name}",
        tiles=[
            (status["space"], "variants in the space"),
            (status["rounds"], "rounds"),
            *((v, k) for k, v in status["wells"].items() if v),
        ],
        sections=[
            Section("Best so far", header=("objective", "variant", "value"), rows=best),
            *([Section("What the rounds believed", header=header, rows=models)] if models else []),
            *pictures,
        ],
    )
    with atomic_file(path, force=force) as temporary:
        temporary.write_text(text, "utf-8")


def _sites(plt: Any, campaign: Campaign, codes: np.ndarray, values: np.ndarray) -> Any:
    space = campaign.space
    busy = np.sort(np.argsort(-(codes != space.wild).sum(0), kind="stable")[:40])
    table = np.full((20, len(busy)), np.nan)
    for j, s in enumerate(busy):
        for c in set(codes[:, s].tolist()):
            table[c, j] = values[codes[:, s] == c].mean() - values.mean()
    figure, axes = plt.subplots(figsize=(min(10, 2.5 + 0.25 * len(busy)), 4))
    most = np.nanmax(np.abs(table)) or 1
    image = axes.imshow(table, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
    axes.set_yticks(range(20), LETTERS)
    axes.set_xticks(
        range(len(busy)),
        [f"{space.wild_type[space.sites[s]]}{space.sites[s] + 1}" for s in busy],
        rotation=90,
    )
    figure.colorbar(image)
    return figure


def _plate(plt: Any, campaign: Campaign, number: int) -> Any:
    rows, columns = PLATES[campaign.settings.plate]
    names = ["empty", "prior", "exploits", "explores", "control"]
    table = np.zeros((rows, columns))
    for row in csv.DictReader(io.StringIO(campaign.plate(number))):
        table[ord(row["well"][0]) - 65, int(row["well"][1:]) - 1] = names.index(row["reason"].split(":")[0])
    figure, axes = plt.subplots(figsize=(7, 4))
    image = axes.imshow(table, cmap=plt.get_cmap("Set2", 5), vmin=-0.5, vmax=4.5)
    axes.set_xticks(range(columns), range(1, columns + 1))
    axes.set_yticks(range(rows), [chr(65 + r) for r in range(rows)])
    figure.colorbar(image, ticks=range(5)).ax.set_yticklabels(names)
    return figure

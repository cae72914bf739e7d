"""A campaign's report: one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from bioseq.campaigns.campaign import PLATES, Campaign
from bioseq.homologs.database import LETTERS
from bioseq.output import atomic_file
from bioseq.ranking import spearman

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Campaign {{ name }}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem;text-align:left}
img{max-width:100%}h2{margin-top:2rem}</style>
<h1>Campaign {{ name }}</h1>
<p>{{ status.space }} variants in the space, {{ status.rounds }} rounds;
{% for k, v in status.wells.items() if v %}{{ v }} {{ k }}{{ ", " if not loop.last }}{% endfor %}.</p>
<table><tr><th>objective<th>best variant<th>value</tr>
{% for o, b in status.best.items() %}<tr><td>{{ o }}<td>{{ b.variant }}<td>{{ "%.4g"|format(b.value) }}</tr>{% endfor %}</table>
{% if models %}<h2>What the rounds believed</h2><table><tr><th>round<th>objective<th>surrogate
<th>Spearman, held out<th>coverage of 80 % intervals</tr>
{% for m in models %}<tr><td>{{ m.round }}<td>{{ m.objective }}<td>{{ m.surrogate }}<td>{{ m.scores }}<td>{{ m.coverage }}</tr>{% endfor %}
</table>{% endif %}
{% for p in pictures %}<h2>{{ p.title }}</h2><p>{{ p.text }}</p>
<img alt="{{ p.title }}" src="data:image/png;base64,{{ p.data }}">{% endfor %}</html>
"""


def report(campaign: Campaign, path: str | Path, *, force: bool = False) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    state = campaign.state()
    pictures: list[dict[str, str]] = []
    models: list[dict[str, Any]] = []

    def keep(figure: Any, title: str, text: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        pictures.append({"title": title, "text": text, "data": base64.b64encode(buffer.getvalue()).decode()})

    proposals = []
    for number in range(1, state.rounds + 1):
        file = campaign.round_folder(number) / "proposal.json"
        proposals.append(json.loads(file.read_text()) if file.exists() else {"believed": {}})
        for column, b in proposals[-1]["believed"].items():
            scores = ", ".join(f"{k} {v:.3f}" for k, v in b["spearman_held_out"].items())
            models.append(
                {"round": number, "objective": column, "surrogate": b["surrogate"], "scores": scores,
                 "coverage": f"{b['interval_coverage_80']:.2f}"}
            )  # fmt: skip
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
    page = Environment(autoescape=True).from_string(PAGE)
    text = page.render(
        name=campaign.folder.resolve().name, status=campaign.status(), models=models, pictures=pictures
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

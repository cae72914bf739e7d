"""Nearest neighbours of real proteins by embedding: a ranked table and a report with a picture.

    python examples/neighbours.py [FASTA] [-o FOLDER]

Embeddings are whitened (raw embeddings of a language model share a few large directions) and compared by
cosine. Where the headers tell `cluster=`, the report counts how often the nearest neighbour is of the same
family, beside chance and beside amino-acid composition, whitened alike.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

import bioseq
from bioseq.output import atomic_file

SAMPLE = Path(bioseq.__file__).parent / "sample" / "proteins.fasta"
LETTERS = "ACDEFGHIKLMNPQRSTVWY"

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>bioseq: nearest neighbours</title>
<style>
 body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c2430}
 table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
 th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #dde3ea} th{background:#f3f6f9}
 img{max-width:100%} .same{color:#0a7d4f;font-weight:600} .small{color:#5b6775;font-size:.9rem}
</style>
<h1>Nearest neighbours by embedding</h1>
<p>{{ count }} real proteins, embedded by <b>{{ model }}</b> (mean over residues, {{ width }} numbers each),
whitened and compared by cosine.</p>
{% if rates %}
<p>The nearest neighbour is of the same family for <b>{{ '%.0f' % (100 * rates.embedding) }} %</b> of the
{{ rates.count }} proteins that have one here. Amino-acid composition alone gives
{{ '%.0f' % (100 * rates.composition) }} %, chance {{ '%.1f' % (100 * rates.chance) }} %.</p>
{% endif %}
<img alt="map of the proteins and how often families are found" src="data:image/png;base64,{{ picture }}">
<h2>The closest pairs</h2>
<table><tr><th>protein<th>nearest<th>cosine<th>same family<th>second<th>third</tr>
{% for row in rows %}<tr><td>{{ row.id }}<td>{{ row.names[0] }}<td>{{ '%.3f' % row.scores[0] }}
<td>{% if row.same is none %}–{% elif row.same %}<span class="same">yes</span>{% else %}no{% endif %}
<td>{{ row.names[1] }} ({{ '%.3f' % row.scores[1] }})<td>{{ row.names[2] }} ({{ '%.3f' % row.scores[2] }})</tr>
{% endfor %}</table>
<p class="small">The whole table is in {{ table }}. Families are MMseqs2 clusters at 30 % identity, made without
any knowledge of this model. A close neighbour is a hint at a shared fold or function, not a proof of it.</p>
</html>"""


def whiten(vectors: np.ndarray, shrinkage: float = 0.05) -> np.ndarray:
    """Rows with mean zero and about unit covariance (Su et al. 2021, arXiv 2103.15316), the covariance of this
    very set shrunken toward a multiple of the identity (Ledoit & Wolf 2004)."""
    centred = (vectors - vectors.mean(0)).astype(np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    return centred @ axes / np.sqrt(np.maximum(values, 0) + shrinkage * values.mean() + 1e-12)


def nearest(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Places [N, k] and cosines [N, k] of each row's nearest other rows; float32 [N, D] in, whitened first."""
    white = whiten(vectors)
    unit = white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosine, order, axis=1)


def families(fasta: Path) -> list[str | None]:
    """The cluster= of each header, in file order."""
    return [
        (match := re.search(r"cluster=(\S+)", line)) and match.group(1)
        for line in fasta.read_text().splitlines()
        if line.startswith(">")
    ]


def hit_rate(order: np.ndarray, family: list[str | None]) -> float:
    """Share of proteins with relatives whose nearest neighbour is one of them."""
    rows = [i for i, f in enumerate(family) if f and family.count(f) > 1]
    return sum(family[order[i, 0]] == family[i] for i in rows) / len(rows)


def draw(
    vectors: np.ndarray, order: np.ndarray, family: list[str | None], rates: dict[str, Any] | None
) -> str:
    """A PNG, base64: the proteins in the first two principal components, and the hit rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    xy = centred @ axes[:2].T
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(2.2, 1), layout="constrained")
    left.scatter(*xy.T, s=14, color="#b8c2cc", label="proteins")
    shown = [f for f in dict.fromkeys(family) if f and family.count(f) > 1][:8]
    for i, name in enumerate(shown):
        rows = [j for j, f in enumerate(family) if f == name]
        left.scatter(*xy[rows].T, s=34, color=plt.get_cmap("tab10")(i), label=f"family of {name}")
    left.set(title="Proteins by embedding", xlabel="first principal component", ylabel="second")
    left.legend(fontsize=7, loc="best")
    if rates:
        names = ("embedding", "composition", "chance")
        bars = right.bar(names, [100 * rates[n] for n in names], color=["#1f77b4", "#9aa7b4", "#d5dbe1"])
        right.bar_label(bars, fmt="%.1f %%")
        right.set(title="Nearest neighbour is a relative", ylabel="% of proteins with relatives")
    else:
        right.axis("off")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110)
    plt.close(fig)
    return base64.b64encode(buffer.getvalue()).decode()


def run(fasta: Path, out: Path, *, model_name: str = "default", force: bool = False) -> dict[str, Any]:
    """Writes OUT/neighbours.csv and OUT/neighbours.html; returns paths, rates and the first rows."""
    from jinja2 import Environment

    records = list(bioseq.read_fasta(fasta))
    model = bioseq.load(model_name)
    vectors = model.embed(records, long_sequences="window", progress=True)
    order, scores = nearest(vectors, min(5, len(records) - 1))
    family = families(fasta)
    rates = None
    relatives = [i for i, f in enumerate(family) if f and family.count(f) > 1]
    if relatives:
        counts = np.array([[r.sequence.upper().count(a) / len(r.sequence) for a in LETTERS] for r in records])
        pairs = sum(family.count(family[i]) - 1 for i in relatives) / len(relatives)
        rates = {
            "count": len(relatives),
            "embedding": hit_rate(order, family),
            "composition": hit_rate(nearest(counts, 1)[0], family),
            "chance": pairs / (len(records) - 1),
        }
    rows = [
        {
            "id": r.id,
            "names": [records[j].id for j in order[i]],
            "scores": scores[i].tolist(),
            "same": None if i not in set(relatives) else family[order[i, 0]] == family[i],
        }
        for i, r in enumerate(records)
    ]
    rows.sort(key=lambda row: -row["scores"][0])
    table, report = out / "neighbours.csv", out / "neighbours.html"
    with atomic_file(table, force=force) as temporary, open(temporary, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["id", "rank", "neighbour", "cosine"])
        for row in rows:
            for rank, (name, score) in enumerate(zip(row["names"], row["scores"]), start=1):
                writer.writerow([row["id"], rank, name, f"{score:.5f}"])
    page = Environment(autoescape=True).from_string(PAGE)
    with atomic_file(report, force=force) as temporary:
        temporary.write_text(
            page.render(
                count=len(records),
                model=f"{model.name}" + (f"@{model.version}" if model.version else ""),
                width=vectors.shape[1],
                rates=rates,
                picture=draw(vectors, order, family, rates),
                rows=rows[:40],
                table=table.name,
            )
        )
    return {"table": table, "report": report, "rates": rates, "rows": rows, "count": len(records)}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("fasta", nargs="?", type=Path, default=SAMPLE)
    p.add_argument("-o", "--output", type=Path, default=Path("demo"))
    p.add_argument("--model", default="default")
    p.add_argument("--force", action="store_true")
    args = p.parse_args()
    try:
        done = run(args.fasta, args.output, model_name=args.model, force=args.force)
    except bioseq.BioseqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{done['count']} proteins; table: {done['table']}; report: {done['report']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Deletion test of attributions: hiding the residues that matter most, against as many residues at random.

    python benchmarks/attribution.py DATA [--proteins 60] [--share 0.1]

DATA is a folder of the development data. Of held-out proteins (set `valid`) of each shipped head, the most probable label's
log-odds are attributed to residues; then the `share` of residues with the highest attribution is masked together, and for
comparison 20 random choices of as many, the first so many (where signal peptides stand), and those with the lowest
attribution. What a good attribution must show: the answer falls further than at random, by more than its interval.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from _common import host, versions, write_result

import bioseq
from bioseq.heads.features import kept
from bioseq.inference.interpretation import answers, attribute, masked
from bioseq.inference.predictor import Predictor


def proteins(file: Path, count: int, longest: int) -> list[str]:
    with gzip.open(file, "rt") as handle:
        rows = [r["sequence"] for r in csv.DictReader(handle) if r["set"] == "valid"]
    rows = [s for s in rows if 60 <= len(s) <= longest]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]


def falls(
    model: Predictor, sequence: str, head: str, share: float, rng: np.random.Generator
) -> dict[str, float]:
    """How far the log-odds fall, by which residues are hidden."""
    found = attribute(model, sequence, head)
    n = max(1, round(share * len(sequence)))
    order = np.argsort(-found.values, kind="stable")
    ways = {"highest": [order[:n]], "lowest": [order[-n:]], "first": [np.arange(n)]}
    ways["random"] = [rng.choice(len(sequence), n, replace=False) for _ in range(20)]
    query = model.prepare(sequence, heads=(head,))
    if model.heads[head].reads_homologs:
        query.told = {head: model.heads[head].find(kept([sequence], [len(query.ids)]))}
    fallen = {}
    for way, choices in ways.items():
        said = answers(model, [masked(model, query, c.tolist()) for c in choices], head, found.label)
        fallen[way] = float(found.answer - said.mean())
    return fallen


def interval(values: np.ndarray) -> dict[str, float]:
    rng = np.random.default_rng(1)
    means = values[rng.integers(0, len(values), (10_000, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "mean": round(float(values.mean()), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", type=Path)
    p.add_argument("--proteins", type=int, default=60)
    p.add_argument("--longest", type=int, default=400)
    p.add_argument("--share", type=float, default=0.1)
    p.add_argument("--out")
    args = p.parse_args()
    model = bioseq.load("default", threads=1)
    heads: dict[str, Any] = {}
    for head in ("localization", "target_class"):
        rng = np.random.default_rng(2)
        chosen = proteins(args.data / f"{head}.csv.gz", args.proteins, args.longest)
        rows = [falls(model, s, head, args.share, rng) for s in chosen]
        of = {way: np.array([r[way] for r in rows]) for way in rows[0]}
        heads[head] = {
            "proteins": len(rows),
            "fall_of_log_odds": {way: interval(values) for way, values in of.items()},
            "highest_less_random": interval(of["highest"] - of["random"]),
            "highest_less_first": interval(of["highest"] - of["first"]),
            "proteins_where_it_falls_further_than_at_random": round(
                float((of["highest"] > of["random"]).mean()), 3
            ),
        }
        print(json.dumps({head: heads[head]}, indent=1))
    result = {
        "share": args.share, "longest": args.longest, "model": model.content_hash, "heads": heads, "host": host(), "versions": versions(),
    }  # fmt: skip
    print(write_result("attribution", result, args.out))
    return int(any(h["highest_less_random"]["low"] <= 0 for h in heads.values()))


if __name__ == "__main__":
    raise SystemExit(main())

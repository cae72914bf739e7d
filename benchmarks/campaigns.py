"""Campaigns on measured landscapes, beside greedy one-hot ridge, a random forest on embeddings and random picks.

    python benchmarks/campaigns.py DATA --runs RUNS.jsonl [--part main|ablations|singles|size ...] [--seeds 20]
    python benchmarks/campaigns.py DATA --runs RUNS.jsonl --seeds 0      # writes the summary of what there is

DATA is a folder of `NAME.csv` (variant, fitness) and `NAME.fasta` (wild type) for gb1 and avgfp. Every run of a seed is a
line of RUNS.jsonl; those that are there are not run again, so it can be stopped and go on. Seeds count from 100: lower
ones served to tune the method. The parts: `main`, 5 rounds of 96, clean and with noise and failed wells; `ablations` of
that; `singles`, three rounds of 16 single mutants of avgfp, as FolDE reports, beside random forests; `size`, all of a synthetic space of
four sites. Best is 0 at the table's median and 1 at its maximum; noise is in standard deviations of the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from _common import host, versions, write_result
from sklearn.ensemble import RandomForestRegressor

import bioseq
from bioseq.campaigns.space import read_variants
from bioseq.sequences.fasta import read_fasta
from bioseq.sequences.mutations import apply, letters_of
from training.campaigns.choosing import Method
from training.campaigns.landscape import read_landscape
from training.campaigns.simulate import METHODS, Setting, curves, paired, replay
from training.campaigns.surrogates import Eyes, View

FIRST = 100  # seed
PLATES, NOISY, TUBES = Setting(), Setting(noise=0.2, failed=0.1), Setting(rounds=3, batch=16)
FOREST, ONE_HOT = "greedy forest on embeddings", "greedy forest on one-hot"
ABLATIONS = {
    "no prior": Method(prior=False),
    "first round random": Method(first="random"),
    "first round prior": Method(first="prior"),
    "process of ranks only": Method(surrogates=("ranks",)),
    "process of values only": Method(surrogates=("gp",)),
    "ridge only": Method(surrogates=("ridge",)),
    "forest only": Method(surrogates=("forest",)),
    "greedy acquisition": Method(acquisition="greedy"),
    "full thompson": Method(temper=1.0),
}
Pool = tuple[Eyes, View, np.ndarray]


def synthetic() -> Pool:
    """Four sites, additive and pairwise effects, exponentiated: few variants work, as in GB1."""
    rng = np.random.default_rng(0)
    grid = np.array(list(itertools.product(range(20), repeat=4)), np.uint8)
    y = sum(rng.normal(size=20)[grid[:, s]] for s in range(4))
    for a, b in itertools.combinations(range(4), 2):
        y = y + 0.6 * rng.normal(size=(20, 20))[grid[:, a], grid[:, b]]
    eyes = Eyes(grid[0].copy(), np.zeros((4, 20)))
    return eyes, eyes.look(grid[1:]), np.exp(y[1:])


@cache
def landscape(data: Path, name: str) -> Pool:
    if name == "size":
        return synthetic()
    table, wild_type = data / f"{name}.csv", data / f"{name.removesuffix('-singles')}.fasta"
    if name.endswith("-singles") and not table.is_file():
        lines = (data / f"{name.removesuffix('-singles')}.csv").read_text().splitlines()
        table.write_text("\n".join(x for i, x in enumerate(lines) if i == 0 or ":" not in x) + "\n")
    return read_landscape(table, wild_type, "fitness")


@cache
def embeddings(data: Path, name: str) -> np.ndarray:
    """float [N, D], in the landscape's order: means over residues by the default model."""
    wild = letters_of(next(read_fasta(data / f"{name.removesuffix('-singles')}.fasta")).sequence)
    variants = (v for _, v, _ in read_variants(wild, data / f"{name}.csv", "fitness") if v.changes)
    return np.asarray(bioseq.load("default").embed([apply(wild, v) for v in dict.fromkeys(variants)]))


def runs(parts: list[str], seed: int) -> Iterator[tuple[str, str, Setting, str]]:
    """Part, landscape, setting and method of one seed."""
    for name in ("gb1", "avgfp"):
        if "main" in parts:
            yield from (("main", name, PLATES, m) for m in METHODS)
            yield from (("noise", name, NOISY, m) for m in METHODS[:2])
        if "ablations" in parts:
            yield from (("main", name, PLATES, m) for m in ABLATIONS)
    if "singles" in parts:
        yield from (("singles", "avgfp-singles", TUBES, m) for m in (*METHODS, ONE_HOT, FOREST))
    if "size" in parts and seed < FIRST + 2:
        yield "size", "size", PLATES, "campaign"


def run(data: Path, name: str, setting: Setting, method: str, seed: int) -> dict[str, Any]:
    eyes, pool, y = landscape(data, name)
    greedy = None
    if method in (FOREST, ONE_HOT):
        features = embeddings(data, name) if method == FOREST else pool.X.toarray()
        greedy = (RandomForestRegressor(100, random_state=seed), features)
    kind = "campaign" if method in ABLATIONS else method
    began, used = time.perf_counter(), time.process_time()
    rounds = replay(eyes, pool, y, setting, seed, kind, ABLATIONS.get(method), greedy)
    took = time.perf_counter() - began, time.process_time() - used
    order, picked = np.argsort(-y), np.concatenate(rounds)
    found = curves(rounds, y)
    return {
        "best": found["best"], "top": found["top"], "variants": len(y),
        "hits among the top 10 %": int(np.isin(picked, order[: len(y) // 10]).sum()),
        "any of the top 1 %": bool(np.isin(picked, order[: len(y) // 100]).any()),
        "seconds": took[0], "cpu seconds": took[1],
    }  # fmt: skip


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """By part, landscape and method: means; and the campaign's paired gain, over the seeds that both have."""
    by: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for line in lines:
        by.setdefault(f"{line['part']}, {line['landscape']}", {}).setdefault(line["method"], {})[
            line["seed"]
        ] = line
    out: dict[str, Any] = {}
    for place, methods in by.items():
        out[place] = {}
        for method, seeds in methods.items():
            rows = list(seeds.values())
            out[place][method] = {"seeds": len(rows), "variants": rows[0]["variants"]} | {
                k: np.round(np.mean([r[k] for r in rows], 0), 4).tolist()
                for k in (
                    "best",
                    "top",
                    "hits among the top 10 %",
                    "any of the top 1 %",
                    "seconds",
                    "cpu seconds",
                )
            }
            if method != "campaign":
                out[place][method]["campaign less this"] = gain(methods.get("campaign", {}), seeds)
        _, name = place.split(", ")
        if place.startswith("noise"):
            clean = by.get(f"main, {name}", {}).get("campaign", {})
            out[place]["cost of noise to the campaign"] = gain(clean, methods.get("campaign", {}))
    return out


def gain(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean and 95 % interval of one less the other."""
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return {"seeds": 0}
    a, b = (np.array([d[s]["best"] for s in seeds]) for d in (one, other))
    hits = [np.array([d[s]["hits among the top 10 %"] for s in seeds]) for d in (one, other)]
    by_round = {f"round {r + 1}": paired(a[:, r], b[:, r]) for r in range(a.shape[1])}
    return {"seeds": len(seeds), "area": paired(a.mean(1), b.mean(1)), "hits": paired(*hits)} | by_round


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("data", type=Path)
    p.add_argument("--runs", type=Path, required=True)
    p.add_argument("--part", nargs="+", choices=("main", "ablations", "singles", "size"), default=["main"])
    p.add_argument("--seeds", type=int, default=20)
    p.add_argument("--without", nargs="*", default=[], help="methods that are left out")
    p.add_argument("-o", "--output", help="default: a dated file in benchmarks/results")
    args = p.parse_args()
    lines = [json.loads(x) for x in args.runs.read_text().splitlines()] if args.runs.is_file() else []
    done = {(x["part"], x["landscape"], x["method"], x["seed"]) for x in lines}
    with open(args.runs, "a") as handle:
        for seed in range(FIRST, FIRST + args.seeds):
            for part, name, setting, method in runs(args.part, seed):
                if (part, name, method, seed) not in done and method not in args.without:
                    line = {"part": part, "landscape": name, "method": method, "seed": seed}
                    lines.append(line | run(args.data, name, setting, method, seed))
                    print(json.dumps(lines[-1]), file=handle, flush=True)
    settings = {"main": PLATES, "noise": NOISY, "singles": TUBES}
    report = {
        "settings": {k: asdict(v) for k, v in settings.items()}, "method": asdict(Method()), "first seed": FIRST,
        "result": summary(lines), "command": "python benchmarks/campaigns.py DATA --runs RUNS.jsonl",
        "host": host(), "versions": versions(),
    }  # fmt: skip
    print(write_result("campaigns", report, args.output))


if __name__ == "__main__":
    main()

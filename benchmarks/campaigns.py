"""Campaigns on measured landscapes, beside greedy one-hot ridge and random picks, with paired seeds.

    python benchmarks/campaigns.py DATA [--seeds 20] [--part gb1|avgfp|size] [--ablations NAME ...] [--noise 0.2 --failed 0.1]

DATA is a folder of `NAME.csv` (variant, fitness) and `NAME.fasta` (wild type) for gb1 and avgfp. `size` times a synthetic
four-site table of 149,361 variants. Best is 0 at the table's median and 1 at its maximum.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _common import host, versions, write_result

from training.campaigns.choosing import Method
from training.campaigns.simulate import METHODS, Setting, curves, replay, summarise
from training.campaigns.surrogates import Eyes, View


def landscape(data: Path, name: str) -> tuple[Eyes, View, np.ndarray]:
    from training.campaigns.landscape import read_landscape

    return read_landscape(data / f"{name}.csv", (data / f"{name}.fasta"), "fitness")


def synthetic() -> tuple[Eyes, View, np.ndarray]:
    """Four sites, additive and pairwise effects, exponentiated: few variants work, as in GB1."""
    rng = np.random.default_rng(0)
    grid = np.array(list(itertools.product(range(20), repeat=4)), np.uint8)
    grid = grid[np.sort(rng.permutation(len(grid))[:149_361])]
    y = sum(rng.normal(size=20)[grid[:, s]] for s in range(4))
    for a, b in itertools.combinations(range(4), 2):
        y = y + 0.6 * rng.normal(size=(20, 20))[grid[:, a], grid[:, b]]
    eyes = Eyes(grid[0].copy(), np.zeros((4, 20)))
    keep = grid[1:]
    return eyes, eyes.look(keep), np.exp(y[1:])


def compare(
    eyes: Eyes,
    pool: View,
    y: np.ndarray,
    setting: Setting,
    seeds: int,
    methods: dict[str, tuple[str, Method]],
) -> tuple[dict[str, Any], dict[str, float]]:
    found: dict[str, list[dict[str, list[float]]]] = {m: [] for m in methods}
    seconds = dict.fromkeys(methods, 0.0)
    for seed in range(seeds):
        for name, (kind, method) in methods.items():
            began = time.perf_counter()
            found[name].append(curves(replay(eyes, pool, y, setting, seed, kind, method), y))
            seconds[name] += (time.perf_counter() - began) / seeds
    return summarise(found), {k: round(v, 2) for k, v in seconds.items()}


ABLATIONS = {
    "campaign": Method(),
    "no prior": Method(prior=False),
    "first round random": Method(first="random"),
    "first round prior": Method(first="prior"),
    "gp only": Method(surrogates=("gp",)),
    "ridge only": Method(surrogates=("ridge",)),
    "forest only": Method(surrogates=("forest",)),
    "greedy acquisition": Method(acquisition="greedy"),
    "full thompson": Method(temper=1.0),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("data", type=Path)
    p.add_argument("--part", choices=("gb1", "avgfp", "size"), default="gb1")
    p.add_argument("--ablations", nargs="*", choices=list(ABLATIONS))
    p.add_argument("--seeds", type=int, default=20)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--batch", type=int, default=96)
    p.add_argument("--noise", type=float, default=0.0)
    p.add_argument("--failed", type=float, default=0.0)
    p.add_argument("-o", "--output", help="default: a dated file in benchmarks/results")
    args = p.parse_args()
    eyes, pool, y = synthetic() if args.part == "size" else landscape(args.data, args.part)
    setting = Setting(args.rounds, args.batch, args.noise, args.failed)
    methods = {m: (m, Method()) for m in METHODS}
    if args.ablations is not None:
        methods = {m: ("campaign", ABLATIONS[m]) for m in ("campaign", *args.ablations)}
    result, seconds = compare(eyes, pool, y, setting, args.seeds, methods)
    report = {
        "landscape": args.part, "variants": len(y), "seeds": args.seeds, "setting": asdict(setting),
        "method": asdict(Method()), "seconds_a_seed": seconds, "result": result,
        "command": "python benchmarks/campaigns.py " + " ".join(Path(a).name for a in sys.argv[1:]),
        "host": host(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    print(write_result(f"campaigns-{args.part}", report, args.output))


if __name__ == "__main__":
    main()

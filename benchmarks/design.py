"""Design on avGFP (Sarkisyan et al. 2016), judged by a model that saw none of the campaign's labels.

    python benchmarks/design.py DATA [--seeds 5] [--labels 480]

Half of the labelled variants, drawn once, teach the judge: a network on one-hot residues whose Spearman on 2,000 more held-back variants
is in the result. From the other half each seed draws the labels of a campaign. Three ways propose a hundred variants from these, with
equal numbers of mutations:

- design: `bioseq design --campaign`, five to eight mutations, defaults otherwise.
- greedy: single sites. One-hot ridge on the labels; the proposals are the combinations of its twenty best substitutions
  at distinct positions with the highest sums.
- random: residues drawn at random positions.

All three use only substitutions that the judge has seen ten times or more: of others it knows nothing and takes them to be harmless.
A hit is a proposal that the judge holds for brighter than 95 % of the measured variants with five or more mutations.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from _common import host, versions, write_result
from _labels import avgfp
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.neural_network import MLPRegressor

import bioseq
from bioseq.campaigns.campaign import Campaign, Settings
from bioseq.campaigns.ingest import ingest
from bioseq.heads.features import LETTERS
from bioseq.sequences.mutations import between
from training.campaigns.landscape import zero_shot
from training.tables.variants import differences

MANY, MOST, PROPOSALS, SEEN = 5, 8, 100, 10


def onehot(sequences: list[str], wild: str) -> np.ndarray:
    """float32 [N, 20 L], zero where the wild type's residue stands."""
    codes = np.array([[LETTERS.index(c) for c in s] for s in (*sequences, wild)])
    out = np.zeros((len(codes), len(wild), 20), np.float32)
    np.put_along_axis(out, codes[:, :, None], 1.0, axis=2)
    return (out * (codes != codes[-1])[:, :, None]).reshape(len(codes), -1)[:-1]


def greedy(x: np.ndarray, y: np.ndarray, known: np.ndarray, wild: str, counts: list[int]) -> list[str]:
    ridge = RidgeCV(np.logspace(-1, 3, 9)).fit(x, y)
    gain = np.where((x.sum(0) > 0) & known.ravel(), ridge.coef_, -np.inf).reshape(len(wild), 20)
    sites = np.argsort(-gain.max(1))[:20]
    best, letter = gain[sites].max(1), gain[sites].argmax(1)
    out = []
    for n, wanted in sorted(Counter(counts).items()):
        sets = np.array(list(itertools.combinations(range(len(sites)), n)))
        top = sets[np.argsort(-best[sets].sum(1), kind="stable")[:wanted]]
        out += [put(wild, {int(sites[k]): LETTERS[letter[k]] for k in some}) for some in top]
    return out


def at_random(wild: str, known: np.ndarray, counts: list[int], rng: np.random.Generator) -> list[str]:
    sites = np.flatnonzero(known.any(1))
    return [
        put(
            wild,
            {s: LETTERS[rng.choice(np.flatnonzero(known[s]))] for s in rng.choice(sites, n, replace=False)},
        )
        for n in counts
    ]


def put(wild: str, changes: dict[int, str]) -> str:
    return "".join(changes.get(i, c) for i, c in enumerate(wild))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", type=Path)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--labels", type=int, default=480)
    p.add_argument("--generations", type=int, default=20)
    p.add_argument("--out")
    args = p.parse_args()
    wild, labels = avgfp(args.data)
    sequences, y = list(labels.sequences), labels.y[:, 0]
    order = differences(sequences, wild).sum(1)
    drawn = np.random.default_rng(0).permutation(len(y))
    half = len(y) // 2
    teach, check, pool = drawn[: half - 2000], drawn[half - 2000 : half], drawn[half:]
    pool = pool[(order[pool] >= 1) & (order[pool] <= MOST)]
    judge = MLPRegressor(hidden_layer_sizes=(128,), early_stopping=True, random_state=0, max_iter=40)
    lessons = onehot([sequences[i] for i in teach], wild)
    judge.fit(lessons, y[teach])
    known = (lessons.sum(0) >= SEEN).reshape(len(wild), 20)
    allowed = ", ".join(
        f'{i} = "{"".join(c for c, k in zip(LETTERS, row) if k)}"'
        for i, row in enumerate(known, 1)
        if row.any()
    )
    fixed = [i for i, row in enumerate(known, 1) if not row.any()]

    def judged(some: list[str]) -> np.ndarray:
        return judge.predict(onehot(some, wild))

    right = float(spearmanr(judged([sequences[i] for i in check]), y[check]).statistic)
    bright = float(np.quantile(y[order >= MANY], 0.95))
    print(f"judge: Spearman {right:.3f} on 2,000 held back; a hit is above {bright:.2f}", flush=True)
    prior = zero_shot(wild, "default", "auto")
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        mine = rng.choice(pool, args.labels, replace=False)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign.create(
                Path(folder) / "c",
                Settings(wild_type=wild, objectives=("fluorescence:max",), mutations=MOST),
                prior=prior,
            )
            table = "".join(f"{between(wild, sequences[i])},{y[i]}\n" for i in mine)
            ingest(campaign, f"variant,fluorescence\n{table}".encode())
            limits = Path(folder) / "limits.toml"
            limits.write_text(f"fixed = {fixed}\nallowed = {{{allowed}}}\nmutations = [{MANY}, {MOST}]\n")
            made = bioseq.design(
                wild,
                "campaign.fluorescence",
                campaign=str(campaign.folder),
                constraints=str(limits),
                number=PROPOSALS,
                generations=args.generations,
                seed=seed,
            )
        designs = [r["sequence"] for r in made]
        counts = differences(designs, wild).sum(1).tolist()
        x = onehot([sequences[i] for i in mine], wild)
        ways = {
            "design": designs,
            "greedy": greedy(x, y[mine], known, wild, counts),
            "random": at_random(wild, known, counts, rng),
        }
        row: dict[str, Any] = {"seed": seed, "seconds": round(time.perf_counter() - began, 1)}
        for way, some in ways.items():
            values = judged(some)
            row[way] = {
                "hits_per_hundred": round(100 * float((values > bright).mean()), 1),
                "judged": round(float(values.mean()), 3),
                "distinct": len(set(some)),
            }
        row["mutations"] = round(float(np.mean(counts)), 2)
        rows.append(row)
        print(row, flush=True)
    paired = {}
    for other in ("greedy", "random"):
        gains = np.array([r["design"]["hits_per_hundred"] - r[other]["hits_per_hundred"] for r in rows])
        means = np.random.default_rng(0).choice(gains, (10_000, len(gains))).mean(1)
        paired[other] = [round(float(v), 1) for v in (gains.mean(), *np.quantile(means, [0.025, 0.975]))]
    found = {
        "judge_spearman": round(right, 3),
        "hit_above": round(bright, 3),
        "labels": args.labels,
        "generations": args.generations,
        "seeds": rows,
        "design_less": paired,
    }
    print(paired)
    print(write_result("design", found | {"host": host(), "versions": versions()}, args.out))


if __name__ == "__main__":
    main()

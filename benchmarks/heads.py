"""Heads: how good they are, whether they know it, and what they cost. Each subcommand runs in minutes.

    python benchmarks/heads.py shipped  DATA    the three shipped heads on all held-out rows, beside baselines
    python benchmarks/heads.py gb1      DATA    GB1 two_vs_rest and sampled: 5 seeds, every configuration listed
    python benchmarks/heads.py coverage DATA    90 % intervals on GB1 and avGFP, exchangeable splits and two_vs_rest
    python benchmarks/heads.py few      DATA    24, 96, 384 labels of avGFP beside ridges and the zero-shot score (--seeds 20)
    python benchmarks/heads.py ood      DATA    held-out proteins against their residues shuffled
    python benchmarks/heads.py many             32 frozen heads in one call against one
    python benchmarks/heads.py mixed            LoRA heads mixed in one packed batch against each alone
    python benchmarks/heads.py cost     DATA    frozen, LoRA and full: seconds, peak memory, metric
    python benchmarks/heads.py time     DATA    seconds of a default head on 8,733 variants of one protein (--threads 2)

DATA is a folder of the development data. The claims (docs/heads.md): thresholds for a backbone trained on a GPU;
before that every head must be better than every baseline. The backbone is named by its hash in every result.

GB1 follows the augmented models of Hsu et al. 2022: one-hot residues, site properties and the backbone's
masked-marginal density; `--embed` adds the mean embedding of every variant (slow on a CPU). What is chosen, is chosen
on training and validation rows; the test rows are looked at once, for the choice and for one-hot ridge.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import host, read_proteins, versions, write_result

GB1 = {"two_vs_rest": 0.594, "sampled": 0.787}  # one-hot ridge, from the data's README
GB1_GOAL = {"two_vs_rest": 0.73, "sampled": 0.92}
GB1_SETS = (
    ("onehot", "masked_marginal"),
    ("onehot", "properties", "masked_marginal"),
    ("onehot", "properties", "mutations", "masked_marginal"),
    ("onehot", "pairs", "masked_marginal"),
)


def backbone(name: str, threads: int | None, dtype: str = "float32") -> Any:
    from bioseq.inference.loading import load

    return load(name, threads=threads, dtype=dtype)


def finish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    path = write_result(
        f"heads-{args.what}",
        {**result, "host": host(), "versions": versions(), "command": args.command},
        args.out,
    )
    print(json.dumps(result, indent=1)[:6000])
    print(path)


# --------------------------------------------------------------------------------------------- how good


def shipped(args: argparse.Namespace) -> dict[str, Any]:
    """The heads of bioseq/models judged anew on the held-out rows, by the public way in (`Predictor.predict`)."""
    from bioseq.bundles.bundle import open_bundle
    from training.finetune import metrics
    from training.release.make_heads import CLASSES, COMPARTMENTS
    from training.tables.labels import TEST, VALID, read_labels
    from training.tables.residue_labels import read_residues

    data, model = Path(args.data), backbone(args.model, args.threads)
    want = {
        "localization": ("macro_auroc", 0.80),
        "target_class": ("macro_auroc", 0.92),
        "secondary_structure": ("accuracy", 0.68),
    }
    out: dict[str, Any] = {"backbone": model.weights_hash, "heads": {}}
    for name, (main, goal) in want.items():
        folder = Path(args.heads) / name
        evidence = open_bundle(folder).evidence()
        if name == "secondary_structure":
            files = [data / f"secondary_structure_{k}.fasta.gz" for k in ("sequences", "labels", "mask")]
            labels = read_residues(*files)
            rows = np.flatnonzero(labels.part == TEST)
        else:
            labels = read_labels(data / f"{name}.csv.gz", COMPARTMENTS if name == "localization" else CLASSES)
            rows = np.flatnonzero(labels.part == VALID)
        if args.limit and args.limit < len(rows):
            rows = np.sort(np.random.default_rng(0).choice(rows, args.limit, replace=False))
        some = labels.take(rows)
        got = [p[str(folder)] for p in model.predict(some.sequences, [str(folder)], long_sequences="window")]
        if some.residues is not None:
            truth = np.concatenate(some.residues).astype(float)
            scores = metrics.score(
                "per_residue", truth, np.concatenate([np.array(p["probabilities"]) for p in got])
            )
        else:
            p = np.array([[g["probabilities"][c] for c in some.classes] for g in got])
            scores = metrics.multilabel(some.y, p)
        best = evidence["best_baseline"]
        baseline = evidence["baselines"][best][main]
        out["heads"][name] = {
            "rows": len(rows), "scores": scores, "main": main, "goal_for_a_gpu_backbone": goal,
            "reaches_goal": scores[main] >= goal, "best_baseline": {best: baseline},
            "over_best_baseline": scores[main] - baseline, "ece": evidence["calibration"]["ece"],
        }  # fmt: skip
    return out


def _gb1(args: argparse.Namespace, model: Any, name: str) -> tuple[Any, Any, Any]:
    """(parts, rows to fit and choose on, the test part as fits see it)."""
    from training.finetune.embeddings import embed_cached
    from training.finetune.fit import site_context
    from training.finetune.models.pooled import FEW
    from training.finetune.models.rows import Held, Rows
    from training.tables.labels import TEST, TRAIN, VALID, read_labels
    from training.tables.splits import make_split

    labels = read_labels(Path(args.data) / f"gb1_{name}.csv.gz", ["target"])
    split = make_split(labels, measure=False)
    places = {n: split.places(p) for n, p in (("train", TRAIN), ("valid", VALID), ("test", TEST))}
    parts = {n: labels.take(p) for n, p in places.items()}
    both = np.concatenate([places["train"], places["valid"]])
    context = site_context(split.variants, both, model, masked_marginal=True)
    embeddings = {}
    for part, some in parts.items():
        if args.embed:
            embeddings[part] = np.stack(
                embed_cached(model, some.sequences, label=f"embedding the {part} rows")[0]
            )
        else:
            embeddings[part] = np.zeros((len(some), 1), np.float32)
    joined = parts["train"].joined(parts["valid"])
    refit = len(parts["valid"]) < FEW
    cut = len(parts["train"])
    folds = split.folds(both)[0] if refit else [(np.arange(cut), np.arange(cut, len(both)))]
    rows = Rows(
        np.concatenate([embeddings["train"], embeddings["valid"]]),
        joined.sequences,
        joined.y,
        joined.weights,
        folds,
        refit,
        context,
        groups=split.resampled(both),
    )
    return parts, rows, Held(embeddings["test"], parts["test"].sequences)


def _test_values(chosen: Any, rows: Any, held: Any) -> np.ndarray:
    return chosen.outputs(held.matrix(chosen.blocks, rows.context, rows.trained))[:, 0]


def context_of(rows: Any) -> dict[str, str]:
    """Residues of the wild type that was taken, at the sites that vary."""
    return {str(i + 1): rows.context.wild_type[i] for i in rows.context.sites}


def zero_shot(rows: Any, held: Any) -> np.ndarray:
    from bioseq.heads.features import compute

    return compute("masked_marginal", held.sequences, rows.context)[:, 0]


def _gain(truth: np.ndarray, values: list[np.ndarray], reference: np.ndarray) -> Any:
    from training.finetune.metrics import spearman

    def difference(r: np.ndarray) -> float:
        return float(np.mean([spearman(truth[r], v[r]) for v in values])) - spearman(truth[r], reference[r])

    return difference


def gb1(args: argparse.Namespace) -> dict[str, Any]:
    from training.finetune.metrics import paired_bootstrap, spearman
    from training.finetune.models.frozen import fit_frozen

    model = backbone(args.model, args.threads)
    out: dict[str, Any] = {"backbone": model.weights_hash, "embed": args.embed, "splits": {}}
    sets = GB1_SETS + ((("embedding", *GB1_SETS[2]),) if args.embed else ())
    for name in args.splits.split(","):
        parts, rows, held = _gb1(args, model, name)
        truth = parts["test"].y[:, 0]
        ridge = fit_frozen("regression", rows, 1, models=("linear",), sets=(("onehot",),))
        reference = _test_values(ridge, rows, held)
        plain = fit_frozen("regression", rows, 1, models=("linear",), sets=(("onehot", "masked_marginal"),))
        augmented = _test_values(plain, rows, held)
        seeds, values, tried = [], [], []
        for seed in range(args.seeds):
            best = fit_frozen("regression", rows, 1, sets=sets, seed=seed, tick=print)
            got = _test_values(best, rows, held)
            values.append(got)
            tried.append(best.tried)
            seeds.append({"seed": seed, "chosen": best.setting, "test_spearman": spearman(truth, got)})
            print(name, seeds[-1], flush=True)
        # the same resampled test rows for both: mean over seeds of the head's Spearman, less one-hot ridge's
        gain = paired_bootstrap(np.arange(len(truth)), _gain(truth, values, reference), rounds=args.rounds)
        beside = paired_bootstrap(np.arange(len(truth)), _gain(truth, values, augmented), rounds=args.rounds)
        mean = statistics.mean(s["test_spearman"] for s in seeds)
        out["splits"][name] = {
            "rows": {p: len(some) for p, some in parts.items()},
            "mean_test_spearman": mean,
            "seeds": seeds,
            "onehot_ridge_here": spearman(truth, reference),
            "onehot_ridge_readme": GB1[name],
            "wild_type": context_of(rows),
            "augmented_ridge_here": spearman(truth, augmented),
            "zero_shot_here": spearman(truth, zero_shot(rows, held)),
            "gain_over_augmented_ridge": dict(zip(("value", "low", "high"), beside)),
            "gain_over_ridge": dict(zip(("value", "low", "high"), gain)),
            "beats_ridge": mean > GB1[name] and gain[1] > 0,
            "goal": GB1_GOAL[name],
            "reaches_goal": mean >= GB1_GOAL[name],
            "tried_by_seed": tried,
        }
    return out


def coverage(args: argparse.Namespace) -> dict[str, Any]:
    import _labels

    return _labels.coverage(args, backbone(args.model, args.threads), _gb1, GB1_SETS)


def few(args: argparse.Namespace) -> dict[str, Any]:
    import _labels

    return _labels.few(args, backbone(args.model, args.threads))


def ood(args: argparse.Namespace) -> dict[str, Any]:
    from bioseq.bundles.bundle import open_bundle
    from bioseq.heads.head import Head
    from training.finetune.metrics import auroc
    from training.finetune.ood import shuffled
    from training.release.make_heads import COMPARTMENTS
    from training.tables.labels import VALID, read_labels

    model = backbone(args.model, args.threads)
    head = Head.load(open_bundle(Path(args.heads) / "localization"))
    labels = read_labels(Path(args.data) / "localization.csv.gz", COMPARTMENTS)
    rows = np.flatnonzero(labels.part == VALID)
    if args.limit and args.limit < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, args.limit, replace=False))
    natural = [labels.sequences[i] for i in rows]
    noise = shuffled(natural, 5)
    scores = [head.ood.score(model.embed(s, progress=True), s) for s in (natural, noise)]
    value = auroc(np.r_[np.zeros(len(rows)), np.ones(len(rows))], np.concatenate(scores))
    return {"backbone": model.weights_hash, "pairs": len(rows), "auroc": value, "required": 0.8, "goal": 0.9}


# ------------------------------------------------------------------------------------------------- cost


def _frozen_heads(model: Any, count: int) -> list[Any]:
    """Different heads of the shipped form: an ensemble of networks on embedding and sequence features."""
    import torch

    from bioseq.heads.features import ORDER_BLOCKS, Context, width
    from bioseq.heads.head import Head
    from training.finetune.ood import fit_ood

    sequences = read_proteins(60)
    pooled = model.embed(sequences)
    f = pooled.shape[1] + sum(width(b, Context()) for b in ORDER_BLOCKS)
    heads = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        ood = fit_ood(pooled, sequences, [str(j) for j in range(60)], seed=i)
        tensors = {
            "features.mean": torch.zeros(f), "features.scale": torch.ones(f),
            "layers.0.weight": torch.randn(3, f, 96, generator=g) / 50, "layers.0.bias": torch.zeros(3, 1, 96),
            "layers.1.weight": torch.randn(3, 96, 10, generator=g) / 10, "layers.1.bias": torch.zeros(3, 1, 10),
        }  # fmt: skip
        classes = [f"c{j}" for j in range(10)]
        settings = {
            "method": "frozen",
            "blocks": ["embedding", *ORDER_BLOCKS],
            "classes": classes,
            "targets": classes,
        }
        calibration = {"platt": [[1.0, 0.0]] * 10, "thresholds": [0.5] * 10}
        heads.append(
            Head(
                f"head{i}",
                "multilabel",
                classes,
                settings,
                tensors | ood.tensors(),
                calibration,
                base_weights_hash=model.weights_hash,
            )
        )
    return heads


def many(args: argparse.Namespace) -> dict[str, Any]:
    """32 frozen heads of one backbone in one call against one head, taking turns; best of the rounds."""
    model = backbone(args.model, args.threads)
    heads = _frozen_heads(model, 32)
    for head in heads:
        model.load_head(head.name, head)
    sequences = read_proteins(args.proteins)
    names = [h.name for h in heads]
    first = model.predict(sequences[:20], names[:1])
    check = model.predict(sequences[:20], names)
    assert all(a[names[0]] == b[names[0]] for a, b in zip(first, check)), (
        "other heads changed a head's answer"
    )
    seconds: dict[int, list[float]] = {1: [], 32: []}
    for _ in range(args.rounds_timed):
        for count in seconds:
            start = time.perf_counter()
            model.predict(sequences, names[:count])
            seconds[count].append(time.perf_counter() - start)
    ratio = min(seconds[1]) / min(seconds[32])
    return {
        "backbone": model.weights_hash, "proteins": len(sequences), "seconds": seconds,
        "throughput_of_32_over_1": ratio, "required": 0.8, "goal": 0.95,
    }  # fmt: skip


def mixed(args: argparse.Namespace) -> dict[str, Any]:
    """Relative error of hidden states: adapters mixed in packs against each sequence alone."""
    import torch

    from bioseq.backbones import lora as adapters

    model = backbone(args.model, args.threads)
    encoder = model.encoder
    for i in range(4):
        shape = adapters.LoraShape(8, 16.0, ("query", "key", "value"))
        adapter = adapters.LoraAdapter(encoder, shape, generator=torch.Generator().manual_seed(i))
        for b in adapter.b.values():
            b.data.normal_(std=0.05, generator=torch.Generator().manual_seed(9 + i))
        adapters.attach(encoder, f"a{i}", adapter.eval().requires_grad_(False))
    sequences = read_proteins(40)
    queries = [model.prepare(s) for s in sequences]
    ids = [torch.tensor([0, *w.ids.tolist(), 2]) for w in queries]
    routes = [None if i % 5 == 4 else f"a{i % 5}" for i in range(len(ids))]
    worst, moved = 0.0, []
    with torch.inference_mode():
        for at in range(0, len(ids), 10):
            group, names = ids[at : at + 10], routes[at : at + 10]
            bounds = np.cumsum([0, *map(len, group)]).astype(np.int32)
            segments = [(r, int(a), int(b)) for r, a, b in zip(names, bounds, bounds[1:])]
            with adapters.routed(encoder, segments):
                together = encoder(torch.cat(group), torch.from_numpy(bounds), max(map(len, group)))
            for one, name, (a, b) in zip(group, names, zip(bounds, bounds[1:])):
                cu = torch.tensor([0, len(one)], dtype=torch.int32)
                with adapters.routed(encoder, [(name, 0, len(one))]):
                    alone = encoder(one, cu, len(one))
                bare = encoder(one, cu, len(one))
                worst = max(worst, float((together[a:b] - alone).norm() / alone.norm()))
                moved.append(float((alone - bare).norm() / bare.norm()) if name else 0.0)
    return {
        "backbone": model.weights_hash,
        "worst_relative_error": worst,
        "required": 1e-5,
        "adapters_moved": max(moved),
    }


def _one_cost(method: str, args: argparse.Namespace, folder: str, queue: Any) -> None:
    import resource

    from bioseq.specs.finetune import FinetuneSpec
    from training.finetune.run import finetune
    from training.release.make_heads import CLASSES

    start = time.perf_counter()
    bundle = finetune(
        FinetuneSpec(
            labels=str(Path(args.data) / "target_class.csv.gz"), targets=CLASSES, base=args.model, method=method,
            max_train=args.rows, max_valid=args.rows // 2, max_test=args.rows // 2, epochs=args.epochs,
            models=("linear",), features=() if method == "frozen" else None, threads=args.threads,
            output=f"{folder}/{method}", cache=f"{folder}/cache-{method}",
        )
    )  # fmt: skip
    evidence = bundle.evidence()
    queue.put(
        {
            "method": method, "seconds": time.perf_counter() - start,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "macro_auroc": evidence["metrics"]["macro_auroc"],
            "best_baseline": evidence["baselines"][evidence["best_baseline"]]["macro_auroc"],
            "trained_parameters": evidence["cost"].get("trained_parameters"),
            "bundle_mib": sum(f.stat().st_size for f in bundle.path.rglob("*") if f.is_file()) / 2**20,
        }
    )  # fmt: skip


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """A process each, so that peak memories do not mix. `frozen` here is the embedding alone, as lora and full have it."""
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for method in ("frozen", "lora", "full"):
            context = mp.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=_one_cost, args=(method, args, folder, queue))
            process.start()
            table.append(queue.get())
            process.join()
    return {
        "backbone": backbone(args.model, args.threads).weights_hash,
        "rows": args.rows,
        "epochs": args.epochs,
        "table": table,
    }


def clock(args: argparse.Namespace) -> dict[str, Any]:
    """`finetune` on the 8,733 variants of GB1 `sampled` with nothing cached; the search database is there already."""
    import resource

    from bioseq.homologs.database import open_database
    from bioseq.homologs.reference import open_reference
    from bioseq.specs.finetune import FinetuneSpec
    from training.finetune.run import finetune

    open_database(open_reference("default"))
    table = []
    for turn in range(args.rounds_timed):
        own, below = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            evidence = finetune(
                FinetuneSpec(
                    labels=str(Path(args.data) / "gb1_sampled.csv.gz"), targets=("target",), base=args.model,
                    threads=args.threads, output=f"{folder}/head", cache=f"{folder}/cache", seed=turn,
                )
            ).evidence()  # fmt: skip
        wall = time.perf_counter() - start
        after = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        used = sum(a.ru_utime + a.ru_stime - b.ru_utime - b.ru_stime for a, b in zip(after, (own, below)))
        table.append(
            {
                "seed": turn, "wall_seconds": wall, "processor_seconds": used, "rows": evidence["rows"],
                "chosen": evidence["chosen"], "spearman_on_validation": max(t["valid"] for t in evidence["tried"]),
            }
        )  # fmt: skip
    return {"threads": args.threads, "required_wall_seconds_on_two_cores": 60, "table": table}


WHAT = {f.__name__: f for f in (shipped, gb1, coverage, few, ood, many, mixed, cost)} | {"time": clock}


def main() -> None:
    import sys

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=WHAT)
    p.add_argument("data", nargs="?")
    p.add_argument("--model", default="default")
    p.add_argument("--heads", default=str(Path(__file__).parent.parent / "bioseq/models"))
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--first-seed", type=int, default=0, help="of few")
    p.add_argument("--part", choices=("settling", "reporting"), default="reporting", help="of few, coverage")
    p.add_argument("--splits", default="two_vs_rest,sampled")
    p.add_argument("--cache", default=None, help="of embeddings")
    p.add_argument("--embed", action="store_true")
    p.add_argument("--rounds", type=int, default=500, help="of the paired bootstrap")
    p.add_argument("--limit", type=int, default=None, help="held-out rows of shipped and ood")
    p.add_argument("--proteins", type=int, default=60)
    p.add_argument("--rounds-timed", type=int, default=3)
    p.add_argument("--rows", type=int, default=200)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("-o", "--out", default=None)
    args = p.parse_args()
    args.command = "python benchmarks/heads.py " + " ".join(a for a in sys.argv[1:] if "/" not in a)
    if args.data is None and args.what not in ("many", "mixed"):
        p.error(f"{args.what} needs the data folder")
    finish(args, WHAT[args.what](args))


if __name__ == "__main__":
    main()

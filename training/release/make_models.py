"""From the data to the shipped bundles: `python -m training.release.make_models --data DIR [-o OUT]`.

DIR holds `swissprot_train.txt.xz`, `swissprot_train.clusters.xz`, the two `swissprot_valid_*.fasta.gz` and the
label tables of the heads. In turn: prepare the corpus, train `protein_8m`, ship its best checkpoint, train the
heads on it. Every part is left out if it is done already, and training goes on from its last checkpoint, so the
same command goes on after a kill.

On a CPU the recipe is taken as it stands (an hour of one core), which gives a smaller model than the shipped one; where
a GPU is found, with the settings below, which made the shipped model (one H200). Which of both is said at the start.
The heads are those of `training.release.make_heads`, with the rows that made what ships. Working files go to --work (the corpus and the run's folder), bundles to OUT.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bioseq.bundles.bundle import open_bundle
from bioseq.errors import InputError, SpecError
from bioseq.specs.pretrain import PretrainSpec
from training.corpus.prepare import Prepare, prepare
from training.pretrain.recipes import recipe

# The same shape for eight minutes of one H200 or H100: large batches, whole proteins, Muon.
GPU: dict[str, object] = {
    "steps": 10_835,
    "tokens_per_step": 131_072,
    "micro_tokens": 131_072,
    "crop": 1022,
    "compile": True,
    "masking.rate": 0.2,
    "optimiser.kind": "muon",
    "optimiser.lr": 3e-3,
    "optimiser.weight_decay": 0.05,
    "schedule.warmup": 200,
    "schedule.decay": 5_417,
    "eval.every": 2_000,
    "checkpoint_every": 2_000,
    "checkpoint_minutes": 0.0,
    "workers.gpus": True,
}
ABOUT = (
    "Swiss-Prot proteins with GO annotation, release of January 2014 (UniProtKB/Swiss-Prot, UniProt Consortium, "
    "CC BY 4.0; taken from the Debian package metastudent-data 2.0.1). Clusters: MMseqs2 linclust at 30 % identity "
    "and 80 % coverage. Validation proteins come from clusters held out whole: `remote` has its nearest training "
    "sequence at 30 to 50 % identity, `orphan` none above 30 %; neither was trained on."
)


def corpus(data: Path, work: Path) -> Path:
    """The prepared corpus of DIR."""
    folder = work / "corpus"
    if not (folder / "manifest.json").exists():
        prepare(
            Prepare(
                sources=(str(data / "swissprot_train.txt.xz"),),
                clusters=(str(data / "swissprot_train.clusters.xz"),),
                valid={n: str(data / f"swissprot_valid_{n}.fasta.gz") for n in ("remote", "orphan")},
            ),
            folder,
        )
    return folder


def backbone(prepared: Path, work: Path, out: Path, settings: dict[str, str], name: str) -> Path:
    """Train (or go on training) recipe `name` and ship its best checkpoint as OUT/default, or OUT/`name`."""
    from training.pretrain.run import run
    from training.release.ship import ship

    folder = work / name
    base: dict[str, object] = {"corpus": str(prepared), "output": str(folder), "about": ABOUT}
    device = GPU if name == "protein_8m" and torch.cuda.is_available() else {}
    spec = recipe(name).override({**base, **device, "engine": "local", "resume": True, **settings})
    made = "the settings that made the shipped model" if device else "the recipe as it stands"
    print(f"{name}: {made}, {spec.steps} steps of {spec.tokens_per_step} tokens", file=sys.stderr)
    finished = (folder / "best" / "manifest.json").exists() and _same(folder, spec)
    if not finished:
        run(spec)
    target = out / ("default" if name == "protein_8m" else name)
    checks = Path(__file__).parents[2] / "tests" / "data"
    ship(folder / "best", target, checks, half=bool(device), force=True)
    return target


def _same(folder: Path, spec: PretrainSpec) -> bool:
    try:
        return PretrainSpec.load(folder / "spec.json") == spec
    except SpecError:
        return False


def main(argv: list[str] | None = None) -> int:
    """Make the shipped models from the data."""
    p = argparse.ArgumentParser(prog="python -m training.release.make_models", description=main.__doc__)
    p.add_argument(
        "--data", type=Path, required=True, help="a folder in the form that docs/pretraining.md describes"
    )
    p.add_argument("-o", "--out", type=Path, default=Path("bioseq/models"), help="where the bundles go")
    p.add_argument("--work", type=Path, default=Path("runs/models"), help="corpus and run folders")
    p.add_argument("--recipe", default="protein_8m")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe"
    )
    p.add_argument("--only", choices=("backbone", "heads"), help="leave the other part out")
    args = p.parse_args(argv)
    if not (args.data / "swissprot_train.txt.xz").is_file():
        raise InputError(f"{args.data} holds no swissprot_train.txt.xz.", hint="See docs/pretraining.md.")
    if args.only != "heads":
        made = backbone(
            corpus(args.data, args.work),
            args.work,
            args.out,
            dict(s.split("=", 1) for s in args.set),
            args.recipe,
        )
        print(f"{made}: {open_bundle(made).manifest.content_hash}", file=sys.stderr)
    if args.only != "backbone":
        from training.release.make_heads import make_heads

        make_heads(args.data, args.out, base=str(args.out / "default"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

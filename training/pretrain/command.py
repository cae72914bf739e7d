"""`bioseq pretrain prepare | run | recipes`: the command line of `training.corpus.prepare` and `training.pretrain.run`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bioseq.cli import new_parser
from bioseq.errors import SpecError
from bioseq.specs.pretrain import PretrainSpec
from bioseq.specs.reading import read_file

EXAMPLE = """bioseq pretrain prepare proteins.txt.xz --clusters proteins.clusters.xz --valid remote=remote.fasta.gz -o corpus/
  bioseq pretrain run protein_tiny --corpus corpus/ -o run/
  bioseq pretrain run protein_8m --corpus corpus/ -o run/ --resume --set steps=5000
  bioseq pretrain --spec pretrain.toml"""
USAGE = """usage: bioseq pretrain {prepare,run,recipes} ...

Train a protein language model on sequences.

  prepare   check, deduplicate and shard sequence files into a corpus
  run       train a recipe on a corpus; ends with backbone bundles
  recipes   list the recipes, or print one as TOML
  --spec F  do the run that a spec file (TOML or JSON) describes

example:
  """


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + EXAMPLE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0].startswith("--spec"):
        return run(argv)
    actions = {"prepare": prepare, "run": run, "recipes": recipes}
    if argv[0] not in actions:
        print(
            f"bioseq pretrain: error: no action {argv[0]!r}; known are prepare, run, recipes", file=sys.stderr
        )
        return 2
    return actions[argv[0]](argv[1:])


def prepare_parser() -> argparse.ArgumentParser:
    p = new_parser(
        "pretrain prepare",
        "Check, deduplicate and shard sequence files into a corpus.",
        example=EXAMPLE.splitlines()[0],
    )
    p.add_argument(
        "source", nargs="+", help="FASTA (plain, gzip), or text, a sequence a line (plain, gzip, xz)"
    )
    p.add_argument("-o", "--output", required=True, help="the corpus's folder")
    p.add_argument(
        "--clusters",
        action="append",
        default=[],
        metavar="FILE",
        help="cluster number of each line; one a text source",
    )
    p.add_argument(
        "--valid",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a held-out set for perplexity; never trained on",
    )
    p.add_argument("--alphabet", choices=("protein", "dna", "rna"), default="protein")
    p.add_argument("--min-length", type=int, default=1, metavar="N", help="leave shorter sequences out")
    p.add_argument(
        "--max-length", type=int, default=0, metavar="N", help="leave longer sequences out (0: none)"
    )
    p.add_argument("--no-deduplicate", action="store_true", help="keep identical sequences")
    p.add_argument(
        "--held-out", type=float, default=0.0, metavar="SHARE", help="of the clusters, as the set held_out"
    )
    p.add_argument(
        "--seed", type=int, default=0, help="of the held-out choice, the sample and hidden residues"
    )
    p.add_argument(
        "--proteins", type=int, default=0, metavar="N", help="only so many, one of each cluster (0: all)"
    )
    p.add_argument(
        "--homologs",
        default="",
        metavar="REF",
        help="search every protein in this reference set (default, or a folder), for a model that reads homologs",
    )
    p.add_argument(
        "--maskings", type=int, default=1, metavar="N", help="searches a protein, each hiding other residues"
    )
    p.add_argument(
        "--set-passes", type=int, default=1, metavar="N", help="passes over held-out sets that are searched"
    )
    p.add_argument(
        "--on-error", choices=("error", "skip"), default="error", help="what to do with a bad sequence"
    )
    p.add_argument(
        "--engine", choices=("auto", "ray", "local"), default="auto", help="ray reads several sources at once"
    )
    p.add_argument("--force", action="store_true", help="replace an existing corpus")
    return p


def _pairs(items: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise SpecError(f"{item!r} is not of the form NAME=VALUE.", field=option)
        pairs[name] = value
    return pairs


def prepare(argv: list[str]) -> int:
    args = prepare_parser().parse_args(argv)
    from training.corpus.prepare import Prepare
    from training.corpus.prepare import prepare as make

    plan = Prepare(
        sources=tuple(args.source),
        clusters=tuple(args.clusters),
        valid=_pairs(args.valid, "--valid"),
        alphabet=args.alphabet,
        min_length=args.min_length,
        max_length=args.max_length,
        deduplicate=not args.no_deduplicate,
        held_out=args.held_out,
        seed=args.seed,
        on_error=args.on_error,
        proteins=args.proteins,
        homologs=args.homologs,
        maskings=args.maskings,
        set_passes=args.set_passes,
    )
    parallel = args.engine == "ray" or (args.engine == "auto" and len(args.source) > 1 and _has_ray())
    manifest = make(plan, args.output, force=args.force, parallel=parallel)
    left = ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in manifest["left_out"].items() if v)
    print(
        f"{args.output}: {manifest['records']:,} sequences, {manifest['residues']:,} residues, "
        f"{manifest['clusters']:,} clusters" + (f"; left out: {left}" if left else ""),
        file=sys.stderr,
    )
    return 0


def _has_ray() -> bool:
    from importlib.util import find_spec

    return find_spec("ray") is not None


def run_parser() -> argparse.ArgumentParser:
    p = new_parser(
        "pretrain run",
        "Train a recipe on a prepared corpus; ends with the best and the last checkpoint as bundles.",
        example="\n".join(EXAMPLE.splitlines()[1:]),
    )
    p.add_argument("recipe", nargs="?", help="see bioseq pretrain recipes")
    p.add_argument("--spec", metavar="FILE", help="a whole spec (TOML or JSON) instead of a recipe")
    p.add_argument("--corpus", help="a folder made by bioseq pretrain prepare")
    p.add_argument("-o", "--output", help="the run's folder")
    p.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in the run's folder"
    )
    p.add_argument("--config", metavar="FILE.toml", help="fields of the spec to override, as TOML")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field, dotted: optimiser.lr=1e-3",
    )
    p.add_argument(
        "--init", metavar="BUNDLE", help="backbone to go on from: name, bundle, or ESM-2 directory"
    )
    p.add_argument("--engine", choices=("auto", "ray", "local"), help="default: ray where it is installed")
    p.add_argument("--address", help="of a running Ray cluster")
    p.add_argument(
        "--storage", metavar="URL", help="where Ray keeps checkpoints: a path or a pyarrow filesystem URL"
    )
    p.add_argument("--register", metavar="NAME", help="enter the best bundle in the registry")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return p


def spec_of(args: argparse.Namespace) -> PretrainSpec:
    """Recipe or spec file, then --config, then --set, then the options. Raises `SpecError`."""
    from training.pretrain.recipes import recipe

    if bool(args.recipe) == bool(args.spec):
        raise SpecError("name a recipe or a spec file, and not both.", field="recipe")
    spec = PretrainSpec.load(args.spec) if args.spec else recipe(args.recipe)
    settings: dict[str, Any] = {}
    if args.config:
        settings |= _dotted(read_file(args.config))
    settings |= _pairs(args.set, "--set")
    for name in ("corpus", "output", "init", "engine", "address", "storage", "register"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if args.resume:
        settings["resume"] = True
    return spec.override(settings)


def _dotted(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            out |= _dotted(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def run(argv: list[str]) -> int:
    args = run_parser().parse_args(argv)
    spec = spec_of(args)
    from training.pretrain.run import run as do

    summary = do(spec, progress=not args.quiet)
    if summary:  # only the main worker has one
        for name, values in summary.get("best", {}).items():
            print(f"perplexity on {name}: {values['perplexity']:.3f}", file=sys.stderr)
        print(json.dumps(summary["bundles"], indent=1), file=sys.stderr)
    return 0


def recipes(argv: list[str]) -> int:
    p = new_parser(
        "pretrain recipes",
        "List the recipes, or print one as TOML.",
        example="bioseq pretrain recipes protein_8m",
    )
    p.add_argument("name", nargs="?")
    args = p.parse_args(argv)
    from training.pretrain.recipes import RECIPES, recipe

    if args.name:
        print(recipe(args.name).to_toml(), end="")
    else:
        for name, make in RECIPES.items():
            print(f"{name:<20} {(make.__doc__ or '').splitlines()[0]}")
    return 0

"""`bioseq finetune`: the command line of `training.finetune.run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from bioseq.cli import new_parser, positive_int
from bioseq.specs.finetune import FEATURE_BLOCKS, LORA_TARGETS, FinetuneSpec, Method, SplitKind, Task

EXAMPLE = """bioseq finetune assay.csv --targets activity --unit 'log10 IC50 (M)' -o activity/ --register activity
  bioseq finetune variants.csv --targets fitness --wild-type wt.fasta --split position -o fitness/
  bioseq finetune proteins.fasta --residue-labels states.fasta --residue-mask mask.fasta -o states/
  bioseq finetune --spec finetune.toml"""


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "finetune",
        "Train a head that predicts your labels, measure it beside baselines, and write it as a bundle.",
        example=EXAMPLE,
    )
    p.add_argument("labels", nargs="?", help="CSV, TSV or Parquet; for residues a FASTA file")
    p.add_argument("--spec", metavar="FILE", help="a spec in TOML or JSON; options given beside it win")
    p.add_argument("--targets", type=_names, metavar="A,B", help="label columns")
    p.add_argument("-o", "--output", help="the bundle's folder")
    p.add_argument("--task", choices=get_args(Task), help="default: guessed from the labels")
    p.add_argument("--base", help="backbone (default: default)")
    p.add_argument("--method", choices=get_args(Method), help="default: lora on a GPU, else frozen")
    p.add_argument("--name", help="of the head (default: the folder's)")
    p.add_argument("--register", metavar="NAME", help="enter the bundle in the registry")
    p.add_argument(
        "--accept-weak", action="store_true", default=None, help="register it even if a baseline is better"
    )
    p.add_argument("--force", action="store_true", default=None, help="replace an existing output")
    rows = p.add_argument_group("rows")
    rows.add_argument("--residue-labels", metavar="FASTA", help="one state letter a residue")
    rows.add_argument("--residue-mask", metavar="FASTA", help="0 leaves a residue out")
    rows.add_argument("--wild-type", metavar="SEQ|FASTA", help="of a table with a `mutant` column")
    rows.add_argument("--weight", metavar="COLUMN", help="row weights")
    rows.add_argument("--id-column", metavar="COLUMN", help="default: id")
    rows.add_argument("--replicates", choices=("error", "mean"), help="one sequence with several values")
    rows.add_argument(
        "--homologs",
        choices=("auto", "none"),
        help="auto: homologs among the training rows become features, and the rows travel in the bundle; none: no "
        "sequence goes into the bundle (default: auto)",
    )
    rows.add_argument("--max-train", type=positive_int, help="use at most so many training rows")
    rows.add_argument("--max-valid", type=positive_int, help="choose and calibrate on at most so many rows")
    rows.add_argument(
        "--max-embedded",
        type=positive_int,
        help="embed at most so many training rows; the rest train the features",
    )
    rows.add_argument("--max-test", type=positive_int, help="measure on at most so many rows")
    split = p.add_argument_group("split")
    split.add_argument(
        "--split",
        choices=get_args(SplitKind),
        help="default: the file's set column; for variants of one protein by mutations, or by position where all are "
        "single; else by sequence cluster",
    )
    split.add_argument("--valid-share", type=float, help="default: 0.15")
    split.add_argument("--test-share", type=float, help="default: 0.15")
    split.add_argument("--identity", type=float, help="of clusters (default: 0.3)")
    split.add_argument(
        "--train-mutations",
        type=positive_int,
        help="farthest distance that trains (default: 2, or what leaves enough rows)",
    )
    split.add_argument("--position-mode", choices=("contiguous", "modulo"))
    model = p.add_argument_group("model")
    model.add_argument(
        "--features",
        type=_names,
        metavar="A,B",
        help=f"sequence features beside the embedding (default: validation chooses): {', '.join(FEATURE_BLOCKS)}",
    )
    model.add_argument(
        "--models", type=_names, metavar="A,B", help="frozen models to try (default: linear,mlp)"
    )
    model.add_argument("--class-weights", choices=("auto", "none", "balanced"))
    model.add_argument("--epochs", type=positive_int, help="of lora and full (default: 10)")
    model.add_argument("--lr", type=float, help="of lora (default: 5e-4) and full (5e-5)")
    model.add_argument("--batch-tokens", type=positive_int, help="default: 4096")
    model.add_argument("--lora-rank", type=positive_int, help="default: 8")
    model.add_argument("--lora-alpha", type=positive_int, help="default: 16")
    model.add_argument(
        "--lora-targets",
        type=_names,
        metavar="A,B",
        help=f"default: query,key,value; of {', '.join(LORA_TARGETS)}",
    )
    model.add_argument("--level", type=float, help="of prediction intervals (default: 0.9)")
    model.add_argument("--seed", type=int, help="default: 0")
    run = p.add_argument_group("run")
    run.add_argument("--workers", type=positive_int, help="Ray Train processes of lora and full (default: 1)")
    run.add_argument("--address", help="of a running Ray cluster")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), help="arithmetic of frozen features")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"))
    run.add_argument("--threads", type=positive_int)
    run.add_argument(
        "--cache", metavar="DIR", help="of embeddings (default: $BIOSEQ_CACHE or ~/.cache/bioseq)"
    )
    about = p.add_argument_group("card")
    about.add_argument("--unit", dest="units", help="of the values")
    about.add_argument("--licence", help="of the labels, and so of the head")
    about.add_argument("--cite", dest="citation", action="append", metavar="TEXT", help="may be given often")
    return p


_NESTED = {
    "split": "split.kind",
    "valid_share": "split.valid",
    "test_share": "split.test",
    "identity": "split.identity",
    "train_mutations": "split.train_mutations",
    "position_mode": "split.position_mode",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_targets": "lora.targets",
}


def spec_of(args: argparse.Namespace) -> FinetuneSpec:
    """The spec of a command line: the file's, with the options that were given over it."""
    data: dict[str, Any] = FinetuneSpec.load(args.spec).to_dict() if args.spec else {}
    for key, value in vars(args).items():
        if key == "spec" or value is None:
            continue
        value = list(value) if isinstance(value, tuple) else value
        *parents, last = _NESTED.get(key, key).split(".")
        at = data
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    data.setdefault("labels", "")
    data.setdefault("output", "")
    return FinetuneSpec.from_dict(data)


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if not args.spec and (not args.labels or not args.output):
        parser().error("a table of labels and -o FOLDER are needed (or --spec FILE)")
    spec = spec_of(args)
    from bioseq.heads.report import head_report
    from bioseq.output import atomic_file
    from training.finetune.run import finetune

    bundle = finetune(spec)
    print(f"head {bundle.manifest.name} in {spec.output}; its card: {spec.output}/card.md", file=sys.stderr)
    report = Path(spec.output).with_name(Path(spec.output).name + ".html")
    if report.exists() and not spec.force:
        print(
            f"{report} exists and is kept; bioseq models report {spec.output} -o FILE.html writes another",
            file=sys.stderr,
        )
        return 0
    with atomic_file(report, force=spec.force) as temporary:
        temporary.write_text(head_report(bundle), "utf-8")
    print(f"its report: {report}", file=sys.stderr)
    return 0

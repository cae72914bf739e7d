"""`bioseq design`: new variants that an objective finds good, under hard constraints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bioseq.cli import add_engine_options, new_parser, positive_int
from bioseq.commands.score import add_homolog_options, read_wild_type

EXAMPLE = """bioseq design --wild-type gfp.fasta --number 96 -o designs.csv
  bioseq design --wild-type gfp.fasta --heads stability --objective 'stability.value + 0.1 * zero_shot' \\
    --constraints limits.toml --number 96 -o designs.csv
  bioseq design --campaign gfp/ --objective campaign.fluorescence --number 96 -o designs.csv
  bioseq design --wild-type gfp.fasta --method gibbs --temperature 0.7 --number 1000 -o library.csv"""


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "design",
        "New variants of a protein that an objective finds good, under constraints.",
        example=EXAMPLE,
    )
    p.add_argument(
        "--wild-type", metavar="FASTA|SEQUENCE", help="a FASTA file of one record, or its residues; default: the "
        "campaign's"
    )  # fmt: skip
    p.add_argument(
        "--objective", default="zero_shot", metavar="EXPR",
        help="what is raised: an expression over zero_shot, mutations, HEAD.value, HEAD.LABEL, HEAD.ood and "
        "campaign.COLUMN (default: zero_shot)",
    )  # fmt: skip
    p.add_argument("--where", metavar="EXPR", help="what must hold in nine of ten draws, as in bioseq screen")
    p.add_argument("--heads", default="", metavar="A,B", help="heads that the expressions name")
    p.add_argument("--campaign", metavar="DIR", help="a campaign, whose surrogates and sites are used")
    p.add_argument("--constraints", metavar="FILE", help="TOML file of what every design must satisfy")
    p.add_argument("--number", type=positive_int, default=96, help="designs (default: 96)")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="CSV file, best first")
    p.add_argument("--force", action="store_true", help="replace an existing output")
    group = p.add_argument_group("search")
    group.add_argument(
        "--method", choices=("evolve", "gibbs"), default="evolve",
        help="evolutionary search, or a library drawn from the masked model (default: evolve)",
    )  # fmt: skip
    group.add_argument("--generations", type=positive_int, default=20, help="of evolve (default: 20)")
    group.add_argument("--batch", type=positive_int, default=200, help="variants a generation (default: 200)")
    group.add_argument("--steps", type=int, default=0, help="of each gibbs chain (default: one sweep)")
    group.add_argument(
        "--temperature", type=float, default=1.0, help="of proposals and of gibbs (default: 1)"
    )
    group.add_argument(
        "--caution", type=float, default=1.0, metavar="SD",
        help="standard deviations subtracted from the objective (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--distance", type=positive_int, default=2, help="fewest mutations between designs (default: 2)"
    )
    group.add_argument("--seed", type=int, default=0, help="default: 0")
    add_homolog_options(p)
    add_engine_options(p)
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from bioseq.design.run import run
    from bioseq.errors import SpecError
    from bioseq.specs.design import DesignSpec

    if args.wild_type is not None:
        wild = read_wild_type(args.wild_type).sequence
    elif args.campaign is not None:
        from bioseq.campaigns.campaign import Campaign

        wild = Campaign(args.campaign).wild_type
    else:
        raise SpecError("give --wild-type, or --campaign.", field="wild_type")
    spec = DesignSpec(
        wild_type=wild,
        heads=tuple(h for h in args.heads.split(",") if h),
        **{
            name: getattr(args, name)
            for name in (
                "objective", "where", "campaign", "constraints", "number", "method", "generations", "batch", "steps",
                "temperature", "caution", "distance", "seed", "homologs", "alignment", "model", "dtype", "device",
                "threads",
            )
        },
    )  # fmt: skip
    rows = run(spec, Path(args.output), force=args.force)
    print(f"{len(rows)} designs in {args.output}", file=sys.stderr)
    if len(rows) < args.number:
        print(
            f"{args.number} were asked for; more generations, a smaller --distance or looser constraints give more.",
            file=sys.stderr,
        )
    return 0

"""`bioseq campaign`: rounds of design and measurement."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from bioseq.campaigns.campaign import Campaign, Objective, Settings
from bioseq.campaigns.ingest import ingest
from bioseq.cli import new_parser, positive_int
from bioseq.errors import SpecError
from bioseq.sequences.fasta import read_fasta
from bioseq.sequences.mutations import letters_of
from bioseq.specs.propose import ProposeSpec

EXAMPLE = """bioseq campaign create gb1 --wild-type gb1.fasta --sites 39,40,41,54 --objective fitness
  bioseq campaign propose gb1 -o plate.csv
  bioseq campaign ingest gb1 results.csv
  bioseq campaign status gb1
  bioseq campaign report gb1 -o report.html
  bioseq campaign simulate landscape.csv --wild-type gb1.fasta --objective fitness"""


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "campaign", "Rounds of design and measurement of variants: which ones next?", example=EXAMPLE
    )
    verbs = p.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=argparse.ArgumentParser)

    def add(name: str, text: str, *, folder: str | bool = True, also: str = "") -> argparse.ArgumentParser:
        q = verbs.add_parser(
            name, help=text, description=text, allow_abbrev=False, aliases=[also] if also else []
        )
        if folder:
            q.add_argument(
                "folder", type=Path, help="the campaign's folder", nargs="?" if folder == "?" else None
            )
        return q

    q = add("create", "start a campaign: a folder with frozen settings", also="new")
    q.add_argument("--wild-type", type=Path, required=True, metavar="FASTA", help="its first record")
    q.add_argument("--sites", help="all combinations at these positions: 39,40,41,54")
    q.add_argument("--mutations", type=positive_int, help="up to so many mutations, at --sites or anywhere")
    q.add_argument(
        "--candidates", type=Path, help="a CSV file of variants, column variant, mutant or sequence"
    )
    q.add_argument("--allowed", default="", help="residues by position: 39:ADE,40:FWY")
    q.add_argument("--forbidden", default="", help="positions that stay: 1,2,3")
    q.add_argument(
        "--objective", action="append", required=True, help="COLUMN[:max|:min|:>=X|:<=X]; may be repeated"
    )
    q.add_argument(
        "--batch", type=positive_int, default=96, help="wells a round, controls included (default: 96)"
    )
    q.add_argument("--plate", type=int, choices=(96, 384), default=96, help="wells of a plate (default: 96)")
    q.add_argument("--controls", type=int, default=4, help="wells for wild type and best so far (default: 4)")
    q.add_argument("--budget", type=int, default=0, help="wells in all (default: no limit)")
    q.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    q.add_argument(
        "--model", default="default", help="of the zero-shot score; none for no prior (default: default)"
    )
    q.add_argument("--homologs", default="auto", help="of the zero-shot score (default: auto)")

    q = add("propose", "choose the next round's variants", folder="?")
    q.add_argument("--spec", type=Path, metavar="FILE", help="of a job: campaign, output, more, after")
    q.add_argument("-o", "--output", type=Path, help="a copy of the plate as CSV; - is standard output")
    q.add_argument("--more", action="store_true", help="another round although the last has no results yet")
    q = add("ingest", "take in results: a CSV file with variant and the objectives; all rows or none")
    q.add_argument("results", type=Path)
    q.add_argument("--round", type=positive_int, help="default: the latest")
    q.add_argument("--correct", action="store_true", help="replace values of wells that were measured before")
    q = add(
        "mark", "mark wells as ordered, abandoned (never again) or excluded (a measurement that is left out)"
    )
    q.add_argument("event", choices=("ordered", "abandoned", "excluded"))
    q.add_argument(
        "which",
        nargs="*",
        metavar="WELL|VARIANT",
        help="a well as 2/B7 (round 2, well B7), or a variant, which is all its wells (default for ordered: all under way)",
    )
    add("status", "rounds, wells and the best so far, as JSON")
    q = add("report", "the campaign as one HTML file")
    q.add_argument("-o", "--output", type=Path, required=True)
    q.add_argument("--force", action="store_true", help="replace an existing file")

    q = add(
        "simulate",
        "replay campaigns on a measured table, beside random and greedy ridge; without control wells or plate effects",
        folder=False,
    )
    q.add_argument("landscape", type=Path, help="CSV with variant, mutant or sequence, and the objective")
    q.add_argument("--wild-type", type=Path, required=True, metavar="FASTA", help="its first record")
    q.add_argument("--objective", default="fitness", help="the column to raise (default: fitness)")
    q.add_argument("--rounds", type=positive_int, default=5)
    q.add_argument("--batch", type=positive_int, default=96)
    q.add_argument("--seeds", type=positive_int, default=5)
    q.add_argument(
        "--noise", type=float, default=0.0, help="in standard deviations of the table (default: 0)"
    )
    q.add_argument("--failed", type=float, default=0.0, help="share of wells that fail (default: 0)")
    q.add_argument("--no-prior", action="store_true", help="without the zero-shot score")
    q.add_argument("-o", "--output", type=Path, help="JSON file (default: standard output)")
    return p


def _positions(text: str, field: str) -> tuple[int, ...]:
    try:
        return tuple(int(x) for x in text.split(",") if x.strip())
    except ValueError:
        raise SpecError(f"{text!r} is not a list of positions; write 39,40,41.", field=field) from None


def _allowed(text: str) -> dict[str, str]:
    out = {}
    for piece in filter(None, text.split(",")):
        position, _, letters = piece.partition(":")
        if not position.strip().isdigit() or not letters.isalpha():
            raise SpecError(f"{piece!r}: write position:residues, as 39:ADE.", field="allowed")
        out[position.strip()] = letters.upper()
    return out


def _new(args: argparse.Namespace) -> None:
    from training.campaigns.landscape import zero_shot

    if args.candidates and (args.sites or args.mutations):
        raise SpecError("give --candidates, or --sites and --mutations, not both.", field="candidates")
    if not (args.candidates or args.sites or args.mutations):
        raise SpecError("give --sites, --mutations or --candidates.", field="sites")
    wild = letters_of(next(read_fasta(args.wild_type)).sequence)
    settings = Settings(
        wild_type=wild,
        objectives=tuple(str(Objective.read(o)) for o in args.objective),
        sites=_positions(args.sites or "", "sites"),
        mutations=args.mutations,
        allowed=_allowed(args.allowed),
        forbidden=_positions(args.forbidden, "forbidden"),
        batch=args.batch,
        plate=args.plate,
        controls=args.controls,
        budget=args.budget,
        seed=args.seed,
    )
    prior = None if args.model == "none" else zero_shot(wild, args.model, args.homologs)
    campaign = Campaign.create(args.folder, settings, prior=prior, file=args.candidates)
    print(f"{campaign.space.size} variants in the space of {args.folder}", file=sys.stderr)


def _simulate(args: argparse.Namespace) -> None:
    from bioseq.output import atomic_file
    from bioseq.progress import Progress
    from training.campaigns.landscape import read_landscape
    from training.campaigns.simulate import METHODS, Setting, curves, replay, summarise

    if not (0 <= args.failed < 1 and args.noise >= 0):
        raise SpecError(f"noise {args.noise}, failed {args.failed}; 0 or more, and below 1.", field="failed")
    eyes, pool, y = read_landscape(args.landscape, args.wild_type, args.objective, prior=not args.no_prior)
    setting = Setting(args.rounds, args.batch, args.noise, args.failed)
    if setting.rounds * setting.batch > len(y):
        raise SpecError(
            f"{setting.rounds} rounds of {setting.batch} of {len(y)} variants; give fewer.", field="rounds"
        )
    found: dict[str, list[Any]] = {m: [] for m in METHODS}
    with Progress(args.seeds * len(METHODS), "simulating", unit="runs") as bar:
        for seed in range(args.seeds):
            for name in METHODS:
                found[name].append(curves(replay(eyes, pool, y, setting, seed, name), y))
                bar.add()
    text = json.dumps({"variants": len(y), "seeds": args.seeds, **summarise(found)}, indent=1) + "\n"
    if args.output:
        with atomic_file(args.output) as path:
            path.write_text(text)
    else:
        print(text, end="")


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.verb in ("create", "new"):
        _new(args)
        return 0
    if args.verb == "simulate":
        _simulate(args)
        return 0
    spec = None
    if args.verb == "propose":
        if (args.folder is None) == (args.spec is None):
            raise SpecError("give the campaign's folder, or --spec FILE.", field="folder")
        spec = (
            ProposeSpec.load(args.spec)
            if args.spec
            else ProposeSpec(campaign=str(args.folder), more=args.more)
        )
    campaign = Campaign(args.folder if spec is None else spec.campaign)
    if spec is not None:
        from training.campaigns.propose import propose

        done = propose(campaign, more=spec.more, after=spec.after)
        plate = campaign.round_folder(done["round"]) / "plate.csv"
        print(f"round {done['round']}: {done['variants']} variants in {plate}", file=sys.stderr)
        if spec.output:
            Path(spec.output).mkdir(parents=True, exist_ok=True)
            for file in (plate, plate.with_name("proposal.json")):
                shutil.copyfile(file, Path(spec.output) / file.name)
        if str(args.output) == "-":
            print(campaign.plate(done["round"]), end="")
        elif args.output:
            shutil.copyfile(plate, args.output)
    elif args.verb == "ingest":
        done = ingest(campaign, args.results, round_=args.round, correct=args.correct)
        print(", ".join(f"{v} {k}" for k, v in done.items()), file=sys.stderr)
    elif args.verb == "mark":
        print(f"{campaign.mark(args.event, args.which)} wells {args.event}", file=sys.stderr)
    elif args.verb == "status":
        print(json.dumps(campaign.status(), indent=1))
    else:
        from training.campaigns.report import report

        report(campaign, args.output, force=args.force)
        print(f"report in {args.output}", file=sys.stderr)
    return 0

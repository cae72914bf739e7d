"""`bioseq scan`: all single substitutions of proteins, as a long table and a heat map."""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from bioseq.cli import new_parser
from bioseq.commands.records import open_engine
from bioseq.commands.score import add_scoring_options, homolog_options
from bioseq.errors import OutputError

if TYPE_CHECKING:
    from bioseq.inference.variants import Scored
    from bioseq.reports.page import Section
    from bioseq.sequences.fasta import Record

_EVIDENCE = ("homologs", "column_homologs", "model_weight")
MAX_PICTURES = 10
EXAMPLE = """bioseq scan gb1.fasta -o scan.csv
  bioseq scan gb1.fasta --strategy wt-marginals -o scan.csv --picture scan.svg"""


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "scan", "Scores of all single substitutions of proteins, with a heat map.", example=EXAMPLE
    )
    p.add_argument("fasta", help="FASTA file, plain or compressed; - is standard input")
    p.add_argument(
        "-o",
        "--output",
        required=True,
        help="CSV file: id, position, wild_type, mutant, score and the evidence; - is standard output",
    )
    group = p.add_mutually_exclusive_group()
    group.add_argument(
        "--picture",
        metavar="FILE",
        help=f"the heat map, .png, .svg or .pdf (default: beside the table); of several records the first "
        f"{MAX_PICTURES} are drawn, numbered by place",
    )
    group.add_argument("--no-picture", action="store_true", help="draw none")
    p.add_argument(
        "--report",
        metavar="FILE.html",
        help=f"one offline page with heat map, a line for each residue, and what stands behind the scores; of the first {MAX_PICTURES} "
        "records",
    )
    add_scoring_options(p)
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from bioseq.commands.heatmap import draw_scan, picture_format, scan_page, scan_sections
    from bioseq.output import atomic_file, check_free
    from bioseq.sequences.fasta import read_fasta

    records = read_fasta(args.fasta)
    ahead = list(itertools.islice(records, MAX_PICTURES + 1))
    pictures = _pictures(args, len(ahead))
    kind = picture_format(pictures[0]) if pictures else "png"
    kept = [] if args.output == "-" else [Path(args.output)]
    for path in [*pictures, *kept, *([Path(args.report)] if args.report else [])]:
        check_free(path, force=args.force)
    sections: list[Section] = []
    if pictures and args.output != "-" and Path(args.output) in pictures:
        raise OutputError(f"table and picture would both be {args.output}.", hint="Name another picture.")
    options = homolog_options(args)
    engine = open_engine(args)
    letters = _letters(engine)
    count = 0
    # All files get their final names together, after the last one is whole.
    with ExitStack() as stack:
        if args.output == "-":
            handle: IO[str] = sys.stdout
        else:
            table = stack.enter_context(atomic_file(args.output, force=args.force))
            handle = stack.enter_context(open(table, "w", encoding="utf-8", newline=""))
        out = csv.writer(handle, lineterminator="\n")
        for record in itertools.chain(ahead, records):
            scored = _scan(args, engine, record, options)
            sequence = record.sequence.upper().removesuffix("*")
            if count == 0:
                evidence = () if scored.homologs is None else _EVIDENCE
                out.writerow(["id", "position", "wild_type", "mutant", "score", *evidence])
            _write(out, record.id, sequence, scored, letters)
            if count < len(pictures):
                temporary = stack.enter_context(atomic_file(pictures[count], force=args.force))
                title = f"{record.id or f'record {count + 1}'} · {_name(args, engine)} · {args.strategy}"
                depth = None if scored.homologs is None else scored.homologs.depth
                draw_scan(
                    temporary, scored.values, sequence, letters=letters, title=title, kind=kind, depth=depth
                )
            if args.report and count < MAX_PICTURES:
                sections += scan_sections(record.id or f"record {count + 1}", sequence, scored, letters)
            count += 1
        if args.report:
            path = stack.enter_context(atomic_file(args.report, force=args.force))
            path.write_text(scan_page(_name(args, engine), args.strategy, sections), "utf-8")
    if args.output != "-":
        print(f"substitutions of {count} protein{'s' * (count > 1)} in {args.output}", file=sys.stderr)
    for path in pictures:
        print(f"picture in {path}", file=sys.stderr)
    if args.report:
        print(f"report in {args.report}", file=sys.stderr)
    if pictures and count > len(pictures):
        print(f"only the first {len(pictures)} of {count} are drawn", file=sys.stderr)
    return 0


def _pictures(args: argparse.Namespace, count: int) -> list[Path]:
    from bioseq.commands.heatmap import pictures

    if args.no_picture or (args.output == "-" and not args.picture):
        return []
    return pictures(args.picture or str(Path(args.output).with_suffix(".png")), count, MAX_PICTURES)


def _letters(engine: Any) -> str:
    from bioseq.sequences.alphabet import protein

    return getattr(engine, "alphabet", protein()).standard


def _name(args: argparse.Namespace, engine: Any) -> str:
    return str(getattr(engine, "name", args.model))


def _scan(args: argparse.Namespace, engine: Any, record: Record, options: dict[str, Any]) -> Scored:
    from bioseq.inference.scoring import scan_sites
    from bioseq.inference.variants import Scored

    if args.server:
        values = engine.scan(record, strategy=args.strategy, long_sequences=args.long_sequences, **options)
        return Scored(np.asarray(values, dtype=np.float32))

    scored = scan_sites(
        engine,
        record,
        strategy=args.strategy,
        long_sequences=args.long_sequences,
        progress=len(record.sequence) > 50 and args.strategy != "wt-marginals",
        **options,
    )
    for note in scored.notes:
        print(f"{record.source}: {record.id}: {note}", file=sys.stderr)
    return scored


def _write(out: Any, name: str, sequence: str, scored: Scored, letters: str) -> None:
    told = scored.homologs
    weight = np.empty(0) if told is None or told.weight is None else told.weight
    for at, old in enumerate(sequence):
        evidence = () if told is None else (told.number, f"{told.depth[at]:.6g}", f"{weight[at]:.6g}")
        for column, new in enumerate(letters):
            if new != old:
                out.writerow([name, at + 1, old, new, f"{scored.values[at, column]:.6g}", *evidence])

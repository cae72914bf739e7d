"""`bioseq attribute`: how much each residue of a protein adds to what a head says of it."""

from __future__ import annotations

import argparse
import csv
import sys
from contextlib import ExitStack
from pathlib import Path

from bioseq.cli import add_engine_options, new_parser
from bioseq.commands.records import load_here

MAX_PICTURES = 10
COLUMNS = ("id", "position", "residue", "attribution")
EXAMPLE = """bioseq attribute toxin.fasta --head localization --label extracellular -o toxin.csv --picture toxin.png"""


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "attribute",
        "How much each residue adds to what a head says: each is masked in turn, one pass of the model a residue.",
        example=EXAMPLE,
    )
    p.add_argument("fasta", nargs="+", help="FASTA files, plain or compressed; - is standard input")
    p.add_argument("--head", required=True, help="registry name, NAME@V, or bundle folder")
    p.add_argument(
        "--label",
        help="a class of the head, or a target (default: the most probable class, the first target)",
    )
    p.add_argument("-o", "--output", required=True, help="CSV file: " + ", ".join(COLUMNS))
    p.add_argument(
        "--picture", metavar="FILE", help=f"tracks as .png, .svg or .pdf, of the first {MAX_PICTURES} records"
    )
    p.add_argument("--force", action="store_true", help="replace an existing output")
    add_engine_options(p)
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from bioseq.commands.heatmap import draw_track, picture_format, pictures
    from bioseq.output import atomic_file, check_free
    from bioseq.sequences.fasta import read_many

    kind = picture_format(args.picture) if args.picture else "png"
    records = list(read_many(args.fasta))
    drawn = pictures(args.picture, len(records), MAX_PICTURES)
    for path in (Path(args.output), *drawn):
        check_free(path, force=args.force)
    model = load_here(args)
    with ExitStack() as stack:
        table = stack.enter_context(atomic_file(args.output, force=args.force))
        handle = stack.enter_context(open(table, "w", encoding="utf-8", newline=""))
        out = csv.writer(handle, lineterminator="\n")
        out.writerow(COLUMNS)
        for place, record in enumerate(records):
            found = model.attribute(record, args.head, label=args.label, progress=True)
            sequence = record.sequence.upper().removesuffix("*")
            rows = enumerate(zip(sequence, found.values.tolist()), start=1)
            out.writerows((record.id, at, letter, f"{value:.5g}") for at, (letter, value) in rows)
            print(f"{record.id}: {found.label} {found.answer:.3g} ({found.unit})", file=sys.stderr)
            if place < len(drawn):
                temporary = stack.enter_context(atomic_file(drawn[place], force=args.force))
                title = f"{record.id} · {args.head}: {found.label}"
                draw_track(
                    temporary,
                    found.values,
                    sequence,
                    title=title,
                    label=f"attribution, {found.unit}",
                    kind=kind,
                )
    print(
        f"attributions of {len(records)} protein{'s' * (len(records) != 1)} in {args.output}", file=sys.stderr
    )
    for path in drawn:
        print(f"picture in {path}", file=sys.stderr)
    return 0

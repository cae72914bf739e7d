"""`bioseq contacts`: which residues of proteins touch, by a backbone with a contact head."""

from __future__ import annotations

import argparse
import csv
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bioseq.cli import add_engine_options, new_parser, positive_int
from bioseq.commands.records import load_here
from bioseq.errors import OutputError

MAX_PICTURES = 10
COLUMNS = ("id", "i", "j", "wild_i", "wild_j", "probability")
EXAMPLE = """bioseq contacts gb1.fasta --model esm2-35m -o contacts.csv --picture contacts.png
  bioseq contacts proteins.fasta --model esm2-35m -o contacts.npz"""


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "contacts",
        "Which residues of proteins touch, by a backbone with a contact head (ESM-2).",
        example=EXAMPLE,
    )
    p.add_argument("fasta", nargs="+", help="FASTA files, plain or compressed; - is standard input")
    p.add_argument(
        "-o",
        "--output",
        required=True,
        help="FILE.csv: pairs of residues, most probable first; FILE.npz: the whole matrix of each record, named by its place",
    )
    p.add_argument(
        "--picture", metavar="FILE", help=f"maps as .png, .svg or .pdf, of the first {MAX_PICTURES} records"
    )
    p.add_argument(
        "--separation",
        type=positive_int,
        default=6,
        metavar="N",
        help="in the table: at least so many residues apart (default: 6)",
    )
    p.add_argument(
        "--least",
        type=float,
        default=0.1,
        metavar="P",
        help="in the table: probabilities from P on (default: 0.1)",
    )
    p.add_argument("--force", action="store_true", help="replace an existing output")
    add_engine_options(p)
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from bioseq.commands.heatmap import draw_contacts, picture_format, pictures
    from bioseq.output import atomic_file, check_free
    from bioseq.sequences.fasta import read_many

    kind = Path(args.output).suffix
    if kind not in (".csv", ".npz"):
        raise OutputError(
            f"{args.output}: contacts are written as .csv or .npz.", hint="Name such a file with -o."
        )
    shape = picture_format(args.picture) if args.picture else "png"
    records = list(read_many(args.fasta))
    drawn = pictures(args.picture, len(records), MAX_PICTURES)
    for path in (Path(args.output), *drawn):
        check_free(path, force=args.force)
    model = load_here(args)
    found = model.contacts(records, progress=True)
    with ExitStack() as stack:
        table = stack.enter_context(atomic_file(args.output, force=args.force))
        if kind == ".npz":
            with open(table, "wb") as file:
                np.savez_compressed(file, **{str(i): one for i, one in enumerate(found, start=1)})  # type: ignore[arg-type]
        else:
            with open(table, "w", encoding="utf-8", newline="") as handle:
                out = csv.writer(handle, lineterminator="\n")
                out.writerow(COLUMNS)
                for record, one in zip(records, found):
                    out.writerows(_rows(record.id, record.sequence.upper(), one, args))
        for path, record, one in zip(drawn, records, found):
            temporary = stack.enter_context(atomic_file(path, force=args.force))
            draw_contacts(temporary, one, title=f"{record.id} · {model.name}", kind=shape)
    print(f"contacts of {len(found)} protein{'s' * (len(found) != 1)} in {args.output}", file=sys.stderr)
    for path in drawn:
        print(f"picture in {path}", file=sys.stderr)
    return 0


def _rows(
    name: str, sequence: str, contacts: np.ndarray, args: argparse.Namespace
) -> list[tuple[object, ...]]:
    i, j = np.triu_indices(len(contacts), args.separation)
    p = contacts[i, j]
    order = np.argsort(-p, kind="stable")
    order = order[p[order] >= args.least]
    return [(name, i[n] + 1, j[n] + 1, sequence[i[n]], sequence[j[n]], f"{p[n]:.4f}") for n in order]

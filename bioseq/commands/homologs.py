"""`bioseq homologs`: reference sets, searches in them, and alignments of what was found."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bioseq.cli import new_parser, positive_int
from bioseq.commands import mixture

if TYPE_CHECKING:
    from bioseq.homologs.hits import Hits
    from bioseq.sequences.fasta import Record

EXAMPLE = """bioseq homologs search proteins.fasta -o hits.tsv
  bioseq homologs align proteins.fasta -o alignments/
  bioseq homologs build uniref50.fasta.gz -o uniref50/
  bioseq homologs search proteins.fasta --homologs uniref50/ -o hits.tsv"""

_EXAMPLES = {
    "build": "bioseq homologs build inhouse.fasta -o inhouse/ --licence proprietary",
    "search": "bioseq homologs search proteins.fasta -o hits.tsv",
    "align": "bioseq homologs align proteins.fasta -o alignments/",
    "fit-mixture": "bioseq homologs fit-mixture esm2-8m --register esm2-8m",
}
COLUMNS = ("query", "hit", "identity", "coverage", "bits", "e_value")
BATCH = 2000  # records that are searched together


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "homologs", "Reference sets of proteins, and searches for relatives in them.", example=EXAMPLE
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    build = add("build", "make a reference set from FASTA files")
    build.add_argument("fasta", nargs="+", help="FASTA files, plain or compressed")
    build.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the folder to make")
    build.add_argument("--name", default="", help="its name (default: the folder's)")
    for option, text in (
        ("--licence", "licence of the sequences"),
        ("--source", "where the sequences come from"),
        ("--citation", "what to cite"),
    ):
        build.add_argument(option, default="", help=text)
    build.add_argument("--force", action="store_true", help="replace an existing folder")

    search = add("search", "find the relatives of proteins; one line a hit")
    search.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="TSV file; - is standard output"
    )
    align = add("align", "write an alignment (a3m) of each protein and its relatives")
    align.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the folder to make")
    for sub in (search, align):
        sub.add_argument("fasta", help="FASTA file, plain or compressed; - is standard input")
        sub.add_argument(
            "--homologs", default="default", metavar="REF", help="'default' or the folder of a reference set"
        )
        sub.add_argument("--sensitivity", type=float, default=7.5, help="1 (fast) to 7.5 (default: 7.5)")
        sub.add_argument(
            "--iterations", type=positive_int, default=2, help="rounds of search, 1 to 3 (default: 2)"
        )
        sub.add_argument(
            "--e-value", type=float, default=1e-2, help="largest E-value that is kept (default: 0.01)"
        )
        sub.add_argument(
            "--max-hits", type=positive_int, default=300, help="most hits of a protein (default: 300)"
        )
        sub.add_argument("--threads", type=positive_int, default=None, help="CPU threads (default: all)")
        sub.add_argument("--force", action="store_true", help="replace an existing output")
    mixture.add_options(add("fit-mixture", "fit how far a backbone is trusted beside homologs"))
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    runs = {"build": _build, "search": _search, "align": _align, "fit-mixture": mixture.run}
    return runs[args.command](args)


def _build(args: argparse.Namespace) -> int:
    from bioseq.errors import ReferenceSetError
    from bioseq.homologs.reference import build_reference
    from bioseq.output import check_free
    from bioseq.progress import Progress
    from bioseq.sequences.fasta import count_records, read_many

    check_free(Path(args.output), force=args.force)
    total = sum(count_records(path) for path in args.fasta)
    with Progress(total, "building", unit="sequences") as bar:

        def counted() -> Iterator[Record]:
            nucleotides = count = 0
            for record in read_many(args.fasta):
                count += 1
                nucleotides += not record.sequence.upper().strip("ACGTUN")
                yield record
                bar.add(1)
            if 2 * nucleotides > count:
                raise ReferenceSetError(
                    f"{nucleotides} of the {count} sequences have no letters but those of nucleotides (A, C, G, T, U, N); "
                    "a reference set holds proteins.",
                    code="homologs.other_alphabet",
                    hint="Translate the sequences first.",
                )

        made = build_reference(
            counted(),
            args.output,
            name=args.name,
            licence=args.licence,
            source=args.source,
            citation=args.citation,
            force=args.force,
        )
    note = f"; {made.manifest.left_out} over the longest length left out" if made.manifest.left_out else ""
    print(
        f"{args.output}: {len(made)} sequences{note}. Use it with: --homologs {args.output}", file=sys.stderr
    )
    return 0


def _found(args: argparse.Namespace) -> Iterator[tuple[Sequence[Record], list[Hits]]]:
    from bioseq.homologs.reference import open_reference
    from bioseq.homologs.search import search
    from bioseq.homologs.settings import SearchSettings
    from bioseq.sequences.fasta import read_fasta

    settings = SearchSettings(
        sensitivity=args.sensitivity,
        iterations=args.iterations,
        e_value=args.e_value,
        max_hits=args.max_hits,
    )
    reference = open_reference(args.homologs)
    batch: list[Any] = []
    done = 0
    for record in read_fasta(args.fasta):
        batch.append(record)
        if len(batch) == BATCH:
            yield batch, search(batch, reference, settings, threads=args.threads)
            done += len(batch)
            print(f"{done} proteins searched", file=sys.stderr, flush=True)
            batch = []
    if batch:
        yield batch, search(batch, reference, settings, threads=args.threads)


def _search(args: argparse.Namespace) -> int:
    from bioseq.output import atomic_file, check_free, whole_stdout

    to_stdout = args.output == "-"
    if not to_stdout:
        check_free(Path(args.output), force=args.force)
    count = hits = 0
    with whole_stdout() if to_stdout else atomic_file(args.output, force=args.force) as path:
        with open(path, "w", encoding="utf-8", newline="") as handle:
            out = csv.writer(handle, delimiter="\t", lineterminator="\n")
            out.writerow(COLUMNS)
            for records, found in _found(args):
                for record, one in zip(records, found, strict=True):
                    count += 1
                    hits += len(one)
                    for n, name in enumerate(one.ids):
                        out.writerow(
                            [record.id, name, f"{one.identity[n]:.4f}", f"{one.coverage[n]:.4f}"]
                            + [f"{one.bits[n]:g}", f"{one.e_values[n]:.3g}"]
                        )
    print(f"{hits} homologs of {count} proteins", file=sys.stderr)
    return 0


def _align(args: argparse.Namespace) -> int:
    from bioseq.homologs.alignment import write_a3m
    from bioseq.output import atomic_folder, check_free

    check_free(Path(args.output), force=args.force)
    count = 0
    with atomic_folder(args.output, force=args.force) as folder:
        with open(folder / "index.tsv", "w", encoding="utf-8", newline="") as handle:
            index = csv.writer(handle, delimiter="\t", lineterminator="\n")
            index.writerow(["file", "query", "homologs"])
            for records, found in _found(args):
                for record, one in zip(records, found, strict=True):
                    count += 1
                    name = f"{count:06d}.a3m"  # an id never becomes a path
                    write_a3m(one, folder / name, query_id=record.id)
                    index.writerow([name, record.id, len(one)])
    print(f"{count} alignments in {args.output}; index.tsv says whose", file=sys.stderr)
    return 0

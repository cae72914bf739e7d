"""`bioseq score`: variants in, one score each out."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.cli import add_engine_options, add_server_options, new_parser
from bioseq.commands.records import open_engine
from bioseq.compression import DAMAGED, unpack
from bioseq.errors import FastaError, InputError, MutationError, SpecError, TableError
from bioseq.sequences.fasta import Record

if TYPE_CHECKING:
    from bioseq.inference.evidence import Homologs
    from bioseq.sequences.mutations import Variant

STRATEGIES = ("masked-marginals", "wt-marginals", "pseudo-log-likelihood")
EXAMPLE = """bioseq score --wild-type gb1.fasta D40Y V39I:D40S -o -
  bioseq score --wild-type gb1.fasta mutants.txt -o scores.csv
  bioseq score --wild-type gb1.fasta assay.csv --column mutant --measured fitness -o scores.csv"""


def add_homolog_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("homologs").add_mutually_exclusive_group()
    group.add_argument(
        "--homologs",
        default="auto",
        metavar="REF",
        help="where homologs are searched: auto (the shipped reference set), none, default, or a folder made by "
        "`bioseq homologs build`",
    )
    group.add_argument(
        "--alignment",
        metavar="FILE",
        help="the homologs as an a3m, a2m or Stockholm file, instead of a search",
    )


def homolog_options(args: argparse.Namespace) -> dict[str, Any]:
    """--homologs and --alignment as the Python API and the client take them."""
    return {"homologs": args.homologs} if args.alignment is None else {"alignment": args.alignment}


def add_scoring_options(p: argparse.ArgumentParser) -> None:
    """What score and scan share."""
    p.add_argument("--strategy", choices=STRATEGIES, default=STRATEGIES[0], help=f"default: {STRATEGIES[0]}")
    p.add_argument(
        "--long-sequences",
        choices=("error", "window"),
        default="error",
        help="over the model's limit: refuse, or score in the window around the mutated positions",
    )
    add_homolog_options(p)
    p.add_argument("--force", action="store_true", help="replace an existing output")
    add_engine_options(p)
    add_server_options(p)


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "score",
        "How likely variants of a protein are, against the wild type: 0 as likely, below 0 less.",
        example=EXAMPLE,
    )
    p.add_argument(
        "mutants",
        nargs="+",
        help="A24G or A24G:L50P (one-based), WT, or a file: one variant a line (- is standard input), or a "
        ".csv or .tsv table",
    )
    p.add_argument(
        "--wild-type",
        required=True,
        metavar="FASTA|SEQUENCE",
        help="a FASTA file of one record, or its residues",
    )
    p.add_argument(
        "-o", "--output", required=True, help="CSV file: mutant, score and the evidence; - is standard output"
    )
    p.add_argument(
        "--column",
        help="the table's column of variants; default: 'mutant', else whole sequences in 'sequence'",
    )
    p.add_argument("--measured", metavar="COLUMN", help="measured values in the table: reports Spearman")
    add_scoring_options(p)
    return p


@dataclass(slots=True)
class Asked:
    """Variants in input order, and what was measured (NaN where nothing was)."""

    variants: list[Variant] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from bioseq.output import atomic_file, check_free

    if args.output != "-":
        check_free(Path(args.output), force=args.force)
    wild_type = read_wild_type(args.wild_type)
    asked = _read_mutants(args, wild_type.sequence)
    names = [str(v) for v in asked.variants]
    values, evidence = _score(args, wild_type, asked.variants)
    target: Any = nullcontext(None) if args.output == "-" else atomic_file(args.output, force=args.force)
    with target as temporary:
        handle = sys.stdout if temporary is None else open(temporary, "w", encoding="utf-8", newline="")  # noqa: SIM115
        try:
            out = csv.writer(handle, lineterminator="\n")
            head = ["homologs", "effective_homologs", "model_weight"] if evidence else []
            out.writerow(["mutant", "score", *head, *([args.measured] if args.measured else [])])
            for i, (name, value) in enumerate(zip(names, values, strict=True)):
                stood = _evidence(evidence, asked.variants[i]) if evidence else []
                seen = [_number(asked.measured[i])] if args.measured else []
                out.writerow([name, _number(value), *stood, *seen])
        finally:
            if temporary is not None:
                handle.close()
    if args.output != "-":
        print(f"{len(names)} scores in {args.output}", file=sys.stderr)
    if args.measured:
        print(_correlation(np.array(asked.measured), np.array(values), args.measured), file=sys.stderr)
    return 0


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def _correlation(measured: np.ndarray, values: np.ndarray, column: str) -> str:
    from bioseq.ranking import spearman

    there = ~np.isnan(measured)
    count = int(there.sum())
    rho = spearman(measured[there], values[there]) if count > 1 else float("nan")
    said = (
        f"{rho:.4f}"
        if np.isfinite(rho)
        else "not defined (it needs two or more different values on both sides)"
    )
    left = len(measured) - count
    return f"Spearman of score and {column}: {said}, {count} variants" + (
        f"; {left} without a measurement left out" if left else ""
    )


def _evidence(homologs: Homologs, variant: Variant) -> list[str]:
    """Number, effective number, and the model's mean weight at the variant's positions (at all, for WT)."""
    assert homologs.weight is not None
    places = [m.position - 1 for m in variant.changes] or slice(None)
    return [
        str(homologs.number),
        _number(homologs.effective),
        _number(float(homologs.weight[places].mean())),
    ]


def _score(
    args: argparse.Namespace, wild_type: Record, variants: list[Variant]
) -> tuple[Sequence[float], Homologs | None]:
    options = homolog_options(args)
    engine = open_engine(args)
    if args.server:
        names = [str(v) for v in variants]
        scores = engine.score(
            wild_type, names, strategy=args.strategy, long_sequences=args.long_sequences, **options
        )
        return scores, None
    from bioseq.inference.scoring import score_variants

    scored = score_variants(
        engine,
        wild_type,
        variants,
        strategy=args.strategy,
        long_sequences=args.long_sequences,
        progress=len(variants) > 50,
        **options,
    )
    for note in scored.notes:
        print(f"{wild_type.id or 'wild type'}: {note}", file=sys.stderr)
    return scored.values.tolist(), scored.homologs


# ------------------------------------------------------------------------------------------------- reading


def read_wild_type(given: str) -> Record:
    """A FASTA file's only record, or the residues themselves. Raises `FastaError`."""
    from bioseq.sequences.fasta import read_fasta

    if given.rstrip("*").isalpha() and not Path(given).exists():
        return Record("", given)
    records = read_fasta(given)
    wild_type = next(records)
    if next(records, None) is not None:
        raise FastaError(
            "the wild type is one record, and this file has more.",
            file=given,
            hint="Give a file of one record.",
        )
    return wild_type


def _read_mutants(args: argparse.Namespace, wild_type: str) -> Asked:
    from bioseq.sequences.mutations import parse

    asked = Asked()
    for given in args.mutants:
        path = Path(given)
        if given != "-" and path.suffix.lower() != ".gz" and _is_literal(given):
            asked.variants.append(parse(given, wild_type))
            asked.measured.append(float("nan"))
        elif given != "-" and {".csv", ".tsv"} & {s.lower() for s in path.suffixes[-2:]}:
            _read_table(path, args, wild_type, asked)
        else:
            if args.measured or args.column:
                raise SpecError(
                    f"{given} is not a .csv or .tsv table.", field="measured" if args.measured else "column"
                )
            _read_lines(given, wild_type, asked)
    if not asked.variants:
        raise InputError(
            "there is no variant to score.", hint="Give A24G, or a file with one variant a line."
        )
    return asked


def _is_literal(given: str) -> bool:
    """Notation rather than a file's name: whatever exists as a file is a file."""
    return not Path(given).exists() and "/" not in given and "." not in given


def _text(given: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if given == "-" else Path(given).read_bytes()
        return unpack(raw).decode("utf-8-sig")
    except IsADirectoryError:
        raise TableError(f"{given} is a folder.", hint="Give a file of variants.") from None
    except DAMAGED as error:
        raise TableError(f"{given}: the compressed file breaks off or is damaged ({error}).") from error
    except OSError as error:
        raise TableError(f"{given} cannot be read: {error.strerror}.", hint="Check the path.") from error
    except UnicodeDecodeError:
        raise TableError(f"{given}: bytes that are not UTF-8 text.", hint="Give a text file.") from None


def _read_lines(given: str, wild_type: str, asked: Asked) -> None:
    from bioseq.sequences.mutations import parse

    name = "stdin" if given == "-" else given
    for number, line in enumerate(_text(given).splitlines(), 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        try:
            asked.variants.append(parse(text, wild_type))
        except MutationError as error:
            raise MutationError(f"{name}:{number}: {error.message}", hint=error.hint) from None
        asked.measured.append(float("nan"))


def _read_table(path: Path, args: argparse.Namespace, wild_type: str, asked: Asked) -> None:
    from bioseq.sequences.mutations import between, parse

    tabs = ".tsv" in (s.lower() for s in path.suffixes[-2:])
    reader = csv.DictReader(io.StringIO(_text(str(path)), newline=""), delimiter="\t" if tabs else ",")
    columns = list(reader.fieldnames or [])
    column = args.column or next((c for c in ("mutant", "sequence") if c in columns), None)
    for wanted in (column, args.measured):
        if (wanted is None and column is None) or (wanted is not None and wanted not in columns):
            raise TableError(
                f"{path}: there is no column {wanted or 'mutant'!r}.",
                hint=f"It has: {', '.join(columns) or 'none'}. Name one with --column or --measured.",
            )
    assert column is not None
    read = between if column == "sequence" else None
    bad: list[int] = []
    for number, row in enumerate(reader, 1):
        cell = (row[column] or "").strip()
        try:
            asked.variants.append(read(wild_type, cell) if read else parse(cell, wild_type))
        except MutationError as error:
            raise MutationError(f"{path}: row {number}: {error.message}", hint=error.hint) from None
        value = (row[args.measured] or "").strip() if args.measured else ""
        try:
            asked.measured.append(float(value) if value else float("nan"))
        except ValueError:
            bad.append(number)
    if bad:
        raise TableError(f"{path}: column {args.measured!r} has values that are not numbers", rows=bad)

"""`bioseq screen` and `bioseq report`: from words to a `ScreenSpec` and back to a message."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

from bioseq.cli import new_parser, positive_int
from bioseq.specs.screen import ScreenSpec

SHIPPED_LIBRARY = "sample"


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "screen",
        "Rank a FASTA library of any size. Every record is computed once, whatever is killed on the way: give the\n"
        "same command again and the run goes on. `sample` is the library that bioseq ships.",
        example="bioseq screen library.fasta.gz --heads localization --where 'nucleus > 0.5 and ood_percentile < 0.95' "
        "--top 100 -o run/",
    )
    add = parser.add_argument
    add("library", nargs="*", metavar="LIB", help="FASTA files, plain or compressed, or URLs (s3://, gs://)")
    add("-o", "--output", metavar="DIR", help="the run folder: new, or one to resume")
    add("--heads", metavar="A,B", help="what to predict: names, NAME@V, or bundle folders")
    add("--model", metavar="NAME", help="backbone: a registry name, NAME@V, or a folder (default: default)")
    add("--spec", metavar="FILE", help="a screening spec, .json or .toml; options given beside it win")

    pick = parser.add_argument_group("hits")
    pick.add_argument("--where", metavar="EXPR", help="keep records for which this is true")
    pick.add_argument("--rank", metavar="EXPR", help="rank by this, descending (default: by the heads)")
    pick.add_argument("--top", type=positive_int, metavar="K", help="at most so many hits")
    pick.add_argument(
        "--diverse", type=positive_int, metavar="N", help="at most so many hits a neighbourhood"
    )
    pick.add_argument(
        "--diverse-threshold", type=float, metavar="C", help="cosine that makes neighbours (default: 0.9)"
    )
    pick.add_argument(
        "--pareto",
        nargs="?",
        const="*",
        metavar="X,Y",
        help="only the front of these, all maximised (default: all heads)",
    )

    how = parser.add_argument_group("reading")
    how.add_argument("--long-sequences", choices=("window", "truncate", "error"), help="default: window")
    how.add_argument(
        "--max-length", type=positive_int, metavar="L", help="longer records are quarantined (100000)"
    )
    how.add_argument(
        "--translate", choices=("one", "six"), help="the library is DNA: translate frame 1, or all six"
    )
    how.add_argument(
        "--genetic-code", type=positive_int, metavar="T", help="NCBI translation table (default: 1)"
    )
    how.add_argument("--keep-embeddings", action="store_true", default=None, help="write embeddings/ too")
    how.add_argument(
        "--strict", action="store_true", default=None, help="exit with 1 if a record was quarantined"
    )

    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--workers", type=positive_int, metavar="N", help="engines side by side (default: what fits)"
    )
    engine.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads of each engine (default: 1)"
    )
    engine.add_argument(
        "--homologs",
        metavar="REF",
        help="for a backbone that reads homologs: auto (the set that it was trained with), none, default, or a folder",
    )
    engine.add_argument(
        "--vectors", metavar="STORE", help="read embeddings from this vector store, and add what is new to it"
    )
    engine.add_argument(
        "--dtype", choices=("float32", "bfloat16", "int8"), help="arithmetic (default: float32)"
    )
    engine.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto")
    engine.add_argument("--batch-tokens", type=positive_int, metavar="T", help="tokens of one forward pass")
    engine.add_argument("--address", metavar="ADDR", help="a running Ray cluster; else Ray starts here")
    add("--dry-run", action="store_true", help="say records, tokens, time, memory and disk, and stop")
    add("--quiet", action="store_true", help="no progress")
    return parser


def _split(text: str) -> tuple[str, ...]:
    """At commas outside of parentheses and backticks."""
    parts, depth, quoted, held = [], 0, False, ""
    for letter in text:
        quoted ^= letter == "`"
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0 and not quoted:
            parts.append(held.strip())
            held = ""
        else:
            held += letter
    return tuple(p for p in (*parts, held.strip()) if p)


def shipped_library() -> str:
    import bioseq

    return str(Path(bioseq.__file__).parent / "sample" / "library.fasta")


def spec_from(args: argparse.Namespace, parser: argparse.ArgumentParser) -> ScreenSpec:
    """The spec of a command line. Raises `SpecError`."""
    given: dict[str, Any] = {
        f.name: value
        for f in dataclasses.fields(ScreenSpec)
        if (value := getattr(args, f.name, None)) is not None
    }
    if args.library:
        given["inputs"] = tuple(
            shipped_library() if name == SHIPPED_LIBRARY and not Path(name).exists() else name
            for name in args.library
        )
    for name in ("heads", "pareto"):
        if name in given:
            given[name] = _split(given[name])
    base = ScreenSpec.load(args.spec).to_dict() if args.spec else {}
    for name, flag in (("inputs", "LIB"), ("heads", "--heads"), ("output", "-o")):
        if name not in base and name not in given:
            if name == "output" and args.dry_run:
                given["output"] = "run"
                continue
            parser.error(f"{flag} is missing")
    return ScreenSpec.from_dict({**base, **given})


def main_screen(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    spec = spec_from(args, parser)
    if args.dry_run:
        from serving.screening.estimate import estimate, told

        print(told(estimate(spec)))
        return 0
    from serving.screening.run import screen

    outcome = screen(spec, progress=not args.quiet)
    summary = outcome.summary
    if not outcome.fresh:
        print(f"{outcome.path} is complete already; nothing was computed.", file=sys.stderr)
    print(
        f"{summary['records']} records, {summary['distinct']} distinct; {summary['counts']['hits']} hits in "
        f"{outcome.path / 'hits.csv'}; report: {outcome.path / 'report.html'}",
        file=sys.stderr,
    )
    if not args.quiet:
        print(_top(outcome.path / "hits.csv"), end="", file=sys.stderr)
    if summary["quarantined"]:
        reasons = ", ".join(f"{n} {code}" for code, n in summary["reasons"].items())
        print(f"{summary['quarantined']} records were quarantined ({reasons}).", file=sys.stderr)
        return 1 if spec.strict else 0
    return 0


def _top(path: Path, count: int = 5) -> str:
    """The first hits: rank, id, score and each head's value."""
    import csv

    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", newline="") as handle:
        rows = list(itertools.islice(csv.DictReader(handle), count))
    if not rows:
        return ""
    names = ["rank", "id", "score", *(n for n in rows[0] if n.endswith(".value"))]
    cells = [names, *([_short(row[n]) for n in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() + "\n" for line in cells)


def _short(text: str) -> str:
    try:
        return text if text.isdigit() else f"{float(text):.4g}"
    except ValueError:
        return text if len(text) <= 40 else text[:37] + "..."


def main_report(argv: list[str]) -> int:
    parser = new_parser(
        "report", "Build report.html of a finished screening run again.", example="bioseq report run/"
    )
    parser.add_argument("run", metavar="DIR", help="a run folder of `bioseq screen`")
    args = parser.parse_args(argv)
    from serving.screening.tables.report import write_report

    print(write_report(args.run), file=sys.stderr)
    return 0

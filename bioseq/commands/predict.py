"""`bioseq predict`: what the named heads say of the proteins in FASTA files, to CSV, JSON lines or Parquet."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bioseq.cli import add_engine_options, add_server_options, new_parser, positive_int
from bioseq.commands.records import add_alignment_option, add_reading_option, compute_chunks
from bioseq.errors import InputError, OutputError, SpecError

CHUNK = 1024  # records read, computed and written at a time
EXAMPLE = """bioseq predict proteins.fasta --heads localization,target_class -o predictions.csv
  bioseq predict proteins.fasta --heads activity/ --nearest 3 -o predictions.jsonl
  bioseq predict genes.fasta --translate one --heads localization -o predictions.csv"""
COLUMNS = ("id", "head", "version", "task", "value", "low", "high", "ood", "ood_percentile", "probabilities")
PLACE = ("strand", "first_base", "last_base", "residues")  # of a translated protein, in its DNA
EVIDENCE = ("nearest", "homologs")  # of the training rows


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "predict",
        "Properties of the proteins in FASTA files, by the heads you name, in input order.",
        example=EXAMPLE,
    )
    p.add_argument("fasta", nargs="+", help="FASTA files, plain or compressed; - is standard input")
    p.add_argument("--heads", required=True, metavar="A,B", help="registry names, NAME@V, or bundle folders")
    p.add_argument("-o", "--output", required=True, help="FILE.csv, .jsonl or .parquet; - is CSV on stdout")
    p.add_argument("--format", choices=("csv", "jsonl", "parquet"), help="default: by the output's name")
    p.add_argument(
        "--nearest",
        type=positive_int,
        default=0,
        metavar="K",
        help="the K training examples nearest by embedding, in place of the best homolog",
    )
    p.add_argument(
        "--long-sequences",
        choices=("error", "window", "truncate"),
        default="error",
        help="what to do with sequences over the model's limit (default: error)",
    )
    p.add_argument(
        "--translate",
        choices=("one", "six"),
        help="the records are DNA or RNA: predict the protein of frame 1, or each frame's longest one between stops, and "
        "say which bases code for it",
    )
    p.add_argument(
        "--genetic-code",
        type=positive_int,
        default=1,
        metavar="T",
        help="NCBI translation table (default: 1)",
    )
    p.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="one bad record ends the run with nothing written (fail, default), or is reported and left out",
    )
    p.add_argument("--force", action="store_true", help="replace an existing output")
    add_reading_option(p)
    add_alignment_option(p, "a backbone that reads homologs and heads that read profiles")
    add_engine_options(p)
    add_server_options(p)
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    args.heads = [h for h in args.heads.split(",") if h]
    if not args.heads:
        raise SpecError("at least one head is needed.", field="heads", hint="Give them as --heads A,B.")
    ending = Path(args.output).suffix if args.output != "-" else ".csv"
    kind = args.format or {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}.get(ending)
    if kind is None:
        raise OutputError(
            f"{args.output}: the format does not follow from the ending.",
            hint="Use .csv, .jsonl or .parquet, or pass --format.",
        )
    if args.translate:
        from bioseq.sequences.translation import check_code

        check_code(args.genetic_code)
    from bioseq.output import atomic_file, whole_stdout

    if args.output == "-":
        if kind == "parquet":
            raise OutputError("Parquet cannot be written to standard output.", hint="Give a file with -o.")
        with whole_stdout() as path:
            _write(args, kind, path)
        return 0
    with atomic_file(args.output, force=args.force) as temporary:
        count, skipped = _write(args, kind, temporary)
    note = f"; {skipped} records left out" if skipped else ""
    print(f"predictions of {count} proteins in {args.output}{note}", file=sys.stderr)
    return 0


def _place(record: Any) -> dict[str, Any]:
    """Where a translated protein is coded."""
    values = (record.strand, record.first, record.last, len(record.sequence))
    return dict(zip(PLACE, values))


def _write(args: argparse.Namespace, kind: str, path: Path) -> tuple[int, int]:
    counts = [0, 0]
    rows = _rows(args, counts)
    if kind == "parquet":
        _write_parquet(rows, path, place=bool(args.translate))
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as handle:
            _write_csv(rows, handle, PLACE if args.translate else ())
    else:
        with open(path, "w", newline="", encoding="utf-8") as handle:
            _write_jsonl(rows, handle)
    if counts[0] == 0:
        raise InputError("no record could be predicted.", hint="Every one was reported above.")
    return counts[0], counts[1]


def _rows(args: argparse.Namespace, counts: list[int]) -> Iterator[dict[str, Any]]:
    """One dict a protein and head: the prediction and its `id`."""
    ask: dict[str, Any] = {
        "heads": args.heads, "nearest": args.nearest, "long_sequences": args.long_sequences
    }  # fmt: skip

    def remote(client: Any, chunk: list[Any], on_error: str) -> list[Any]:
        return client.predict(
            chunk, **ask, homologs=args.homologs, alignment=args.alignment, on_error=on_error
        )

    def translate(record: Any) -> Iterator[Any]:
        from bioseq.sequences.translation import coded

        return coded(record, args.translate, args.genetic_code)

    chunks = compute_chunks(
        args,
        counts,
        "predicting",
        chunk=CHUNK,
        prepare=ask,
        read=lambda a: a.predictions,
        remote=remote,
        translate=translate if args.translate else None,
    )
    for records, _, answers in chunks:
        for record, predictions in zip(records, answers):
            place = _place(record) if args.translate else {}
            for prediction in predictions.values():
                yield {"id": record.id, **place, **prediction}


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ";".join(value)
    if isinstance(value, dict | list):
        return json.dumps(value)
    return "" if value is None else value


def _flat(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """CSV cells: labels joined by ';', maps as JSON; per-residue probabilities are left to JSON and Parquet."""
    interval = row["interval"]
    low, high = interval if isinstance(interval, list) else (interval, None)
    cells = {**row, "low": low, "high": high}
    if "labels" in row:
        cells["probabilities"] = None
    near = row.get("nearest") or []
    # in words where the training rows were searched, else ids with their similarity
    cells["nearest"] = (
        "; ".join(n["text"] for n in near) if near and all("text" in n for n in near) else near or None
    )
    cells["homologs"] = (row.get("homologs") or {}).get("number")
    return {key: _cell(cells.get(key)) for key in names}


def _write_csv(rows: Iterable[dict[str, Any]], handle: Any, place: tuple[str, ...]) -> None:
    names = (*COLUMNS, *EVIDENCE, *place)
    out = csv.DictWriter(handle, names, lineterminator="\n")
    out.writeheader()
    for row in rows:
        out.writerow(_flat(row, names))


def _write_jsonl(rows: Iterable[dict[str, Any]], handle: Any) -> None:
    for row in rows:
        handle.write(json.dumps(row, allow_nan=False) + "\n")


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path, *, place: bool) -> None:
    """One row a protein and head; `value`, `interval` and `probabilities` as JSON text, since they differ by task."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    schema = pa.schema(
        [("id", text), ("head", text), ("version", pa.int32()), ("task", text), ("value", text)]
        + [("interval", text), ("probabilities", text), ("labels", text), ("ood", number)]
        + [("ood_percentile", number), ("nearest", text), ("homologs", text)]
        + ([(name, text if name == "strand" else pa.int64()) for name in PLACE] if place else [])
    )
    plain = {"id", "head", "version", "task", "ood", "ood_percentile", *PLACE}
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        iterator = iter(rows)
        while chunk := list(itertools.islice(iterator, CHUNK)):
            table = [
                {
                    n: row.get(n) if n in plain else (None if row.get(n) is None else json.dumps(row[n]))
                    for n in schema.names
                }
                for row in chunk
            ]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))

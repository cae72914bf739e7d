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

from bioseq.cli import add_engine_options, add_server_options, api_key, new_parser, positive_int
from bioseq.errors import InputError, OutputError, SequenceError, SpecError

CHUNK = 1024  # records read, computed and written at a time
EXAMPLE = """bioseq predict proteins.fasta --heads localization,target_class -o predictions.csv
  bioseq predict proteins.fasta --heads activity/ --nearest 3 -o predictions.jsonl"""
COLUMNS = ("id", "head", "version", "task", "value", "low", "high", "ood", "ood_percentile", "probabilities")


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "predict",
        "Properties of the proteins in FASTA files, by the heads you name, in input order.",
        example=EXAMPLE,
    )
    p.add_argument("fasta", nargs="+", help="FASTA files, plain or gzip; - is standard input")
    p.add_argument("--heads", required=True, metavar="A,B", help="registry names, NAME@V, or bundle folders")
    p.add_argument("-o", "--output", required=True, help="FILE.csv, .jsonl or .parquet; - is CSV on stdout")
    p.add_argument("--format", choices=("csv", "jsonl", "parquet"), help="default: by the output's name")
    p.add_argument("--nearest", type=positive_int, metavar="K", help="also the K nearest training examples")
    p.add_argument(
        "--long-sequences",
        choices=("error", "window", "truncate"),
        default="error",
        help="what to do with sequences over the model's limit (default: error)",
    )
    p.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="one bad record ends the run with nothing written (fail, default), or is reported and left out",
    )
    p.add_argument("--force", action="store_true", help="replace an existing output")
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
            f"{args.output}: the ending tells no format.",
            hint="Use .csv, .jsonl or .parquet, or pass --format.",
        )
    if args.nearest and args.server:
        raise SpecError(
            "a server does not give training examples.", field="nearest", hint="Leave --server out."
        )
    from bioseq.output import atomic_file, check_free

    if args.output == "-":
        if kind == "parquet":
            raise OutputError("Parquet is not written to standard output.", hint="Give a file with -o.")
        _write(args, kind, None)
        return 0
    check_free(Path(args.output), force=args.force)
    with atomic_file(args.output, force=args.force) as temporary:
        count, skipped = _write(args, kind, temporary)
    note = f"; {skipped} records left out" if skipped else ""
    print(f"predictions of {count} proteins in {args.output}{note}", file=sys.stderr)
    return 0


def _write(args: argparse.Namespace, kind: str, path: Path | None) -> tuple[int, int]:
    counts = [0, 0]
    rows = _rows(args, counts)
    if kind == "parquet":
        assert path is not None
        _write_parquet(rows, path)
    else:
        handle = sys.stdout if path is None else open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115
        try:
            (_write_csv if kind == "csv" else _write_jsonl)(rows, handle, bool(args.nearest))
        finally:
            if path is not None:
                handle.close()
    if counts[0] == 0:
        raise InputError("no record could be predicted.", hint="Every one was reported above.")
    return counts[0], counts[1]


def _rows(args: argparse.Namespace, counts: list[int]) -> Iterator[dict[str, Any]]:
    """One dict a protein and head: the prediction, its `id`, and `nearest` where asked for."""
    from bioseq.fasta import read_many
    from bioseq.predictor import Predictor

    if args.server:
        import bioseq

        engine: Any = bioseq.connect(args.server, api_key=api_key(args))
    else:
        from bioseq.loading import load

        engine = load(args.model, dtype=args.dtype, device=args.device, threads=args.threads)
    records = iter(read_many(args.fasta))
    while chunk := list(itertools.islice(records, CHUNK)):
        if isinstance(engine, Predictor):
            works, kept = [], []
            for record in chunk:
                try:
                    works.append(engine.prepare(record, heads=args.heads, long_sequences=args.long_sequences))
                except SequenceError as error:
                    if args.on_error == "fail":
                        raise
                    counts[1] += 1
                    print(f"left out: {error}", file=sys.stderr)
                    continue
                kept.append(record)
            answers = engine.run(works)
            for record, answer in zip(kept, answers):
                for text in answer.notes:
                    print(f"{record.source}: {record.id}: {text}", file=sys.stderr)
            found = [a.predictions or {} for a in answers]
            near = _nearest(engine, kept, args) if args.nearest and kept else None
        else:
            kept, near = chunk, None
            found = engine.predict(chunk, heads=args.heads, long_sequences=args.long_sequences)
        counts[0] += len(kept)
        for i, (record, predictions) in enumerate(zip(kept, found)):
            for asked, prediction in predictions.items():
                row = {"id": record.id, **prediction}
                if near is not None:
                    row["nearest"] = near[asked][i]
                yield row


def _nearest(engine: Any, records: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Nearest training examples by head and record. A head with a trunk of its own knows only its own space,
    which the bare backbone does not show."""
    out = {}
    for name in args.heads:
        head = engine.heads[name]
        if head.adapter is not None or head.trunk is not None:
            raise SpecError(
                f"head {name} was not trained on the frozen backbone; nearest examples are for frozen heads.",
                field="nearest",
            )
        ask = head.embed_ask
        works = [engine.prepare(r, embed=ask, long_sequences=args.long_sequences) for r in records]
        features = [a.embedding for a in engine.run(works)]
        out[name] = head.nearest(features, args.nearest)
    return out


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ";".join(value)
    if isinstance(value, dict | list):
        return json.dumps(value)
    return "" if value is None else value


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """CSV cells: labels joined by ';', maps as JSON; per-residue probabilities are left to JSON and Parquet."""
    interval = row["interval"]
    low, high = interval if isinstance(interval, list) else (interval, None)
    cells = {**row, "low": low, "high": high}
    if "labels" in row:
        cells["probabilities"] = None
    return {key: _cell(cells.get(key)) for key in (*COLUMNS, *(("nearest",) if "nearest" in row else ()))}


def _write_csv(rows: Iterable[dict[str, Any]], handle: Any, nearest: bool) -> None:
    out = csv.DictWriter(handle, [*COLUMNS, *(("nearest",) if nearest else ())], lineterminator="\n")
    out.writeheader()
    for row in rows:
        out.writerow(_flat(row))


def _write_jsonl(rows: Iterable[dict[str, Any]], handle: Any, nearest: bool) -> None:
    for row in rows:
        handle.write(json.dumps(row, allow_nan=False) + "\n")


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One row a protein and head; `value`, `interval` and `probabilities` as JSON text, since they differ by task."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    schema = pa.schema(
        [("id", text), ("head", text), ("version", pa.int32()), ("task", text), ("value", text)]
        + [("interval", text), ("probabilities", text), ("labels", text), ("ood", number)]
        + [("ood_percentile", number), ("nearest", text)]
    )
    plain = {"id", "head", "version", "task", "ood", "ood_percentile"}
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

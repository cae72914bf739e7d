"""`bioseq embed`: FASTA in; Parquet, npz or CSV out. Streams: memory does not grow with the library."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.cli import add_engine_options, add_server_options, new_parser, positive_int
from bioseq.commands.records import Notes, add_alignment_option, add_reading_option, compute_chunks
from bioseq.errors import InputError, OutputError

if TYPE_CHECKING:
    from bioseq.inference.predictor import Predictor
    from bioseq.inference.query import Query, Result
    from bioseq.sequences.fasta import Record

CHUNK = 2048  # records read, planned and written at a time
EXAMPLE = """bioseq embed proteins.fasta -o embeddings.parquet
  bioseq embed proteins.fasta.gz --pooling max --layers 3,-1 -o embeddings.npz
  cat proteins.fasta | bioseq embed - --per-residue -o residues.parquet"""


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,-1") from None


def parser() -> argparse.ArgumentParser:
    p = new_parser("embed", "Embeddings of the proteins in FASTA files, in input order.", example=EXAMPLE)
    p.add_argument("fasta", nargs="+", help="FASTA files, plain or compressed; - is standard input")
    p.add_argument(
        "-o", "--output", required=True, help="FILE.parquet, FILE.npz or FILE.csv; - is CSV on stdout"
    )
    p.add_argument("--format", choices=("parquet", "npz", "csv"), help="default: by the output's name")
    p.add_argument(
        "--pooling", choices=("mean", "max", "cls"), default="mean", help="default: mean over residues"
    )
    p.add_argument(
        "--layers", type=_layers, default=(-1,), help="0 is the embedding, -1 the last (default: -1)"
    )
    p.add_argument("--per-residue", action="store_true", help="one vector a residue instead of a pooled one")
    p.add_argument(
        "--long-sequences",
        choices=("error", "window", "truncate"),
        default="error",
        help="what to do with sequences over the model's limit (default: error)",
    )
    p.add_argument(
        "--vectors",
        metavar="STORE",
        help="read what this vector store holds and add the rest to it; it is made if it is not there",
    )
    p.add_argument("--gaps", action="store_true", help="accept '-' and '.' as gap tokens")
    p.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="one bad record ends the run with nothing written (fail, default), or is reported and left out",
    )
    p.add_argument("--chunk", type=positive_int, default=CHUNK, help=argparse.SUPPRESS)
    p.add_argument("--force", action="store_true", help="replace an existing output")
    add_reading_option(p)
    add_alignment_option(p, "a backbone that reads homologs")
    add_engine_options(p)
    add_server_options(p)
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    kind = args.format or {".parquet": "parquet", ".npz": "npz", ".csv": "csv", "": "csv"}.get(
        Path(args.output).suffix if args.output != "-" else "", ""
    )
    if not kind:
        raise OutputError(
            f"{args.output}: the format does not follow from the ending.",
            hint="Use .parquet, .npz or .csv, or pass --format.",
        )
    if args.per_residue and kind == "csv":
        raise OutputError("CSV cannot hold per-residue vectors.", hint="Use .parquet or .npz.")
    if len(args.layers) > 1 and kind == "csv":
        raise OutputError("CSV holds one layer.", hint="Use .parquet or .npz, or name one layer.")
    from bioseq.output import atomic_file, whole_stdout

    if args.output == "-":
        if kind != "csv":
            raise OutputError(f"{kind} cannot be written to standard output.", hint="Give a file with -o.")
        with whole_stdout() as path:
            _write(args, kind, path)
        return 0
    with atomic_file(args.output, force=args.force) as temporary:
        count, skipped = _write(args, kind, temporary)
    print(
        f"{count} embeddings in {args.output}" + (f"; {skipped} records left out" if skipped else ""),
        file=sys.stderr,
    )
    return 0


def _write(args: argparse.Namespace, kind: str, path: Path) -> tuple[int, int]:
    counts = [0, 0]
    rows = _rows(args, counts)
    writer = {"parquet": _write_parquet, "npz": _write_npz, "csv": _write_csv}[kind]
    writer(rows, path, args)
    if counts[0] == 0:
        raise InputError("no record could be embedded.", hint="Every one was reported above.")
    return counts[0], counts[1]


def _rows(
    args: argparse.Namespace, counts: list[int]
) -> Iterator[tuple[list[Record], list[Notes], list[np.ndarray]]]:
    """Chunks of records with their notes and embeddings, in input order."""
    from bioseq.backbones.pooling import EmbedOptions

    if args.server and args.gaps:
        raise InputError("--gaps works on this machine only.", hint="Leave out --server, or remove the gaps.")

    if args.vectors and (args.server or args.alignment):
        raise InputError(
            "--vectors goes with neither --server nor --alignment.", hint="Leave one of them out."
        )
    if args.vectors and args.per_residue and len(args.layers) > 1:
        raise InputError(
            "a vector store holds one layer of vectors of residues.", hint="Name one layer with --layers."
        )

    def remote(client: Any, chunk: list[Record], on_error: str) -> list[Any]:
        return client.embed(
            chunk, pooling=args.pooling, layers=args.layers, per_residue=args.per_residue,
            long_sequences=args.long_sequences, homologs=args.homologs, alignment=args.alignment,
            on_error=on_error,
        )  # fmt: skip

    return compute_chunks(
        args, counts, "embedding", chunk=args.chunk,
        prepare={
            "embed": EmbedOptions(args.pooling, args.layers, args.per_residue),
            "long_sequences": args.long_sequences, "gaps": args.gaps,
        },
        read=lambda answer: answer.embedding, remote=remote, run=_through(args) if args.vectors else None,
    )  # fmt: skip


def _through(args: argparse.Namespace) -> Callable[[Predictor, list[Query], list[str]], list[Result]]:
    """`Predictor.run` through the store of --vectors."""
    from bioseq.inference.query import Result
    from bioseq.inference.vectors import embed_stored, settings_of
    from bioseq.vectors.store import VectorStore

    def run(model: Predictor, queries: list[Query], names: list[str]) -> list[Result]:
        if not queries:
            return []
        assert queries[0].embed is not None
        store = VectorStore(args.vectors, settings_of(model, queries[0].embed, args.long_sequences))
        arrays = embed_stored(model, store, queries, names)[0]
        shape = (-1,) if args.per_residue or len(args.layers) == 1 else (len(args.layers), -1)
        if not args.per_residue:
            arrays = [a.reshape(shape) for a in arrays]
        return [Result(embedding=a, notes=q.notes) for a, q in zip(arrays, queries, strict=True)]

    return run


def _write_parquet(rows: Iterator[Any], path: Path, args: argparse.Namespace) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for records, notes, arrays in rows:
            if args.per_residue:
                vectors = pa.array(
                    [a.reshape(-1) for a in arrays], type=pa.list_(pa.float32())
                )  # [L*D] (or [layers*L*D]) beside its shape: nested fixed lists of ragged length do not exist
                shapes = pa.array([list(a.shape) for a in arrays], type=pa.list_(pa.int32()))
            else:
                block = np.stack(arrays).astype(np.float32, copy=False)
                flat = pa.array(block.reshape(-1))
                vectors = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(block.shape[1:])))
                shapes = None
            columns: dict[str, Any] = {
                "id": pa.array([r.id for r in records], type=pa.string()),
                "length": pa.array([len(r.sequence) for r in records], type=pa.int32()),
                "notes": pa.array(["; ".join(n) for n in notes], type=pa.string()),
                "embedding": vectors,
            }
            if shapes is not None:
                columns["shape"] = shapes
            meta = {"pooling": args.pooling, "layers": ",".join(map(str, args.layers)), "model": args.model}
            table = pa.table(columns, metadata=meta)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _write_npz(rows: Iterator[Any], path: Path, args: argparse.Namespace) -> None:
    """npz is written whole at the end; for large libraries Parquet streams."""
    ids: list[str] = []
    blocks: list[np.ndarray] = []
    for records, _, arrays in rows:
        ids += [r.id for r in records]
        blocks += arrays
    if not blocks:
        return
    with open(path, "wb") as handle:
        if args.per_residue:
            lengths = np.array([b.shape[-2] for b in blocks], dtype=np.int64)
            np.savez(handle, ids=np.array(ids), lengths=lengths, embeddings=np.concatenate(blocks, axis=-2))
        else:
            np.savez(handle, ids=np.array(ids), embeddings=np.stack(blocks))


def _write_csv(rows: Iterator[Any], path: Path, args: argparse.Namespace) -> None:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        out = csv.writer(handle, lineterminator="\n")
        first = True
        for records, _, arrays in rows:
            if first:
                out.writerow(["id", "length", *(f"e{i}" for i in range(arrays[0].shape[-1]))])
                first = False
            for record, array in zip(records, arrays):
                out.writerow([record.id, len(record.sequence), *(f"{v:.7g}" for v in array.tolist())])

"""What `embed` and `predict` share: FASTA records through a predictor or a server, a chunk at a time, with progress."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bioseq.cli import api_key
from bioseq.errors import SequenceError

if TYPE_CHECKING:
    from bioseq.inference.predictor import Predictor
    from bioseq.inference.query import Query, Result
    from bioseq.sequences.fasta import Record

Notes = tuple[str, ...]


def add_reading_option(parser: argparse.ArgumentParser) -> None:
    """--homologs of commands that need none but where the backbone reads them."""
    parser.add_argument(
        "--homologs",
        default="auto",
        metavar="REF",
        help="for a backbone that reads homologs: auto (the set that it was trained with), none, default, or a folder",
    )


def add_alignment_option(parser: argparse.ArgumentParser, readers: str) -> None:
    """--alignment of commands that need no homologs but where something reads them."""
    parser.add_argument(
        "--alignment",
        metavar="FILE",
        help=f"a3m, a2m, aligned FASTA or Stockholm of the one protein's homologs, for {readers}, instead of a search",
    )


def open_engine(args: argparse.Namespace, homologs: str = "auto") -> Any:
    """The server that was named, or the model loaded here; `homologs` is for a backbone that reads them."""
    if args.server:
        import bioseq

        return bioseq.connect(args.server, api_key=api_key(args), model=args.model)
    return load_here(args, homologs)


def load_here(args: argparse.Namespace, homologs: str = "auto") -> Predictor:
    """The model that the engine options name."""
    from bioseq.inference.loading import load

    return load(args.model, dtype=args.dtype, device=args.device, threads=args.threads, homologs=homologs)


def compute_chunks(
    args: argparse.Namespace,
    counts: list[int],
    label: str,
    *,
    chunk: int,
    prepare: dict[str, Any],
    read: Callable[[Result], Any],
    remote: Callable[[Any, list[Record], str], list[Any]],
    run: Callable[[Predictor, list[Query], list[str]], list[Result]] | None = None,
    translate: Callable[[Record], Iterator[Record | SequenceError]] | None = None,
) -> Iterator[tuple[list[Record], list[Notes], list[Any]]]:
    """Chunks of records with notes and results, in input order. `counts` grows by (done, left out).

    `prepare` goes to `Predictor.prepare` and `read` takes the answer from what comes back; `remote` asks a client
    for a chunk under its `on_error`, with None for a record that it could not answer. `run` stands for `Predictor.run`, and gets the
    ids too. `translate` makes of a record those that are computed in its place.
    """
    from bioseq.inference.homologs import let_read
    from bioseq.inference.predictor import Predictor
    from bioseq.progress import Progress
    from bioseq.sequences.fasta import read_many

    engine = open_engine(args, args.homologs)
    records = iter(read_many(args.fasta, allow_empty=args.on_error == "skip"))
    total = _count(args.fasta)

    def left_out(error: Exception) -> None:
        counts[1] += 1
        print(f"left out: {error}", file=sys.stderr)

    with Progress(total or 1, label, unit="sequences", enabled=bool(total)) as bar:
        while some := list(itertools.islice(records, chunk)):
            read_now = len(some)
            if translate is not None:
                made = [product for record in some for product in translate(record)]
                some = [m for m in made if not isinstance(m, SequenceError)]
                for fault in (m for m in made if isinstance(m, SequenceError)):
                    if args.on_error == "fail":
                        raise fault
                    left_out(fault)
                if not some:
                    bar.add(read_now)
                    continue
            if isinstance(engine, Predictor):
                queries, kept = [], []
                for record in some:
                    try:
                        queries.append(engine.prepare(record, **prepare))
                    except SequenceError as error:
                        if args.on_error == "fail":
                            raise
                        left_out(error)
                        continue
                    kept.append(record)
                if args.alignment:
                    let_read(engine, engine.heads, queries, args.homologs, args.alignment)
                found = run(engine, queries, [r.id for r in kept]) if run else engine.run(queries)
                notes, results = [a.told for a in found], [read(a) for a in found]
                for record, answer in zip(kept, found):
                    for text in answer.notes:
                        print(f"{record.source}: {record.id}: {text}", file=sys.stderr)
            else:
                given = remote(engine, some, "raise" if args.on_error == "fail" else "report")
                for refused in engine.errors:
                    left_out(refused)
                both = [(r, a) for r, a in zip(some, given, strict=True) if a is not None]
                kept, results = [r for r, _ in both], [a for _, a in both]
                notes = [()] * len(kept)
            counts[0] += len(kept)
            bar.add(read_now)
            if kept:
                yield kept, notes, results


def _count(paths: list[str]) -> int:
    """Records to come, for the progress; 0 where that would mean reading a stream twice."""
    from pathlib import Path

    from bioseq.sequences.fasta import count_records

    if not all(Path(path).is_file() for path in paths):
        return 0
    return sum(count_records(path) for path in paths)

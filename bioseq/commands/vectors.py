"""`bioseq vectors`: a store of embeddings, searches in it, and labels of the nearest proteins."""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bioseq.cli import add_engine_options, new_parser, positive_int
from bioseq.commands.records import load_here
from bioseq.errors import InputError, TableError

if TYPE_CHECKING:
    import numpy as np

    from bioseq.homologs.hits import Hits
    from bioseq.inference.predictor import Predictor
    from bioseq.sequences.fasta import Record
    from bioseq.vectors.annotate import Annotator
    from bioseq.vectors.store import VectorStore

EXAMPLE = """bioseq vectors add store/ proteins.fasta
  bioseq vectors search store/ queries.fasta -k 10 -o nearest.tsv
  bioseq vectors annotate store/ queries.fasta --labels table.csv --column family -o labels.tsv"""
_EXAMPLES = {
    "add": "bioseq vectors add store/ proteins.fasta",
    "search": "bioseq vectors search store/ queries.fasta -k 10 -o nearest.tsv",
    "annotate": "bioseq vectors annotate store/ queries.fasta --labels table.csv --column family -o labels.tsv",
    "index": "bioseq vectors index store/",
    "info": "bioseq vectors info store/",
}
CHUNK = 512  # proteins that are embedded and committed together
NEAREST = ("query", "rank", "hit", "similarity")
LABELS = ("query", "label", "nearest", "similarity", "reliability", "homolog", "homolog_label", "identity")


def parser() -> argparse.ArgumentParser:
    p = new_parser(
        "vectors", "Embeddings that are kept, and searched for the nearest proteins.", example=EXAMPLE
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        sub.add_argument("store", help="folder of the store")
        return sub

    sub = add("add", "embed the proteins that the store does not hold, and add them")
    sub.add_argument("fasta", nargs="+", help="FASTA files, plain or compressed; - is standard input")
    sub.add_argument("--pooling", choices=("mean", "max", "cls"), default="mean", help="default: mean")
    sub.add_argument("--layer", type=int, default=-1, help="0 is the embedding, -1 the last (default: -1)")
    sub.add_argument(
        "--long-sequences", choices=("error", "window", "truncate"), default="error",
        help="what to do with sequences over the model's limit (default: error)",
    )  # fmt: skip
    add_engine_options(sub)

    near = add("search", "find the nearest proteins of the store by cosine similarity")
    near.add_argument("-k", type=positive_int, default=10, help="how many of each (default: 10)")
    way = near.add_mutually_exclusive_group()
    way.add_argument(
        "--exact", dest="exact", action="store_true", default=None, help="compare with every vector"
    )
    way.add_argument(
        "--approximate", dest="exact", action="store_false",
        help="use the index (default: beyond 1000000 vectors, where one was built)",
    )  # fmt: skip
    labels = add("annotate", "label proteins by the nearest labelled one, with a calibrated reliability")
    labels.add_argument(
        "--labels", required=True, metavar="TABLE", help="CSV file with id, sequence and labels"
    )
    labels.add_argument("--column", required=True, help="the table's column of labels")
    labels.add_argument("--no-homologs", action="store_true", help="do not search homologs beside")
    for one in (near, labels):
        one.add_argument("fasta", help="FASTA file, plain or compressed; - is standard input")
        one.add_argument(
            "-o", "--output", required=True, metavar="FILE", help="TSV file; - is standard output"
        )
        one.add_argument("--force", action="store_true", help="replace an existing output")
        add_engine_options(one)

    index = add("index", "build the index of an approximate search, or add what the store has gained")
    index.add_argument("--threads", type=positive_int, default=None, help="CPU threads (default: all)")
    info = add("info", "what the store holds")
    info.add_argument("--check", action="store_true", help="read every vector and compare its checksum")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    runs: dict[str, Callable[[argparse.Namespace], int]] = {
        "add": _add, "search": _search, "annotate": _annotate, "index": _index, "info": _info
    }  # fmt: skip
    return runs[args.command](args)


def _options(store: VectorStore) -> dict[str, Any]:
    """What `Predictor.prepare` is told, so that queries are embedded as the store's vectors were."""
    from bioseq.backbones.pooling import EmbedOptions

    s = store.settings
    return {
        "embed": EmbedOptions(s.pooling, s.layers, s.per_residue),  # type: ignore[arg-type]
        "long_sequences": s.long_sequences,
    }


def _open(args: argparse.Namespace) -> tuple[VectorStore, Predictor]:
    """The store, and the model that made it. Raises `VectorStoreError` for another model."""
    from bioseq.inference.vectors import settings_of
    from bioseq.vectors.store import VectorStore

    store = VectorStore(args.store)
    model, ask = load_here(args), _options(store)
    store.settings.check_same(
        settings_of(model, ask["embed"], ask["long_sequences"], stored=store.settings.stored), args.store
    )
    return store, model


def _add(args: argparse.Namespace) -> int:
    from bioseq.backbones.pooling import EmbedOptions
    from bioseq.inference.vectors import embed_stored, settings_of
    from bioseq.progress import Progress
    from bioseq.sequences.fasta import count_records, read_many
    from bioseq.vectors.store import VectorStore

    model = load_here(args)
    options = EmbedOptions(args.pooling, (args.layer,))
    total = sum(count_records(f) for f in args.fasta) if all(Path(f).is_file() for f in args.fasta) else 0
    store = VectorStore(args.store, settings_of(model, options, args.long_sequences))
    records, done, computed = read_many(args.fasta), 0, 0
    with Progress(total, "embedding", unit="sequences", enabled=bool(total)) as bar:
        while some := list(itertools.islice(records, CHUNK)):
            queries = [
                model.prepare(r, embed=options, long_sequences=args.long_sequences, index=done + i)
                for i, r in enumerate(some)
            ]
            computed += embed_stored(model, store, queries, [r.id for r in some])[1]
            done += len(some)
            bar.add(len(some))
    print(
        f"{done} proteins, {computed} of them embedded; {args.store} holds {len(store)} vectors",
        file=sys.stderr,
    )
    return 0


def _vectors(
    args: argparse.Namespace, model: Predictor, ask: dict[str, Any]
) -> Iterator[tuple[list[Record], Any]]:
    import numpy as np

    from bioseq.sequences.fasta import read_fasta

    records = read_fasta(args.fasta)
    while some := list(itertools.islice(records, CHUNK)):
        found = model.run([model.prepare(r, **ask) for r in some])
        yield some, np.stack([r.embedding.reshape(-1) for r in found])  # type: ignore[union-attr]


def _write(args: argparse.Namespace, header: tuple[str, ...], rows: Iterator[list[str]]) -> None:
    from bioseq.output import atomic_file, check_free, whole_stdout

    to_stdout = args.output == "-"
    if not to_stdout:
        check_free(Path(args.output), force=args.force)
    with whole_stdout() if to_stdout else atomic_file(args.output, force=args.force) as path:
        with open(path, "w", encoding="utf-8", newline="") as handle:
            out = csv.writer(handle, delimiter="\t", lineterminator="\n")
            out.writerow(header)
            out.writerows(rows)


def _search(args: argparse.Namespace) -> int:
    from bioseq.vectors.search import search

    store, model = _open(args)
    counts = {"queries": 0}

    def rows() -> Iterator[list[str]]:
        for records, queries in _vectors(args, model, _options(store)):
            found = search(store, queries, args.k, exact=args.exact, threads=args.threads or 0)
            counts["queries"] += len(records)
            for record, places, values in zip(records, found.places, found.similarity):
                for rank, (names, value) in enumerate(zip(store.names(places), values), 1):
                    yield [record.id, str(rank), ",".join(names), f"{value:.5f}"]

    _write(args, NEAREST, rows())
    print(f"nearest of {counts['queries']} proteins among {len(store)} vectors", file=sys.stderr)
    return 0


def _labelled(path: str, column: str) -> tuple[list[str], list[str], list[str]]:
    """Ids, sequences and labels of the rows that have one. Equal sequences with different labels are refused."""
    from bioseq.errors import OutputError

    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            table = csv.DictReader(handle)
            absent = [name for name in ("id", "sequence", column) if name not in (table.fieldnames or [])]
            if absent:
                raise TableError(
                    f"{path} has no column {', '.join(absent)}; it has {', '.join(table.fieldnames or []) or 'none'}."
                )
            rows = [(n, row) for n, row in enumerate(table, 1) if (row[column] or "").strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {path}: {error}.") from None
    kept: dict[str, tuple[str, str]] = {}
    wrong = []
    for n, row in rows:
        key, label = (row["sequence"] or "").upper(), row[column].strip()
        if kept.setdefault(key, (row["id"] or "", label))[1] != label:
            wrong.append(n)
    if wrong:
        raise TableError(
            f"{path}: a sequence has two labels in {column}.", rows=wrong, hint="Keep one of them."
        )
    return [i for i, _ in kept.values()], list(kept), [label for _, label in kept.values()]


def _annotate(args: argparse.Namespace) -> int:
    import numpy as np

    from bioseq.inference.vectors import embed_stored
    from bioseq.vectors.annotate import Annotator

    ids, sequences, labels = _labelled(args.labels, args.column)
    store, model = _open(args)
    queries = [model.prepare(s, index=i, **_options(store)) for i, s in enumerate(sequences)]
    found: list[np.ndarray] = []
    for at in range(0, len(queries), CHUNK):
        found += embed_stored(model, store, queries[at : at + CHUNK], ids[at : at + CHUNK])[0]
    annotator = Annotator(np.stack(found) if found else np.empty((0, store.settings.width)), labels)
    homologs = None if args.no_homologs else _Homologs(ids, sequences, labels, args.threads)

    def rows() -> Iterator[list[str]]:
        for records, vectors in _vectors(args, model, _options(store)):
            hits = homologs.search([r.sequence for r in records]) if homologs else [None] * len(records)
            for record, hit, place, value, sure in zip(records, hits, *annotator.annotate(vectors)):
                beside = ["", "", ""]
                if hit is not None and len(hit):
                    beside = [ids[hit.keys[0]], labels[hit.keys[0]], f"{hit.identity[0]:.4f}"]
                yield [record.id, labels[place], ids[place], f"{value:.5f}", f"{sure:.3f}", *beside]

    _write(args, LABELS, rows())
    for line in _told(annotator, homologs):
        print(line, file=sys.stderr)
    return 0


def _told(annotator: Annotator, homologs: _Homologs | None) -> Iterator[str]:
    curve = annotator.reliability
    yield (
        f"held-back pairs: {curve.pairs}; the nearest label is right for {annotator.right.mean():.3f} of them; "
        f"stated reliability differs from the found one by {curve.error:.3f}"
    )
    if homologs is not None:
        covered, right = homologs.held_back()
        yield (
            f"homologs are found for {covered:.3f} of the labelled proteins and their label is right for {right:.3f}; "
            f"the nearest vectors at the same coverage: {annotator.share_right(covered):.3f}"
        )


class _Homologs:
    """Searches among the labelled proteins, in a reference set that lives as long as this object."""

    def __init__(self, ids: list[str], sequences: list[str], labels: list[str], threads: int | None):
        import tempfile

        from bioseq.homologs.door import Homologs
        from bioseq.homologs.reference import build_reference
        from bioseq.sequences.fasta import Record

        self._folder = tempfile.TemporaryDirectory()
        self._sequences, self._labels = sequences, labels
        records = [Record(str(n), s, "") for n, s in enumerate(sequences)]
        made = build_reference(records, Path(self._folder.name) / "labelled")
        if made.manifest.left_out:
            raise InputError("a labelled sequence is too long to be searched.", hint="Pass --no-homologs.")
        self._door = Homologs(made, threads=threads, quiet=True)

    def search(self, sequences: list[str]) -> list[Hits]:
        return self._door.search(sequences)

    def held_back(self) -> tuple[float, float]:
        """(share of the labelled proteins that have another as a homolog, share of right labels among those)"""
        import numpy as np

        from bioseq.homologs.transfer import nearest, without

        right = []
        for own, hits in enumerate(self.search(self._sequences)):
            best = nearest(without(hits, own))
            if best is not None:
                right.append(self._labels[best.place] == self._labels[own])
        covered = len(right) / len(self._labels)
        return covered, float(np.mean(right)) if right else float("nan")


def _index(args: argparse.Namespace) -> int:
    import numpy as np

    from bioseq.progress import Progress
    from bioseq.vectors.search import build_index, measure_recall
    from bioseq.vectors.store import VectorStore

    store = VectorStore(args.store)
    with Progress(len(store), "indexing", unit="vectors") as bar:
        count = build_index(store, threads=args.threads or 0, progress=bar)
    sample = np.random.default_rng(0).choice(count, min(count, 100), replace=False)
    recall = measure_recall(store, np.asarray(store.matrix()[np.sort(sample)])) if count else 1.0
    print(
        f"{count} vectors in the index; it finds {recall:.3f} of the 10 nearest of {len(sample)} of them",
        file=sys.stderr,
    )
    return 0


def _info(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from bioseq.vectors.search import index_path
    from bioseq.vectors.store import VectorStore

    store = VectorStore(args.store)
    if args.check:
        store.check()
    print(f"vectors: {len(store)}" + (" (all checksums are right)" if args.check else ""))
    for name, value in asdict(store.settings).items():
        print(f"{name}: {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    print(f"index: {'yes' if index_path(store).is_file() else 'none'}")
    return 0

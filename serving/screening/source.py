"""FASTA libraries in: files and URLs, cut at byte ranges, as a Ray Data source of small receipts.

Concept: a *split* is one byte range of one file (a compressed file is one split). A record belongs to the split
that holds its '>'. Splits are cut at a fixed size, so records have the same place (*row*) whatever reads
them: row = records of all earlier splits + place in the split. A read task does not hand sequences on; it
writes checked, hashed records as Parquet *pieces* into the run folder and yields a receipt for each.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.fs as pafs

from bioseq.compression import HEAD_BYTES, compression
from bioseq.errors import BioseqError, FastaError
from bioseq.sequences.fasta import Record, read_fasta, read_stream
from serving.screening.folder import file_sha256

SPLIT_BYTES = 16 << 20


@dataclass(frozen=True)
class Split:
    """Bytes [start, end) of a file; `end` None is a compressed file, read whole."""

    file: int
    number: int
    path: str
    name: str
    start: int
    end: int | None

    @property
    def key(self) -> str:
        return f"f{self.file:04d}-s{self.number:06d}"


def is_url(path: str) -> bool:
    return "://" in path


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _remote(url: str) -> tuple[pafs.FileSystem, str]:
    try:
        return pafs.FileSystem.from_uri(url)
    except (OSError, ValueError) as error:
        raise FastaError(
            f"cannot be opened ({type(error).__name__}).", file=url, hint="Check the URL."
        ) from error


def identify(path: str) -> dict[str, Any]:
    """What tells a changed input: name, bytes, and sha256 of a local file or the store's time of a remote one.

    Raises `FastaError` if it cannot be read.
    """
    if is_url(path):
        filesystem, inner = _remote(path)
        try:
            info = filesystem.get_file_info(inner)
        except OSError as error:
            raise FastaError(
                "cannot be read.", file=path, hint="Check the URL and its credentials."
            ) from error
        if info.type != pafs.FileType.File:
            raise FastaError("there is no such file.", file=path, hint="Check the URL.")
        return {"name": _name(path), "bytes": info.size, "modified_ns": info.mtime_ns}
    local = Path(path)
    try:
        if local.is_dir():
            raise FastaError("this is a folder.", file=path, hint="Give a FASTA file.")
        return {"name": local.name, "bytes": local.stat().st_size, "sha256": file_sha256(local)}
    except OSError as error:
        raise FastaError(f"cannot be read: {error.strerror}.", file=path, hint="Check the path.") from error


def open_bytes(path: str) -> IO[bytes]:
    """A seekable buffered reader of a local file or URL."""
    if not is_url(path):
        return open(path, "rb", buffering=1 << 20)
    filesystem, inner = _remote(path)
    return io.BufferedReader(filesystem.open_input_file(inner), 1 << 20)


def cut(paths: tuple[str, ...], sizes: list[int], split_bytes: int = SPLIT_BYTES) -> list[Split]:
    """The splits of all files, in order. Paths become absolute, so that any worker's folder will do."""
    splits = []
    for number, (path, size) in enumerate(zip(paths, sizes)):
        where = path if is_url(path) else str(Path(path).absolute())
        with open_bytes(where) as handle:
            packed = compression(handle.read(HEAD_BYTES)) is not None
        if packed or size <= split_bytes:
            ranges: list[tuple[int, int | None]] = [(0, None)]
        else:
            ranges = [(at, min(at + split_bytes, size)) for at in range(0, size, split_bytes)]
        splits += [Split(number, i, where, _name(path), a, b) for i, (a, b) in enumerate(ranges)]
    return splits


def records(split: Split) -> Iterator[Record]:
    """The split's records in order, empty ones too. `source` is "name:line" or, in a range, "name@byte"."""
    if is_url(split.path):
        with open_bytes(split.path) as handle:
            yield from read_stream(handle, split.path, start=split.start, end=split.end, allow_empty=True)
    else:
        ranged = {} if split.end is None else {"start": split.start, "end": split.end}
        yield from read_fasta(split.path, allow_empty=True, **ranged)


def datasource(splits: list[Split], job: Any) -> Any:
    """A Ray Data source with one read task a split; rows are the receipts that `job(split)` yields."""
    import pyarrow as pa
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def task(split: Split) -> ReadTask:
        def read() -> Iterator[pa.Table]:
            try:
                for receipt in job(split):
                    yield pa.Table.from_pylist([{"error": "", **receipt}])
            except BioseqError as error:
                # As a row: an exception would reach the driver wrapped in Ray's, without its kind
                yield pa.Table.from_pylist([{"error": str(error), **asdict(EMPTY)}])

        return ReadTask(
            read, BlockMetadata(num_rows=1, size_bytes=1024, exec_stats=None, input_files=(split.path,))
        )

    class FastaSplits(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return 1024 * len(splits)

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            return [task(split) for split in splits]

    return FastaSplits()


@dataclass(frozen=True)
class Piece:
    """A Parquet file of consecutive records of one split."""

    file: int
    split: int
    piece: int
    path: str
    rows: int
    residues: int
    faulty: int


EMPTY = Piece(0, 0, 0, "", 0, 0, 0)

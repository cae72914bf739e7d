"""First pass over a library: check, fold, hash and number its records, split by split.

A record's error is a value in its row, never an exception: one bad record costs no other. What is kept of a
good record is its sequence as the model will read it (upper case, without the stop at the end), so equal
proteins are equal bytes and have equal hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bioseq.errors import EmptySequenceError, SequenceError, SequenceTooLongError
from bioseq.output import atomic_file
from bioseq.sequences.alphabet import by_name
from bioseq.sequences.translation import translated
from serving.screening.folder import write_json
from serving.screening.source import Piece, Split, open_bytes, records

PIECE_ROWS = 65_536
PIECE_BYTES = 16 << 20
LINES_COUNTED_BYTES = 256 << 20

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("length", pa.int32()),
        ("hash_high", pa.uint64()),
        ("hash_low", pa.uint64()),
        ("error", pa.string()),
        ("note", pa.string()),
        ("byte", pa.int64()),  # of the header, for errors in a byte range; the line is counted at the end
        ("sequence", pa.string()),
    ]
)


def sequence_hash(sequence: str) -> tuple[int, int]:
    """128 bits of BLAKE2b, as two unsigned 64-bit integers."""
    digest = hashlib.blake2b(sequence.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


@dataclass(frozen=True)
class IndexJob:
    """Reads one split and writes its pieces into `folder`; a split that is whole there is not read again."""

    folder: str
    alphabet: str
    max_length: int
    translate: str = "none"
    genetic_code: int = 1

    def __call__(self, split: Split) -> Iterator[dict[str, Any]]:
        done = Path(self.folder) / f"{split.key}.json"
        if done.is_file():
            pieces = [Piece(**p) for p in json.loads(done.read_text("utf-8"))]
            if all(Path(p.path).is_file() for p in pieces):
                for piece in pieces:
                    yield asdict(piece)
                return
        pieces = []
        for piece in self._pieces(split):
            pieces.append(piece)
            yield asdict(piece)
        write_json(done, [asdict(p) for p in pieces])

    def _pieces(self, split: Split) -> Iterator[Piece]:
        rows: list[tuple[Any, ...]] = []
        size, number = 0, 0
        for row in self._rows(split):
            rows.append(row)
            size += len(row[-1] or "")
            if len(rows) >= PIECE_ROWS or size >= PIECE_BYTES:
                yield self._write(split, number, rows)
                rows, size, number = [], 0, number + 1
        if rows:
            yield self._write(split, number, rows)

    def _rows(self, split: Split) -> Iterator[tuple[Any, ...]]:
        protein = by_name(self.alphabet)
        for record in records(split):
            place = record.source.rpartition("@" if split.end is not None else ":")[2]
            byte = int(place) if split.end is not None else None
            for suffix, sequence, origin in translated(record.sequence, self.translate, self.genetic_code):
                name = record.id + suffix
                try:
                    if isinstance(sequence, SequenceError):
                        raise sequence
                    if not sequence:
                        raise EmptySequenceError("the record has no residues.")
                    if len(sequence) > self.max_length:
                        raise SequenceTooLongError(
                            f"{len(sequence)} residues; this run takes at most {self.max_length}."
                        )
                    encoded = protein.encode(sequence)
                except SequenceError as error:
                    source = f"{split.name}@" if byte is not None else f"{split.name}:{place}"
                    text = f"{error.code}: {source}: record {name!r}: {error.bare}"
                    yield name, len(record.sequence), None, None, text, None, byte, None
                    continue
                folded = sequence.upper().removesuffix("*")
                high, low = sequence_hash(folded)
                note = "; ".join((*origin, *encoded.notes)) or None
                yield name, len(folded), high, low, None, note, None, folded

    def _write(self, split: Split, number: int, rows: list[tuple[Any, ...]]) -> Piece:
        columns = [pa.array(c, type=f.type) for c, f in zip(zip(*rows), SCHEMA)]
        table = pa.Table.from_arrays(columns, schema=SCHEMA)
        path = Path(self.folder) / f"{split.key}-p{number:06d}.parquet"
        if split.end is not None and table["byte"].null_count < len(table):
            table = _name_lines(table, split, byte_lines(split.path, table["byte"].drop_null().to_pylist()))
        with atomic_file(path, force=True) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=PIECE_ROWS)
        faulty = sum(row[4] is not None for row in rows)
        residues = sum(row[1] for row in rows if row[4] is None)
        return Piece(split.file, split.number, number, str(path), len(rows), residues, faulty)


def _name_lines(table: pa.Table, split: Split, lines: dict[int, int]) -> pa.Table:
    def place(byte: int) -> str:
        return f"{split.name}:{lines[byte]}:" if byte in lines else f"{split.name} (byte {byte}):"

    errors = [
        error if byte is None or error is None else error.replace(f"{split.name}@:", place(byte), 1)
        for error, byte in zip(table["error"].to_pylist(), table["byte"].to_pylist())
    ]
    return table.set_column(SCHEMA.get_field_index("error"), "error", pa.array(errors, pa.string()))


def byte_lines(path: str, offsets: list[int]) -> dict[int, int]:
    """One-based lines of these bytes of a file, by reading it up to the last of them once. Bytes beyond the
    first 256 MiB are left out: counting from the start for every piece of a large file would be quadratic."""
    found: dict[int, int] = {}
    line, at = 1, 0
    offsets = [o for o in offsets if o <= LINES_COUNTED_BYTES]
    if not offsets:
        return found
    with open_bytes(path) as handle:
        for offset in sorted(set(offsets)):
            while at < offset:
                chunk = handle.read(min(1 << 20, offset - at))
                if not chunk:
                    break
                line += chunk.count(b"\n")
                at += len(chunk)
            found[offset] = line
    return found

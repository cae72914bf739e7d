"""Vectors by content: a file of rows that only grows, and an SQLite index that says which rows are committed.

`add` writes the rows behind the committed ones and syncs them, and then commits their index entries. A process that
is killed before the commit leaves bytes that nothing points to; the next `add` writes over them. Several processes
may share a store: SQLite's lock lets one write at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bioseq.errors import OutputError, VectorStoreError
from bioseq.output import sync_folder
from bioseq.vectors.settings import VectorSettings

_ASKED = 500  # keys of one SELECT
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS settings (text TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS entries (place INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL,"
    " start INTEGER NOT NULL, count INTEGER NOT NULL, crc INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS names (place INTEGER NOT NULL, name TEXT NOT NULL, PRIMARY KEY (place, name))"
    " WITHOUT ROWID",
)


def sequence_key(sequence: str) -> bytes:
    """The key of a sequence as the model reads it (folded, other letters replaced)."""
    return hashlib.sha256(sequence.encode()).digest()


class VectorStore:
    """The vectors in the folder `path`, in the order in which they were added: the place of a vector is its row.

    With `settings` the store is made if it is not there, and must have been made with equal ones. Raises
    `VectorStoreError` for a folder without a store, and for other settings.
    """

    def __init__(self, path: str | Path, settings: VectorSettings | None = None):
        self.path = Path(path)
        self._index, self._rows = self.path / "index.sqlite", self.path / "vectors.bin"
        if settings is None and not self._index.is_file():
            raise VectorStoreError(
                f"{self.path} is not a vector store.", hint="Make one with: bioseq vectors add STORE FASTA"
            )
        if settings is not None:
            self._make(settings)
        with self._open() as db:
            made = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'settings'").fetchone()
            row = made and db.execute("SELECT text FROM settings").fetchone()
        if not row:  # killed while it was made
            raise VectorStoreError(f"{self.path} holds no settings.", hint="Add to it, or delete the folder.")
        self.settings = VectorSettings.from_json(row[0])
        if settings is not None:
            self.settings.check_same(settings, self.path)
        self._dtype = np.dtype(self.settings.stored).newbyteorder("<")
        self._row_bytes = self.settings.width * self._dtype.itemsize

    def _make(self, settings: VectorSettings) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        with self._open() as db:
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'settings'").fetchone():
                return
            with _writing(db):
                for statement in _SCHEMA:
                    db.execute(statement)
                if db.execute("SELECT 1 FROM settings").fetchone() is None:
                    db.execute("INSERT INTO settings VALUES (?)", (settings.to_json(),))

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(self._index, timeout=60, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous=FULL")
                yield db
        except sqlite3.OperationalError as error:
            raise _unwritable(self.path, error) from error
        except sqlite3.DatabaseError as error:
            raise VectorStoreError(
                f"{self._index}: {error}.", hint="The file is damaged. Delete the folder and add again."
            ) from error

    def __len__(self) -> int:
        with self._open() as db:
            return int(db.execute("SELECT COALESCE(MAX(place) + 1, 0) FROM entries").fetchone()[0])

    # ------------------------------------------------------------------ write

    def add(
        self, keys: Sequence[bytes], arrays: Sequence[np.ndarray], names: Sequence[str] | None = None
    ) -> int:
        """Commit the vectors whose keys are new, all or none, and say how many. A pooled vector is [D] (one row), one
        per residue [L, D]. `names` go with the keys, new or known."""
        with self._open() as db, _writing(db):
            known = self._entries(db, keys)
            place, start = db.execute(
                "SELECT COALESCE(MAX(place) + 1, 0), COALESCE(MAX(start + count), 0) FROM entries"
            ).fetchone()
            new: dict[bytes, tuple[int, int, int, int]] = {}
            parts: list[bytes] = []
            end = start
            for key, array in zip(keys, arrays, strict=True):
                if key in known or key in new:
                    continue
                data = self._bytes(array)
                new[key] = (place + len(new), end, len(data) // self._row_bytes, zlib.crc32(data))
                parts.append(data)
                end += len(data) // self._row_bytes
            if parts:
                self._append(start, parts)
            db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", [
                (at, key, first, count, crc) for key, (at, first, count, crc) in new.items()
            ])  # fmt: skip
            if names is not None:
                places = {key: entry[0] for key, entry in (known | new).items()}
                rows = [(places[key], name) for key, name in zip(keys, names, strict=True)]
                db.executemany("INSERT OR IGNORE INTO names VALUES (?, ?)", rows)
        return len(new)

    def _bytes(self, array: np.ndarray) -> bytes:
        if array.shape[-1] != self.settings.width or (array.ndim > 1 and not self.settings.per_residue):
            raise VectorStoreError(
                f"{self.path} takes vectors of {self.settings.width} numbers; the shape is {array.shape}.",
                code="vectors.shape",
            )
        return np.ascontiguousarray(array, dtype=self._dtype).tobytes()

    def _append(self, start: int, parts: Iterable[bytes]) -> None:
        try:
            fd = os.open(self._rows, os.O_RDWR | os.O_CREAT, 0o644)
            with os.fdopen(fd, "r+b") as handle:
                handle.seek(start * self._row_bytes)
                handle.writelines(parts)
                handle.flush()
                os.fsync(handle.fileno())
            if start == 0:
                sync_folder(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    # ------------------------------------------------------------------- read

    def _entries(
        self, db: sqlite3.Connection, keys: Sequence[bytes]
    ) -> dict[bytes, tuple[int, int, int, int]]:
        found: dict[bytes, tuple[int, int, int, int]] = {}
        for at in range(0, len(keys), _ASKED):
            some = keys[at : at + _ASKED]
            marks = ",".join("?" * len(some))
            sql = f"SELECT key, place, start, count, crc FROM entries WHERE key IN ({marks})"
            found |= {row[0]: row[1:] for row in db.execute(sql, some)}
        return found

    def get(self, keys: Sequence[bytes], *, before: int | None = None) -> list[np.ndarray | None]:
        """Copies of the vectors, None for keys that are not there, or not at a place before `before`. Raises
        `VectorStoreError` for damaged ones."""
        with self._open() as db:
            entries = self._entries(db, keys)
        if before is not None:
            entries = {key: entry for key, entry in entries.items() if entry[0] < before}
        rows = self._map() if entries else np.empty((0, self.settings.width), self._dtype)
        out: list[np.ndarray | None] = []
        for key in keys:
            if key not in entries:
                out.append(None)
                continue
            place, start, count, crc = entries[key]
            array = np.array(rows[start : start + count])
            if len(array) != count or zlib.crc32(array.tobytes()) != crc:
                raise self._damaged(place)
            array = array.astype(self._dtype.newbyteorder("="), copy=False)
            out.append(array if self.settings.per_residue else array[0])
        return out

    def places(self, keys: Sequence[bytes]) -> list[int | None]:
        with self._open() as db:
            entries = self._entries(db, keys)
        return [entries[key][0] if key in entries else None for key in keys]

    def names(self, places: Iterable[int]) -> list[tuple[str, ...]]:
        """The ids that came with each place, sorted; one vector may have several."""
        with self._open() as db:
            sql = "SELECT name FROM names WHERE place = ? ORDER BY name"
            return [tuple(row[0] for row in db.execute(sql, (int(p),))) for p in places]

    def matrix(self) -> np.ndarray:
        """Memory-mapped [N, D] by place. Raises `VectorStoreError` for a store of residues."""
        if self.settings.per_residue:
            raise VectorStoreError(
                f"{self.path} holds vectors of residues, which are not searched.",
                hint="Add the proteins to a store without --per-residue.",
            )
        n = len(self)
        rows = self._map() if n else np.empty((0, self.settings.width), self._dtype)
        if len(rows) < n:
            raise self._damaged(len(rows))
        return rows[:n]

    def _map(self) -> np.ndarray:
        try:
            rows = os.path.getsize(self._rows) // self._row_bytes
            return np.memmap(self._rows, dtype=self._dtype, mode="r", shape=(rows, self.settings.width))
        except (OSError, ValueError):
            raise self._damaged(0) from None

    def check(self) -> int:
        """Read every vector and compare its checksum; the number of vectors. Raises `VectorStoreError`."""
        with self._open() as db:
            entries = db.execute("SELECT place, start, count, crc FROM entries ORDER BY place").fetchall()
        rows = self._map() if entries else np.empty((0, self.settings.width), self._dtype)
        for place, start, count, crc in entries:
            part = rows[start : start + count]
            if len(part) != count or zlib.crc32(part.tobytes()) != crc:
                raise self._damaged(place)
        return len(entries)

    def _damaged(self, place: int) -> VectorStoreError:
        return VectorStoreError(
            f"{self.path}: vector {place} is damaged or missing.",
            code="vectors.damaged",
            hint="Delete the folder and add the proteins again.",
        )


@contextlib.contextmanager
def _writing(db: sqlite3.Connection) -> Iterator[None]:
    """One transaction that is the only writer from its beginning."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _unwritable(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(
        f"cannot use {path}: {reason}.",
        hint="Check the free space and the permissions, or name another folder.",
    )

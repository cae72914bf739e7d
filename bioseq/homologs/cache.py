"""Searches that were made before, by content: reference set, settings and sequence, as hashes.

One SQLite file, so an interrupted write leaves nothing and several processes share it. It is bounded: the entries
used longest ago go first. It holds residues of the reference set, and of a query only its hash. A cache that
cannot be read or written is passed over: it saves time and is never needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sqlite3
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bioseq.homologs.hits import Hits, encode, no_hits
from bioseq.homologs.mmseqs import find_mmseqs, mmseqs_version
from bioseq.homologs.reference import ReferenceSet, homologs_home
from bioseq.homologs.settings import SearchSettings

_FORMAT = "2"  # of entries; those of another one are not found
_ARRAYS = ("keys", "bits", "e_values", "identity", "coverage", "aligned")


class SearchCache:
    """Hits by content in the file `path` (default: under `$BIOSEQ_HOME`), at most `limit` bytes of them."""

    def __init__(self, path: str | Path | None = None, *, limit: int = 1 << 30):
        self.path = Path(path) if path is not None else homologs_home() / "searches.sqlite"
        self.limit = limit

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        if not self.path.exists():
            self.path.touch(mode=0o600)
        with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS hits (key BLOB PRIMARY KEY, used REAL, size INTEGER, data BLOB)"
            )
            db.execute("CREATE INDEX IF NOT EXISTS by_use ON hits (used)")
            yield db

    def _key(self, reference: ReferenceSet, settings: SearchSettings, query: str) -> bytes:
        program = find_mmseqs()
        version = mmseqs_version(program) if program else ""
        text = "\n".join((_FORMAT, version, reference.hash, settings.hash, query))
        return hashlib.sha256(text.encode()).digest()

    def get(self, reference: ReferenceSet, settings: SearchSettings, query: str) -> Hits | None:
        """What an equal search found, or None."""
        key = self._key(reference, settings, query)
        try:
            with self._open() as db:
                row = db.execute("SELECT data FROM hits WHERE key = ?", (key,)).fetchone()
                if row is None:
                    return None
                with db:
                    db.execute("UPDATE hits SET used = ? WHERE key = ?", (time.time(), key))
            return _unpack(row[0], query)
        except (sqlite3.Error, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None  # the search is made again, and its answer takes the place of a damaged one

    def put(self, reference: ReferenceSet, settings: SearchSettings, hits: Sequence[Hits]) -> None:
        """Keep these answers, and drop the oldest ones over the limit."""
        now = time.time()
        try:
            rows = [(self._key(reference, settings, h.query), now, data) for h in hits for data in [_pack(h)]]
            with self._open() as db, db:
                db.executemany(
                    "INSERT OR REPLACE INTO hits VALUES (?, ?, ?, ?)", [(k, u, len(d), d) for k, u, d in rows]
                )
                total = db.execute("SELECT COALESCE(SUM(size), 0) FROM hits").fetchone()[0]
                if total > self.limit:
                    over, gone = total - self.limit, []
                    for key, size in db.execute("SELECT key, size FROM hits ORDER BY used, key"):
                        if over <= 0:
                            break
                        gone.append((key,))
                        over -= size
                    db.executemany("DELETE FROM hits WHERE key = ?", gone)
        except (sqlite3.Error, OSError):
            return


def _pack(hits: Hits) -> bytes:
    out = io.BytesIO()
    ids = np.array(list(hits.ids), dtype=np.str_)
    np.savez_compressed(out, ids=ids, **{name: getattr(hits, name) for name in _ARRAYS})
    return out.getvalue()


def _unpack(data: bytes, query: str) -> Hits:
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        if found["aligned"].shape[1] != len(encode(query)):
            raise ValueError("another query's hits")
        arrays = {name: found[name] for name in _ARRAYS}
        return replace(no_hits(query), ids=tuple(found["ids"].tolist()), **arrays)

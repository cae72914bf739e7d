"""Second pass: exact deduplication, and the cutting of distinct sequences into numbered shards.

Concept: a *unit* is one distinct sequence, numbered by its first row. A *shard* is a run of consecutive units
whose tokens sum to a fixed bound. Both follow from the library alone, so that a shard holds the same
sequences, in the same order, on any number of workers and after any kill.

Memory: the table of hashes is grouped by DuckDB, which spills to the run folder; sequences stream through one
piece at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bioseq.errors import BioseqError, OutputError
from bioseq.inference.batching import SPECIAL_TOKENS
from bioseq.output import atomic_file
from serving.screening.folder import write_json
from serving.screening.source import Piece

MAX_SHARDS = 4096
MAP_POINTS = 2000
DATABASE_MEMORY = "1GiB"

SHARD_SCHEMA = pa.schema([("unit", pa.int64()), ("sequence", pa.string())])


@dataclass(frozen=True)
class Plan:
    """What the library is, and its shards. `stride`: every so many-th unit's embedding goes to the map."""

    records: int
    faulty: int
    residues: int
    units: int
    tokens: int
    stride: int
    shards: list[dict[str, Any]]  # shard, file, units, tokens


def connect(work: Path, *, threads: int = 1, memory: str = DATABASE_MEMORY) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that spills under `work` and never reads a user's configuration."""
    spill = work / "spill"
    spill.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(
        config={
            "memory_limit": memory,
            "threads": threads,
            "temp_directory": str(spill),
            "preserve_insertion_order": True,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
    )
    connection.execute("SET enable_progress_bar = false")  # it writes to standard output
    return connection


def stream(database: duckdb.DuckDBPyConnection, sql: str, rows: int) -> pa.RecordBatchReader:
    """Record batches of a query's answer as they come."""
    return database.sql(sql).to_arrow_reader(rows)


def literal(text: str | Path) -> str:
    """A SQL text literal."""
    return "'" + str(text).replace("'", "''") + "'"


def explain(error: duckdb.Error, what: str) -> BioseqError:
    """DuckDB's error as ours. Its text may quote values, so only its kind is passed on."""
    text = str(error)
    if "No space left" in text or ("disk" in text.lower() and "full" in text.lower()):
        return OutputError(
            f"{what}: no space left.", hint="Free some and give the same command again: the run resumes."
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return OutputError(
            f"{what}: the database ran out of memory.", hint="Free some memory and start it again."
        )
    return OutputError(
        f"{what} failed ({type(error).__name__}).", hint="Give the same command again: the run resumes."
    )


def piece_table(pieces: Iterable[Piece]) -> pa.Table:
    """(filename, base): the row of each piece's first record. Pieces must come in order."""
    names, bases, at = [], [], 0
    for piece in pieces:
        names.append(piece.path)
        bases.append(at)
        at += piece.rows
    return pa.table({"filename": pa.array(names, pa.string()), "base": pa.array(bases, pa.int64())})


def indexed(database: duckdb.DuckDBPyConnection, pieces: list[Piece]) -> None:
    """Creates the view `indexed`: the index with its global `row`."""
    database.register("pieces", piece_table(pieces))
    database.execute("CREATE TABLE bases AS SELECT * FROM pieces")
    files = ", ".join(literal(p.path) for p in pieces)
    database.execute(
        f"CREATE VIEW indexed AS SELECT i.* EXCLUDE (filename, file_row_number), base + file_row_number AS row "
        f"FROM read_parquet([{files}], filename = true, file_row_number = true) i JOIN bases USING (filename)"
    )


def deduplicate(work: Path, pieces: list[Piece]) -> Path:
    """Writes distinct.parquet (row of the first record, hash), by row; a unit's number is its place there."""
    path = work / "distinct.parquet"
    if path.is_file():
        return path
    try:
        with connect(work) as database, atomic_file(path) as temporary:
            indexed(database, pieces)
            database.execute(
                "COPY (SELECT min(row) AS row, hash_high, hash_low FROM indexed WHERE error IS NULL "
                f"GROUP BY hash_high, hash_low ORDER BY row) TO {literal(temporary)} (FORMAT parquet)"
            )
    except duckdb.Error as error:
        raise explain(error, "deduplication") from None
    return path


def _sequences(pieces: list[Piece], distinct: Path) -> Iterator[tuple[list[str], int]]:
    """Distinct sequences in order, a piece at a time, with the number of the first."""
    firsts = pq.ParquetFile(distinct).iter_batches(batch_size=65_536, columns=["row"])
    waiting = np.empty(0, dtype=np.int64)
    base, unit, dry = 0, 0, False
    for piece in pieces:
        end = base + piece.rows
        while not dry and (len(waiting) == 0 or waiting[-1] < end):
            batch = next(firsts, None)
            if batch is None:
                dry = True
            else:
                waiting = np.concatenate([waiting, batch.column(0).to_numpy()])
        count = int(np.searchsorted(waiting, end))
        places, waiting = waiting[:count] - base, waiting[count:]
        if count:
            column = pq.read_table(piece.path, columns=["sequence"])["sequence"]
            yield column.take(pa.array(places)).to_pylist(), unit
        base, unit = end, unit + count
    if len(waiting) or (not dry and next(firsts, None) is not None):
        raise OutputError(
            "the index and its distinct sequences disagree.", hint="Start again with a new run folder."
        )


def cut_shards(work: Path, pieces: list[Piece], *, budget: int, keep_all: bool) -> Plan:
    """Writes shards/*.parquet and returns the plan, also as plan.json, which marks them whole.

    A shard has 16 to 64 batches of `budget` tokens: few in a small library, so that all workers have some, many
    in a large one, where each costs a file; more where that would make over 4,096 shards.
    """
    distinct = deduplicate(work, pieces)
    units = pq.ParquetFile(distinct).metadata.num_rows
    total = sum(p.residues for p in pieces) + SPECIAL_TOKENS * units
    bound = max(16 * budget, min(64 * budget, total // 256), -(-total // MAX_SHARDS))
    folder = work / "shards"
    folder.mkdir(exist_ok=True)
    shards: list[dict[str, Any]] = []
    held: list[str] = []
    tokens, first = 0, 0

    def write() -> None:
        nonlocal held, tokens, first
        table = pa.table(
            {
                "unit": pa.array(range(first, first + len(held)), pa.int64()),
                "sequence": pa.array(held, pa.string()),
            },
            schema=SHARD_SCHEMA,
        )
        name = f"shard-{len(shards):06d}.parquet"
        with atomic_file(folder / name, force=True) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        shards.append({"shard": len(shards), "file": name, "units": len(held), "tokens": tokens})
        first, held, tokens = first + len(held), [], 0

    for sequences, _ in _sequences(pieces, distinct):
        for sequence in sequences:
            size = len(sequence) + SPECIAL_TOKENS
            if held and (tokens + size > bound or len(held) >= bound // 8):
                write()
            held.append(sequence)
            tokens += size
    if held:
        write()
    plan = Plan(
        records=sum(p.rows for p in pieces),
        faulty=sum(p.faulty for p in pieces),
        residues=sum(p.residues for p in pieces),
        units=units,
        tokens=sum(s["tokens"] for s in shards),
        stride=1 if keep_all else max(1, units // MAP_POINTS),
        shards=shards,
    )
    if sum(s["units"] for s in shards) != units:
        raise OutputError(
            "sequences were lost between the index and the shards.", hint="Start again with a new folder."
        )
    write_json(work / "plan.json", plan.__dict__)
    return plan


def plan_run(work: str, pieces: list[dict[str, Any]], budget: int, keep_all: bool) -> dict[str, Any]:
    """`cut_shards` on plain data, for a Ray task: the database's memory is then not the driver's."""
    done = Path(work) / "plan.json"
    if not done.is_file():
        cut_shards(Path(work), [Piece(**p) for p in pieces], budget=budget, keep_all=keep_all)
    return {"plan": str(done), "pid": os.getpid()}

"""From parts to the table: every record once, by row, with what was computed for its sequence.

Runs in DuckDB under a fixed memory limit and spills to the run folder; what comes out is cut into files and
row groups of fixed numbers of rows, so that equal results are equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bioseq.errors import OutputError
from bioseq.expressions.expression import quote
from bioseq.output import atomic_folder
from serving.screening.source import Piece
from serving.screening.tables.columns import OK, QUARANTINED, HeadColumns, table_schema
from serving.screening.units import connect, explain, indexed, literal, stream

FILE_ROWS, GROUP_ROWS = 1 << 20, 1 << 16


def parquet_list(paths: list[Path]) -> str:
    return "[" + ", ".join(literal(p) for p in paths) + "]"


def rechunked(batches: Iterator[pa.RecordBatch], schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows`, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for batch in batches:
        held.append(pa.Table.from_batches([batch]).cast(schema))
        count += batch.num_rows
        while count >= rows:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows).combine_chunks()
            held, count = [whole.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held).combine_chunks()


def write_parts(
    folder: Path,
    batches: Iterator[pa.RecordBatch],
    schema: pa.Schema,
    check: Callable[[pa.Table], None] | None = None,
) -> int:
    """part-000000.parquet and so on in `folder`; returns the number of rows. An empty table is one empty file."""
    written, number, writer = 0, 0, None
    try:
        for table in rechunked(batches, schema, GROUP_ROWS):
            if check is not None:
                check(table)
            if writer is None:
                writer = pq.ParquetWriter(folder / f"part-{number:06d}.parquet", schema, compression="zstd")
            writer.write_table(table, row_group_size=GROUP_ROWS)
            written += table.num_rows
            if written % FILE_ROWS == 0:
                writer.close()
                writer, number = None, number + 1
        if written == 0:
            pq.write_table(schema.empty_table(), folder / "part-000000.parquet", compression="zstd")
    finally:
        if writer is not None:
            writer.close()
    return written


def attach(database: duckdb.DuckDBPyConnection, work: Path, pieces: list[Piece]) -> None:
    """Views `indexed` (records by row) and `units` (unit of each hash)."""
    indexed(database, pieces)
    database.execute(
        "CREATE VIEW units AS SELECT hash_high, hash_low, row AS first, file_row_number AS unit "
        f"FROM read_parquet({literal(work / 'distinct.parquet')}, file_row_number = true)"
    )


def merge(
    work: Path,
    output: Path,
    pieces: list[Piece],
    parts: list[str],
    heads: tuple[HeadColumns, ...],
    *,
    memory: str,
) -> int:
    """Write the folder `output` of all records; returns their number. Raises if one was lost or doubled."""
    schema = table_schema(heads)
    cells = "".join(f", p.{quote(f.name)}" for h in heads for f in h.fields())
    computed = parquet_list([work / "parts" / name for name in parts])
    source = f"LEFT JOIN read_parquet({computed}) p ON p.unit = u.unit" if parts else ""
    if not parts:
        cells = "".join(f", NULL AS {quote(f.name)}" for h in heads for f in h.fields())
    error = "coalesce(i.error, p.error)" if parts else "i.error"
    note = "nullif(concat_ws('; ', i.note, p.note), '')" if parts else "i.note"
    sql = (
        f"SELECT i.id, i.row, i.length, CASE WHEN {error} IS NULL THEN '{OK}' ELSE '{QUARANTINED}' END AS status, "
        f"{error} AS error{cells}, {note} AS notes FROM indexed i "
        f"LEFT JOIN units u ON u.hash_high = i.hash_high AND u.hash_low = i.hash_low {source} ORDER BY i.row"
    )
    expected = 0

    def check(table: pa.Table) -> None:
        nonlocal expected
        rows = table["row"].to_numpy()
        if not np.array_equal(rows, np.arange(expected, expected + len(rows))):
            raise OutputError("records were lost or doubled in the merge.", hint="This is a fault of bioseq.")
        expected += len(rows)

    records = sum(p.rows for p in pieces)
    try:
        with connect(work, memory=memory) as database:
            attach(database, work, pieces)
            with atomic_folder(output, force=True) as temporary:
                reader = stream(database, sql, GROUP_ROWS)
                written = write_parts(temporary, iter(reader), schema, check)
                if written != records:
                    raise OutputError(
                        f"the merge has {written} of {records} records.", hint="This is a fault of bioseq."
                    )
    except duckdb.Error as error_:
        raise explain(error_, "the merge") from None
    return records


def keep_embeddings(
    work: Path, output: Path, pieces: list[Piece], vectors: list[str], width: int, memory: str
) -> None:
    """Write the folder `output`: (row, id, embedding) of every record that has one, by row."""
    schema = pa.schema(
        [("row", pa.int64()), ("id", pa.string()), ("embedding", pa.list_(pa.float32(), width))]
    )
    try:
        with connect(work, memory=memory) as database, atomic_folder(output, force=True) as temporary:
            attach(database, work, pieces)
            if vectors:
                files = parquet_list([work / "vectors" / v for v in vectors])
                reader = stream(
                    database,
                    f"SELECT i.row, i.id, v.embedding FROM indexed i JOIN units u USING (hash_high, hash_low) "
                    f"JOIN read_parquet({files}) v USING (unit) ORDER BY i.row",
                    GROUP_ROWS,
                )
                write_parts(temporary, iter(reader), schema)
            else:
                write_parts(temporary, iter(()), schema)
    except duckdb.Error as error:
        raise explain(error, "keeping embeddings") from None

"""From the table to the hits: filter, front, rank, diversify, cut. Out of core, one thread, equal bytes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bioseq.expressions.expression import compile_expression, quote
from bioseq.output import atomic_file
from bioseq.specs.screen import ScreenSpec
from serving.screening.folder import file_sha256
from serving.screening.source import Piece
from serving.screening.tables.columns import OK, HeadColumns, kinds, table_schema
from serving.screening.tables.merge import attach, parquet_list
from serving.screening.units import MAP_POINTS, connect, explain, stream

BLOCK = 4096
_FRONT = 512  # points compared with as many at once


@dataclass(frozen=True)
class Selection:
    """Compiled once, before anything runs, so that a bad expression costs no computing.

    `scores` are SQL, higher is better: with one the score is its value, with several the mean of the ranks.
    """

    where: str
    scores: tuple[str, ...]
    front: tuple[str, ...]
    explained: str


def compile_selection(spec: ScreenSpec, heads: tuple[HeadColumns, ...]) -> Selection:
    """Raises `ExpressionError` for a fault in --where, --rank or --pareto."""
    columns, names = kinds(heads), tuple(h.name for h in heads)
    where = "TRUE"
    if spec.where:
        where, _ = compile_expression(spec.where, columns, heads=names)
    defaults = tuple(s for head in heads for s in head.scores())
    if spec.rank:
        scores: tuple[str, ...] = (compile_expression(spec.rank, columns, heads=names, kind="number")[0],)
        explained = f"{spec.rank}, descending"
    else:
        scores = defaults
        said = [_words(h) for h in heads if h.scores()]
        explained = (
            "row"
            if not said
            else (
                said[0]
                if len(scores) == 1
                else f"the mean of its places (1 is best) by {' and by '.join(said)}"
            )
        )
    if spec.pareto == ("*",):
        front = defaults
    else:
        front = tuple(compile_expression(p, columns, heads=names, kind="number")[0] for p in spec.pareto)
    return Selection(where, scores, front, explained)


def _words(head: HeadColumns) -> str:
    if head.task == "regression":
        return " and ".join(f"{t}.value" for t in head.targets)
    return f"the highest label probability of {head.name}"


def _finite(sql: str) -> str:
    return f"CASE WHEN isfinite({sql}) THEN {sql} END"


def rank(database: duckdb.DuckDBPyConnection, table: str, selection: Selection) -> None:
    """Creates `ranked` (row, score, rank): records that pass, best first, ties by row, undefined last."""
    passing = f"FROM {table} WHERE status = '{OK}' AND ({selection.where})"
    scores = [_finite(s) for s in selection.scores]
    if len(scores) <= 1:
        score = scores[0] if scores else "CAST(NULL AS DOUBLE)"
        database.execute(f"CREATE TABLE scored AS SELECT row, {score} AS score, -({score}) AS key {passing}")
    else:
        places = [f"rank() OVER (ORDER BY {s} DESC NULLS LAST)" for s in scores]
        mean = f"CAST({' + '.join(places)} AS DOUBLE) / {len(scores)}"
        database.execute(f"CREATE TABLE scored AS SELECT row, {mean} AS score, {mean} AS key {passing}")
    database.execute(
        "CREATE TABLE ranked AS SELECT row, score, row_number() OVER (ORDER BY key ASC NULLS LAST, row) AS rank "
        "FROM scored"
    )


def pareto(database: duckdb.DuckDBPyConnection, table: str, objectives: tuple[str, ...]) -> None:
    """Keep in `ranked` only records that no other one equals or beats in every objective and beats in one."""
    names = [f"o{i}" for i in range(len(objectives))]
    columns = ", ".join(f"{_finite(o)} AS {n}" for o, n in zip(objectives, names))
    order = ", ".join(f"{n} DESC" for n in names)
    reader = stream(
        database,
        f"SELECT * FROM (SELECT row, {columns} FROM {table} SEMI JOIN ranked USING (row)) "
        f"WHERE {' AND '.join(f'{n} IS NOT NULL' for n in names)} ORDER BY {order}, row",
        BLOCK,
    )
    # In this order a record can only be dominated by an earlier one, so the front only grows. Equal records are all kept.
    front = np.empty((0, len(names)))
    kept: list[np.ndarray] = []
    for batch in reader:
        rows = batch.column(0).to_numpy()
        points = np.column_stack([batch.column(i + 1).to_numpy() for i in range(len(names))])
        free = ~_dominated(points, front)
        rows, points = rows[free], points[free]
        free = ~_dominated(points, points)
        front = np.concatenate([front, points[free]])
        kept.append(rows[free])
    database.register(
        "front_rows", pa.table({"row": pa.array(np.concatenate([np.empty(0, np.int64), *kept]), pa.int64())})
    )
    _keep(database, "front_rows")


def _dominated(points: np.ndarray, by: np.ndarray) -> np.ndarray:
    """bool [N]: which of `points` [N, K] some row of `by` [M, K] equals or beats everywhere and beats somewhere."""
    out = np.zeros(len(points), dtype=bool)
    for start in range(0, len(by), _FRONT):
        some = by[None, start : start + _FRONT]
        left = np.flatnonzero(~out)
        for part in np.array_split(left, max(1, len(left) // _FRONT)):
            mine = points[part, None]
            out[part] = np.any(np.all(some >= mine, axis=2) & np.any(some > mine, axis=2), axis=1)
    return out


def _keep(database: duckdb.DuckDBPyConnection, rows: str) -> None:
    database.execute(
        "CREATE OR REPLACE TABLE ranked AS SELECT row, score, row_number() OVER (ORDER BY rank) AS rank "
        f"FROM ranked SEMI JOIN {rows} USING (row)"
    )


def library_mean(vectors: list[Path]) -> np.ndarray:
    """Mean embedding of the distinct sequences, float64 [D], summed in unit order."""
    total, count = np.float64(0.0), 0
    for path in vectors:
        block = np.stack(pq.read_table(path)["embedding"].to_numpy(zero_copy_only=False)).astype(np.float64)
        total, count = total + block.sum(axis=0), count + len(block)
    return np.asarray(total / max(count, 1))


def diversify(
    database: duckdb.DuckDBPyConnection, vectors: list[Path], most: int, threshold: float, top: int | None
) -> None:
    """Keep in `ranked` at most `most` records a neighbourhood, walking from the best down.

    A record whose cosine to a kept leader is at least `threshold` belongs to the most similar one's
    neighbourhood; any other becomes a leader. Embeddings are centred on the library's mean first, since raw
    protein embeddings all point the same way. Time grows with records times leaders; the walk ends at `top`.
    """
    mean = library_mean(vectors)
    database.execute(
        "CREATE TABLE row_units AS SELECT i.row, u.unit FROM indexed i JOIN units u USING (hash_high, hash_low) "
        "SEMI JOIN ranked ON ranked.row = i.row"
    )
    reader = stream(
        database,
        f"SELECT r.row, v.embedding FROM ranked r JOIN row_units USING (row) "
        f"JOIN read_parquet({parquet_list(vectors)}) v USING (unit) ORDER BY r.rank",
        BLOCK,
    )
    leaders = np.empty((0, len(mean)), dtype=np.float32)
    members: list[int] = []
    kept: list[int] = []
    for batch in reader:
        rows = batch.column(0).to_pylist()
        block = np.stack(batch.column(1).to_numpy(zero_copy_only=False)).astype(np.float64) - mean
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        block = (block / np.where(norms > 0, norms, 1)).astype(np.float32)
        fresh: list[np.ndarray] = []
        old = block @ leaders.T
        for i, row in enumerate(rows):
            best, cosine = (int(np.argmax(old[i])), float(np.max(old[i]))) if len(leaders) else (-1, -2.0)
            if fresh:
                new = np.stack(fresh) @ block[i]
                if float(new.max()) > cosine:
                    best, cosine = len(leaders) + int(np.argmax(new)), float(new.max())
            if cosine < threshold:
                fresh.append(block[i])
                members.append(1)
            elif members[best] < most:
                members[best] += 1
            else:
                continue
            kept.append(row)
            if top is not None and len(kept) >= top:
                break
        if fresh:
            leaders = np.vstack([leaders, np.stack(fresh)])
        if top is not None and len(kept) >= top:
            break
    reader.close()
    database.register("diverse_rows", pa.table({"row": pa.array(kept, pa.int64())}))
    _keep(database, "diverse_rows")


# ------------------------------------------------------------------------------------------------- the files


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ";".join(value)
    return repr(value) if isinstance(value, float) else str(value)


def write_hits_csv(
    database: duckdb.DuckDBPyConnection, path: Path, table: str, heads: tuple[HeadColumns, ...]
) -> None:
    """One line a hit, best first: the table's columns but those of per-residue heads, then score and rank."""
    residues = {f.name for h in heads if h.residues for f in h.fields() if "ood" not in f.name}
    names = [f.name for f in table_schema(heads) if f.name not in residues]
    reader = stream(
        database,
        f"SELECT {', '.join('t.' + quote(n) for n in names)}, r.score, r.rank FROM {table} t JOIN ranked r USING (row) "
        "ORDER BY r.rank",
        BLOCK,
    )
    with (
        atomic_file(path, force=True) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as handle,
    ):
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([*names, "score", "rank"])
        for batch in reader:
            writer.writerows(zip(*([_text(v) for v in column.to_pylist()] for column in batch.columns)))


def write_hits_fasta(database: duckdb.DuckDBPyConnection, path: Path) -> None:
    """The hits' sequences as they were computed (folded, translated), best first, 80 residues a line."""
    reader = stream(
        database,
        "SELECT i.id, i.row, r.rank, i.sequence FROM indexed i JOIN ranked r USING (row) ORDER BY r.rank",
        BLOCK,
    )
    with atomic_file(path, force=True) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for batch in reader:
            for name, row, place, sequence in zip(*(c.to_pylist() for c in batch.columns)):
                handle.write(f">{name} row={row} rank={place}\n")
                handle.writelines(sequence[k : k + 80] + "\n" for k in range(0, len(sequence), 80))


def write_map(database: duckdb.DuckDBPyConnection, path: Path, vectors: list[Path], units: int) -> None:
    """map.parquet: (row, id, x, y, score) of about 2,000 distinct sequences, by the two first principal
    components of their embeddings; `score` of those that passed --where."""
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("id", pa.string()),
            ("x", pa.float64()),
            ("y", pa.float64()),
            ("score", pa.float64()),
        ]
    )
    table = schema.empty_table()
    if vectors:
        stride = max(1, units // MAP_POINTS)
        found = stream(
            database,
            f"SELECT u.first AS row, i.id, r.score, v.embedding FROM read_parquet({parquet_list(vectors)}) v "
            f"JOIN units u USING (unit) JOIN indexed i ON i.row = u.first LEFT JOIN ranked r ON r.row = u.first "
            f"WHERE v.unit % {stride} = 0 ORDER BY u.first",
            BLOCK,
        ).read_all()
        points = np.stack(found["embedding"].to_numpy()).astype(np.float64)
        points -= points.mean(axis=0)
        _, _, axes = np.linalg.svd(points, full_matrices=False)
        flat = points @ axes[:2].T
        flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
        flat *= np.where(flat[np.abs(flat).argmax(axis=0), [0, 1]] < 0, -1, 1)  # a component's sign is free
        table = pa.table([found["row"], found["id"], flat[:, 0], flat[:, 1], found["score"]], schema=schema)
    with atomic_file(path, force=True) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def select(
    spec: ScreenSpec,
    selection: Selection,
    heads: tuple[HeadColumns, ...],
    output: Path,
    work: Path,
    pieces: list[Piece],
    vectors: list[str],
    units: int,
    *,
    memory: str,
) -> dict[str, Any]:
    """Write hits.csv, hits.fasta and map.parquet; returns counts and hashes for the summary."""
    paths = [work / "vectors" / v for v in vectors]
    try:
        with connect(work, memory=memory) as database:
            attach(database, work, pieces)
            database.execute(
                f"CREATE VIEW predictions AS SELECT * FROM read_parquet({parquet_list(sorted(predictions(output)))})"
            )
            rank(database, "predictions", selection)
            counts = {"passed": _count(database)}
            write_map(database, output / "map.parquet", paths, units)
            if selection.front:
                pareto(database, "predictions", selection.front)
                counts["front"] = _count(database)
            if spec.diverse and paths:
                diversify(database, paths, spec.diverse, spec.diverse_threshold, spec.top)
                counts["diverse"] = _count(database)
            if spec.top is not None:
                database.execute(f"DELETE FROM ranked WHERE rank > {int(spec.top)}")
            counts["hits"] = _count(database)
            write_hits_csv(database, output / "hits.csv", "predictions", heads)
            write_hits_fasta(database, output / "hits.fasta")
    except duckdb.Error as error:
        raise explain(error, "ranking") from None
    files = {n: file_sha256(output / n) for n in ("hits.csv", "hits.fasta")}
    return {"counts": counts, "sha256": files}


def predictions(output: Path) -> Iterator[Path]:
    return (output / "predictions").glob("part-*.parquet")


def _count(database: duckdb.DuckDBPyConnection) -> int:
    return int(database.execute("SELECT count(*) FROM ranked").fetchall()[0][0])

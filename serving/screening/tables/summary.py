"""Counts and distributions of a finished table: summary.json. No times, no host: equal runs, equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb

from bioseq.expressions.expression import quote
from serving.screening.tables.columns import OK, QUARANTINED, HeadColumns
from serving.screening.tables.merge import parquet_list
from serving.screening.tables.select import predictions
from serving.screening.units import Plan, connect, explain

BINS = 40


def distribution(database: duckdb.DuckDBPyConnection, column: str) -> dict[str, Any] | None:
    """Count, least, greatest, mean, quartiles and a histogram of a numeric column over the records that are ok."""
    name = quote(column)
    n, low, high, mean = database.execute(
        f"SELECT count({name}), min({name}), max({name}), avg({name}) FROM predictions WHERE status = '{OK}'"
    ).fetchall()[0]
    if not n:
        return None
    width = (high - low) / BINS or 1.0
    bins = [0] * BINS
    for place, count in database.execute(
        f"SELECT least(CAST(floor(({name} - {low!r}) / {width!r}) AS INTEGER), {BINS - 1}) AS bin, count(*) "
        f"FROM predictions WHERE status = '{OK}' AND {name} IS NOT NULL GROUP BY bin"
    ).fetchall():
        bins[place] = count
    return {"count": n, "min": low, "max": high, "mean": mean, "bins": bins}


def _counts(database: duckdb.DuckDBPyConnection, sql: str) -> dict[str, int]:
    return {str(k): int(v) for k, v in database.execute(sql).fetchall()}


def summarise(
    work: Path,
    output: Path,
    heads: tuple[HeadColumns, ...],
    plan: Plan,
    selected: dict[str, Any],
    memory: str,
) -> dict[str, Any]:
    """What summary.json holds, but for the manifest's part."""
    try:
        with connect(work, memory=memory) as database:
            database.execute(
                f"CREATE VIEW predictions AS SELECT * FROM read_parquet({parquet_list(sorted(predictions(output)))})"
            )
            status = _counts(database, "SELECT status, count(*) FROM predictions GROUP BY status")
            reasons = _counts(
                database,
                f"SELECT split_part(error, ':', 1) AS code, count(*) FROM predictions "
                f"WHERE status = '{QUARANTINED}' GROUP BY code ORDER BY code",
            )
            examples = [
                {"row": row, "id": name, "error": error}
                for row, name, error in database.execute(
                    f"SELECT row, id, error FROM predictions WHERE status = '{QUARANTINED}' ORDER BY row LIMIT 20"
                ).fetchall()
            ]
            noted = int(
                database.execute("SELECT count(*) FROM predictions WHERE notes IS NOT NULL").fetchall()[0][0]
            )
            tables: dict[str, Any] = {}
            for head in heads:
                kinds = head.kinds()
                columns = {c: distribution(database, c) for c in kinds if kinds[c] == "number"}
                labels: dict[str, int] = {}
                if head.task == "multilabel":
                    labels = _counts(
                        database,
                        f"SELECT label, count(*) FROM (SELECT unnest({quote(head.name + '.value')}) AS label "
                        f"FROM predictions WHERE status = '{OK}') GROUP BY label ORDER BY label",
                    )
                elif kinds.get(f"{head.name}.value") == "text":
                    value = quote(head.name + ".value")
                    labels = _counts(
                        database,
                        f"SELECT {value}, count(*) FROM predictions WHERE status = '{OK}' GROUP BY 1 ORDER BY 1",
                    )
                tables[head.name] = {"columns": columns, "labels": labels}
            length = distribution(database, "length")
    except duckdb.Error as error:
        raise explain(error, "the summary") from None
    return {
        "records": plan.records,
        "distinct": plan.units,
        "duplicates": plan.records - plan.faulty - plan.units,
        "residues": plan.residues,
        "tokens": plan.tokens,
        "ok": status.get(OK, 0),
        "quarantined": status.get(QUARANTINED, 0),
        "reasons": reasons,
        "examples": examples,
        "noted": noted,
        "length": length,
        "heads": tables,
        **selected,
    }

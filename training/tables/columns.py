"""Tables as text: CSV, TSV or Parquet, plain or compressed, with every fault named by its rows."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bioseq.compression import DAMAGED, unpack
from bioseq.errors import TableError


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked. Raises `TableError`."""
    try:
        return unpack(path.read_bytes())
    except DAMAGED as error:
        raise TableError(f"{path}: the compressed file breaks off or is damaged ({error}).") from None
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror or error}.") from None


def file_hash(*paths: str | Path | None) -> str:
    """SHA-256 over the (unpacked) bytes of the files."""
    digest = hashlib.sha256()
    for path in paths:
        if path is not None:
            digest.update(hashlib.sha256(read_bytes(Path(path))).digest())
    return f"sha256:{digest.hexdigest()}"


def read_columns(path: str | Path) -> dict[str, list[str]]:
    """A table's columns as text, missing cells as "". Raises `TableError`."""
    path = Path(path)
    data = read_bytes(path)
    if data[:4] == b"PAR1":
        import pyarrow.parquet as pq

        table = pq.read_table(io.BytesIO(data))
        return {
            name: ["" if v is None else str(v) for v in table.column(name).to_pylist()]
            for name in table.column_names
        }
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TableError(
            f"{path} is not UTF-8 text.", hint="Save it as CSV in UTF-8, or as Parquet."
        ) from None
    head = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text), delimiter="\t" if head.count("\t") > head.count(",") else ",")
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise TableError(f"{path} is no CSV: {error}.") from None
    if len(lines) < 2:
        raise TableError(f"{path} has no data rows.", hint="The first line names the columns.")
    header = [h.strip() for h in lines[0]]
    twice = sorted({h for h in header if header.count(h) > 1})
    if twice:
        raise TableError(f"{path}: column {', '.join(twice)} is there twice.")
    bad = [i for i, line in enumerate(lines[1:], 1) if len(line) != len(header)]
    if bad:
        raise TableError(f"{path}: the header has {len(header)} columns, not so", rows=bad)
    return {name: [line[j].strip() for line in lines[1:]] for j, name in enumerate(header)}


def column_of(columns: dict[str, list[str]], name: str, path: object) -> list[str]:
    if name not in columns:
        raise TableError(f"{path}: there is no column {name!r}.", hint=f"It has {', '.join(columns)}.")
    return columns[name]


def fail(what: str, rows: Sequence[int] | np.ndarray, hint: str | None = None) -> None:
    """Raise `TableError` if there are rows at fault."""
    if len(rows):
        raise TableError(what, rows=[int(r) for r in rows], hint=hint)

"""A user's own alignment, onto the columns of the query: a3m, a2m, aligned FASTA or Stockholm, packed or not.

In a3m and a2m lower case and dots are residues between the columns; they are left out, as `Hits` keeps none. An
aligned FASTA or Stockholm file has a column wherever the query has a residue.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bioseq.compression import DAMAGED, unpack
from bioseq.errors import AlignmentError
from bioseq.homologs.database import CODES, GAP, LETTERS, OTHER
from bioseq.homologs.hits import Hits, encode
from bioseq.homologs.search import clean
from bioseq.sequences.fasta import Record

_BETWEEN = re.compile(rb"[a-z.]+")
_ALLOWED = re.compile(rb"[A-Za-z.*\-]+")
_ROW = CODES.copy()
_ROW[[ord("-"), ord(".")]] = GAP
_NO_HINT = "Give an a3m, a2m, aligned FASTA or Stockholm file of this query."


def read_alignment(path: str | Path, query: str | Record) -> Hits:
    """The other rows of an alignment as `Hits` of `query`, in the file's order; bits and E-values are NaN.

    The query's row may stand anywhere; X in the query agrees with any residue. Rows without a residue on the
    query's columns are left out. Raises `AlignmentError` (cannot be read, empty, no row is the query, unequal
    columns, characters that are not residues) and `SequenceError`.
    """
    return parse_alignment(alignment_bytes(path), query, str(path))


def alignment_bytes(path: str | Path) -> bytes:
    """The text of an alignment's file, unpacked. Raises `AlignmentError`."""
    try:
        return unpack(Path(path).read_bytes())
    except OSError as error:
        raise AlignmentError(
            f"{path} cannot be read: {error.strerror or error}.", hint="Check the path."
        ) from error
    except DAMAGED as error:
        raise AlignmentError(f"{path}: the packed file breaks off or is damaged.") from error


def parse_alignment(data: bytes, query: str | Record, name: str = "the alignment") -> Hits:
    """As `read_alignment`, of an alignment's text."""
    wanted, rows = clean(query), _rows(name, data)
    if not rows:
        raise AlignmentError(f"{name}: there is no sequence in it.", hint=_NO_HINT)
    columns = [_BETWEEN.sub(b"", text) for _, text in rows]
    match = len({len(c) for c in columns}) == 1
    at = _query_row(columns, wanted) if match else None
    if at is None and len({len(text) for _, text in rows}) == 1:  # aligned FASTA: every character is a column
        columns = [text.upper().replace(b".", b"-") for _, text in rows]
        at = _query_row(columns, wanted)
    elif not match:
        raise _unequal(name, rows, columns)
    if at is None:
        raise _other_query(name, rows, wanted)
    kept = np.flatnonzero(np.frombuffer(columns[at], np.uint8) != ord("-"))
    matrix = np.empty((len(rows), len(kept)), dtype=np.uint8)
    for n, column in enumerate(columns):
        matrix[n] = _ROW[np.frombuffer(column, np.uint8)][kept]
    others = (np.arange(len(rows)) != at) & (matrix < GAP).any(1)
    aligned, own = matrix[others], encode(wanted)
    both = (aligned < OTHER) & (own < OTHER)
    nothing = np.full(len(aligned), np.nan)
    return Hits(
        wanted,
        tuple(rows[i][0] for i in np.flatnonzero(others)),
        np.flatnonzero(others),
        nothing,
        nothing,
        (both & (aligned == own)).sum(1) / np.maximum(both.sum(1), 1),
        (aligned < GAP).sum(1) / len(wanted),
        aligned,
    )


def most_rows(text: str) -> int:
    """How many rows an alignment's text may have at most, without reading it: the lines of a Stockholm file."""
    stockholm = text.removeprefix("\ufeff").lstrip().startswith("# STOCKHOLM")
    return text.count("\n") + 1 if stockholm else text.count("\n>") + 1


def write_a3m(hits: Hits, path: str | Path, *, query_id: str = "query") -> None:
    """The query and its hits as an a3m without insertions; hidden residues are X."""
    table = np.frombuffer((LETTERS + "X-").encode(), np.uint8)
    with open(path, "wb") as out:
        out.write(f">{query_id}\n{hits.query}\n".encode())
        for name, row in zip(hits.ids, hits.aligned, strict=True):
            out.write(b">%s\n%s\n" % (name.encode(), table[row].tobytes()))


def _rows(name: str, data: bytes) -> list[tuple[str, bytes]]:
    data = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    rows = list(_stockholm(name, data) if data.startswith(b"# STOCKHOLM") else _fasta(name, data))
    for number, (_, text) in enumerate(rows, 1):
        if not _ALLOWED.fullmatch(text):
            what = "has characters that are not residues or gaps" if text else "is empty"
            raise AlignmentError(f"{name}: row {number} {what}.", hint=_NO_HINT)
    return rows


def _fasta(name: str, text: bytes) -> Iterator[tuple[str, bytes]]:
    if text.startswith(b"#A3M#"):
        text = text.partition(b"\n")[2].lstrip()
    if text and not text.startswith(b">"):
        raise AlignmentError(f"{name} is neither FASTA-like nor Stockholm.", hint=_NO_HINT)
    for block in re.split(rb"(?:^|\n)>", text)[1:]:
        header, _, body = block.partition(b"\n")
        words = header.split()
        if words and words[0].startswith((b"ss_", b"sa_")):  # secondary structure rows of HHsuite
            continue
        yield (words[0].decode("utf-8", "replace") if words else ""), b"".join(body.split()).rstrip(b"*")


def _stockholm(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    from Bio import AlignIO

    try:
        for row in AlignIO.read(io.StringIO(data.decode()), "stockholm"):
            yield row.id, str(row.seq).upper().replace(".", "-").encode()
    except Exception as error:  # on bad input Biopython also raises TypeError, AssertionError and others
        told = str(error)
        if "length" in told.lower():
            raise AlignmentError(
                f"{name}: its rows have unequal columns.", hint="Align them again."
            ) from None
        if "no records" in told.lower():
            return
        raise AlignmentError(f"{name} is not one whole Stockholm alignment.", hint=_NO_HINT) from None


def _query_row(columns: list[bytes], wanted: str) -> int | None:
    """The first row that is the query."""
    own = np.frombuffer(wanted.encode(), np.uint8)
    hidden = own == ord("X")
    for n, column in enumerate(columns):
        row = np.frombuffer(column, np.uint8)
        row = row[row != ord("-")]
        if len(row) == len(own) and ((row == own) | hidden).all():
            return n
    return None


def _unequal(name: str, rows: list[tuple[str, bytes]], columns: list[bytes]) -> AlignmentError:
    first = len(columns[0])
    at = next(i for i, c in enumerate(columns) if len(c) != first)
    return AlignmentError(
        f"{name}: row {at + 1} ({rows[at][0]!r}) has {len(columns[at])} columns and the first row {first}.",
        hint="Every row of an alignment has the same number of columns; align them again.",
    )


def _other_query(name: str, rows: list[tuple[str, bytes]], wanted: str) -> AlignmentError:
    length = len(re.sub(rb"[.\-]", b"", rows[0][1]))
    return AlignmentError(
        f"{name}: none of its {len(rows)} rows is the query of {len(wanted)} residues (the first has {length}).",
        code="alignment.other_query",
        hint="Give the alignment of this very sequence, or the sequence of the alignment.",
    )

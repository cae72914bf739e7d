"""What a search finds: `Hits` of one query, and how MMseqs2's result files become them.

Axes: N hits, L query residues. `aligned` says which residue of hit n stands on column l of the query: a code of
`LETTERS`, `OTHER` for a residue that is none of the twenty, `GAP` where the hit has none. Residues that the hit
has between two columns are not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bioseq.homologs.database import CODES, GAP, OTHER, Database

NOWHERE = 65_535  # above the longest sequence that a reference set takes


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """The homologs of one query, best first. `query` has X where a residue was hidden.

    ids: reference ids; keys int64 [N]: their places in the reference set; bits, e_values, identity (equal residues
    among aligned pairs of known residues), coverage (aligned residues over L) float64 [N]; aligned uint8 [N, L];
    places uint16 [N, L], zero-based places in the hits of the aligned residues, NOWHERE for a gap: kept on request.
    """

    query: str
    ids: tuple[str, ...]
    keys: np.ndarray
    bits: np.ndarray
    e_values: np.ndarray
    identity: np.ndarray
    coverage: np.ndarray
    aligned: np.ndarray
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, which: np.ndarray) -> Hits:
        """The hits that a boolean mask or integer places [n] name."""
        places = np.arange(len(self))[which]
        return Hits(
            self.query,
            tuple(self.ids[i] for i in places),
            self.keys[places],
            self.bits[places],
            self.e_values[places],
            self.identity[places],
            self.coverage[places],
            self.aligned[places],
            None if self.places is None else self.places[places],
        )


def no_hits(query: str, *, places: bool = False) -> Hits:
    empty = np.zeros(0)
    return Hits(
        query,
        (),
        np.zeros(0, np.int64),
        empty,
        empty,
        empty,
        empty,
        np.zeros((0, len(query)), np.uint8),
        np.zeros((0, len(query)), np.uint16) if places else None,
    )


@dataclass(slots=True)
class Rows:
    """Raw rows of a result file, by query; `lines` are kept so that a part of them can be written again."""

    owner: np.ndarray  # int64 [R] number of the query
    keys: np.ndarray
    bits: np.ndarray
    e_values: np.ndarray
    identity: np.ndarray
    coverage: np.ndarray
    lines: list[bytes]
    column: np.ndarray  # int64 [P] aligned pairs: column of the query,
    residue: np.ndarray  # uint8 [P] residue of the hit,
    place: np.ndarray  # int64 [P] its place in the hit,
    start: np.ndarray  # int64 [R + 1] and which pairs are whose


def read_rows(path: Path, queries: list[np.ndarray], database: Database) -> Rows:
    """Read the result database `path` of `mmseqs search -a`; `queries` are the codes of query 0, 1, ...

    A line is: key, bits, identity, E-value, query start, end and length, target start, end and length, CIGAR.
    """
    files = [path] if path.exists() else sorted(path.parent.glob(f"{path.name}.[0-9]*"), key=_number)
    data = b"".join(f.read_bytes() for f in files)
    index = np.array(Path(f"{path}.index").read_bytes().split(), dtype=np.int64).reshape(-1, 3)
    owner, lines = [], []
    for key, offset, length in index.tolist():
        found = data[offset : offset + length - 1].splitlines()
        lines += found
        owner += [key] * len(found)
    cells = [line.split(b"\t") for line in lines]

    def numbers(column: int, dtype: type) -> np.ndarray:
        return np.array([c[column] for c in cells], dtype="S").astype(dtype) if cells else np.zeros(0, dtype)

    owners, keys = np.array(owner, dtype=np.int64), numbers(0, np.int64)
    q_start, t_start = numbers(4, np.int64), numbers(7, np.int64)
    pair_row, pair_q, pair_t = _pairs([c[10] for c in cells], q_start, t_start)
    residue = np.asarray(database.codes[database.offsets[keys][pair_row] + pair_t])
    flat = np.concatenate([*queries, np.zeros(0, np.uint8)])
    lengths = np.array([len(q) for q in queries], dtype=np.int64)
    at = np.concatenate([[0], np.cumsum(lengths)])
    own = flat[at[owners][pair_row] + pair_q]
    known = (own < OTHER) & (residue < OTHER)
    count = len(cells)
    compared = np.bincount(pair_row[known], minlength=count)
    equal = np.bincount(pair_row[known & (own == residue)], minlength=count)
    per_row = np.bincount(pair_row, minlength=count)
    return Rows(
        owners,
        keys,
        numbers(1, np.float64),
        numbers(3, np.float64),
        equal / np.maximum(compared, 1),
        per_row / np.maximum(lengths[owners], 1),
        lines,
        pair_q,
        residue,
        pair_t,
        np.concatenate([[0], np.cumsum(per_row)]),
    )


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _pairs(
    cigars: list[bytes], q_start: np.ndarray, t_start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, query place, target place) of every aligned pair, int64 [P], rows ascending. I is a residue of the
    query alone, D one of the target alone."""
    raw = np.frombuffer(b"".join(cigars), dtype=np.uint8)
    ends = np.flatnonzero(raw > ord("9"))
    begins = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    run = np.zeros(len(ends), dtype=np.int64)
    for digit in range(int((ends - begins).max(initial=0))):
        place = ends - 1 - digit
        run += np.where(place >= begins, (raw[place].astype(np.int64) - ord("0")) * 10**digit, 0)
    last = np.cumsum([len(c) for c in cigars], dtype=np.int64)
    row = np.searchsorted(last, ends, side="right")
    kind = raw[ends]
    q_step, t_step = np.where(kind != ord("D"), run, 0), np.where(kind != ord("I"), run, 0)
    first = np.searchsorted(row, np.arange(len(cigars)))
    q_at, t_at = _before(q_step, row, first, q_start), _before(t_step, row, first, t_start)
    match = kind == ord("M")
    counts = run[match]
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return (
        np.repeat(row[match], counts),
        np.repeat(q_at[match], counts) + inside,
        np.repeat(t_at[match], counts) + inside,
    )


def _before(step: np.ndarray, row: np.ndarray, first: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Where each run begins: its row's start and the runs before it in that row."""
    total = np.cumsum(step) - step
    return start[row] + total - total[first][row] if len(step) else step


def to_hits(
    rows: Rows, queries: list[str], keep: np.ndarray, database: Database, limit: int, *, places: bool = False
) -> list[Hits]:
    """The kept rows as `Hits` of each query, best first; equal scores go by place in the reference set."""
    order = np.flatnonzero(keep)
    order = order[np.lexsort((rows.keys[order], rows.e_values[order], -rows.bits[order], rows.owner[order]))]
    owner = rows.owner[order]
    cuts = np.searchsorted(owner, np.arange(len(queries) + 1))
    out = []
    for i, query in enumerate(queries):
        chosen = order[cuts[i] : cuts[i + 1]][:limit]
        if not len(chosen):
            out.append(no_hits(query, places=places))
            continue
        aligned = np.full((len(chosen), len(query)), GAP, dtype=np.uint8)
        at = np.full(aligned.shape, NOWHERE, dtype=np.uint16) if places else None
        for n, r in enumerate(chosen.tolist()):
            a, b = rows.start[r], rows.start[r + 1]
            aligned[n, rows.column[a:b]] = rows.residue[a:b]
            if at is not None:
                at[n, rows.column[a:b]] = rows.place[a:b]
        out.append(
            Hits(
                query,
                tuple(database.id(k) for k in rows.keys[chosen].tolist()),
                rows.keys[chosen],
                rows.bits[chosen],
                rows.e_values[chosen],
                rows.identity[chosen],
                rows.coverage[chosen],
                aligned,
                at,
            )
        )
    return out


def write_rows(path: Path, rows: Rows, keep: np.ndarray, count: int, like: Path) -> None:
    """The kept rows as a result database of `count` queries that MMseqs2 reads; its type is that of `like`."""
    chosen: list[list[bytes]] = [[] for _ in range(count)]
    for r in np.flatnonzero(keep).tolist():
        chosen[int(rows.owner[r])].append(rows.lines[r] + b"\n")
    offset, index = 0, []
    with open(path, "wb") as handle:
        for key, lines in enumerate(chosen):
            entry = b"".join(lines) + b"\0"
            handle.write(entry)
            index.append(f"{key}\t{offset}\t{len(entry)}\n")
            offset += len(entry)
    Path(f"{path}.index").write_text("".join(index))
    Path(f"{path}.dbtype").write_bytes(Path(f"{like}.dbtype").read_bytes())


def encode(sequence: str) -> np.ndarray:
    """Codes of `LETTERS`, uint8 [L]; anything else is `OTHER`."""
    return CODES[np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)]

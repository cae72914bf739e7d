"""ledger.csv: the events of a campaign's wells, append-only.

One row an event. A batch of rows ends with a `commit` row that carries a chained SHA-256 of everything before it: rows
after the last commit are what a kill left and are ignored; any other difference is an edit by hand and is refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bioseq.errors import InputError

EVENTS = ("proposed", "ordered", "measured", "failed", "abandoned", "excluded")
COLUMNS = ("event", "round", "well", "variant", "source")


@dataclass(frozen=True)
class Event:
    """`values` and `errors` are by objective column; `source` is the hash of the results file, or of the proposal."""

    event: str
    round: int
    well: str
    variant: str
    source: str = ""
    values: tuple[float | None, ...] = ()
    errors: tuple[float | None, ...] = ()


class Ledger:
    def __init__(self, path: Path, objectives: Sequence[str]):
        self.path, self.objectives = path, list(objectives)
        self.header = [*COLUMNS, *self.objectives, *(f"{o}_se" for o in self.objectives)]

    def read(self) -> tuple[list[Event], int, str]:
        """The committed events, the length in bytes that holds them, and the last hash. Raises `InputError`."""
        data = self.path.read_bytes() if self.path.exists() else b""
        events: list[Event] = []
        pending: list[Event] = []
        whole, chain, at = 0, "", 0
        lines = data.splitlines(keepends=True)
        if lines and lines[0].decode("utf-8", "replace").rstrip("\n") != ",".join(self.header):
            if not lines[0].endswith(b"\n"):
                return [], 0, ""
            raise self._edited(1)
        for number, line in enumerate(lines, 1):
            at += len(line)
            if number == 1 or not line.endswith(b"\n"):
                continue
            row = next(csv.reader([line.decode("utf-8", "replace").rstrip("\n")]), [])
            if len(row) == len(self.header) and row[0] in EVENTS:
                pending.append(self._event(row, number))
            elif len(row) == len(self.header) and row[0] == "commit":
                if row[4] != self._hash(chain, data[whole : at - len(line)]):
                    raise self._edited(number)
                whole, chain = at, row[4]
                events += pending
                pending = []
            else:
                raise self._edited(number)
        return events, whole, chain

    def append(self, events: Sequence[Event]) -> None:
        """All of `events` or none; synced to disk."""
        _, whole, chain = self.read()
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        if not whole:
            out.writerow(self.header)
        empty: tuple[None, ...] = (None,) * len(self.objectives)
        for e in events:
            cells = [
                "" if v is None else repr(float(v)) for v in (*(e.values or empty), *(e.errors or empty))
            ]
            out.writerow([e.event, e.round, e.well, e.variant, e.source, *cells])
        body = text.getvalue().encode()
        seal = (
            ",".join(["commit", "", "", "", self._hash(chain, body), *[""] * 2 * len(self.objectives)]) + "\n"
        )
        with open(self.path, "r+b" if self.path.exists() else "w+b") as handle:
            handle.truncate(whole)
            handle.seek(whole)
            handle.write(body)
            handle.flush()
            os.fsync(handle.fileno())
            handle.write(seal.encode())
            handle.flush()
            os.fsync(handle.fileno())

    def _event(self, row: list[str], number: int) -> Event:
        n = len(self.objectives)
        try:
            cells = [float(c) if c else None for c in row[5:]]
            return Event(row[0], int(row[1]), row[2], row[3], row[4], tuple(cells[:n]), tuple(cells[n:]))
        except ValueError:
            raise self._edited(number) from None

    @staticmethod
    def _hash(chain: str, body: bytes) -> str:
        return hashlib.sha256(chain.encode() + body).hexdigest()

    def _edited(self, line: int) -> InputError:
        return InputError(
            f"{self.path}: line {line}: the ledger was changed by hand.",
            code="campaign.edited",
            hint="Restore the file. To correct a value, ingest a file with --correct.",
        )

"""Results into the ledger: every row is checked before any is taken."""

from __future__ import annotations

import csv
import hashlib
import math
from dataclasses import replace
from pathlib import Path

from bioseq.campaigns.campaign import Campaign
from bioseq.campaigns.ledger import Event
from bioseq.campaigns.state import OPEN, State
from bioseq.errors import MutationError, TableError

FAILED = "failed"


def ingest(
    campaign: Campaign, results: str | Path | bytes, *, round_: int | None = None, correct: bool = False
) -> dict[str, int]:
    """Takes in a CSV file, or its bytes; counts of measured, failed and unproposed wells. Columns: `variant` or `well`,
    one an objective, and optionally `round` (default: `round_`, else the latest), `status` (ok, failed) and a standard
    error `COLUMN_se`; the other columns of a plate are ignored. A row with a well alone is of the variant that was
    proposed there. An empty value is a well without that measurement; a row without any value failed. Rows without a
    well take the open wells of their variant that no other row names, and further ones are wells that were never
    proposed. `correct` replaces values of wells measured before and adds none. Raises `TableError` with lines."""
    with campaign.locked():
        if isinstance(results, bytes):
            return _ingest(campaign, results, "results", round_, correct)
        try:
            data = Path(results).read_bytes()
        except OSError as error:
            raise TableError(f"{results}: {error.strerror}.", hint="Nothing was changed.") from None
        return _ingest(campaign, data, str(results), round_, correct)


def _ingest(campaign: Campaign, data: bytes, path: str, round_: int | None, correct: bool) -> dict[str, int]:
    digest = hashlib.sha256(data).hexdigest()
    state = campaign.state()
    if digest in state.sources:
        raise TableError(f"{path}: this file was ingested before.", hint="Nothing was changed.")
    number = max(state.rounds, 1) if round_ is None else round_
    if not 1 <= number <= max(state.rounds, 1):
        raise TableError(
            f"round {number}; the campaign has rounds 1 to {state.rounds}.",
            hint="See: bioseq campaign status",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TableError(f"{path}: not UTF-8 text.", hint="Save it as CSV in UTF-8.") from None
    reader = csv.DictReader(text.splitlines(), strict=True)
    names = [o.column for o in campaign.objectives]
    try:
        columns = list(reader.fieldnames or [])
        numbered = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise _refused(path, [f"line {reader.line_num + 1}: {error}"]) from None
    known = {"variant", "well", "status", *names, *(f"{n}_se" for n in names), "round"}
    plate = {"kind", "reason", *(f"{n}_{what}" for n in names for what in ("predicted", "low", "high"))}
    faults = [f"line 1: there is no column {c!r}" for c in names if c not in columns]
    if not {"variant", "well"} & set(columns):
        faults.append("line 1: there is no column 'variant' or 'well'")
    faults += [f"line 1: column {c!r} is not known" for c in columns if c not in known | plate]
    if len(set(columns)) < len(columns):
        faults.append("line 1: a column is given twice")
    if faults:
        raise _refused(path, faults)
    rows = []
    seen: dict[tuple[int, str], int] = {}
    for line, row in numbered:
        found = _row(campaign, state, row, f"line {line}", number, names, correct, faults)
        if found is None:
            continue
        if found.well:
            at = (found.round, found.well)
            if at in seen:
                faults.append(
                    f"line {line}, column 'well': {found.well} was given in line {seen[at]} already"
                )
            seen[at] = line
        rows.append((line, replace(found, source=digest)))
    # wells that a row names are taken; the others of a variant go to its rows without a well, in their order
    free: dict[tuple[int, str], list[str]] = {}
    for wanted in (OPEN, ("measured", FAILED) if correct else ()):
        for (r, well), e in state.wells.items():
            if e.event in wanted and (r, well) not in seen:
                free.setdefault((r, e.variant), []).append(well)
    extra = sum(w.startswith("+") for _, w in state.wells)
    events: list[Event] = []
    again = unproposed = 0
    known_values = {(e.variant, e.values) for e in state.wells.values() if e.event == "measured"}
    for line, event in rows:
        left = free.get((event.round, event.variant), [])
        if not event.well and left:
            event = replace(event, well=left.pop(0))
        elif not event.well and correct:
            faults.append(
                f"line {line}: round {event.round} has no other well of {event.variant} to correct; name round and well"
            )
        elif not event.well:
            extra, unproposed = extra + 1, unproposed + 1
            again += (event.variant, event.values) in known_values
            event = replace(event, well=f"+{extra}")
        events.append(event)
    if events and again == len(events):
        faults.append("every row is a measurement that was taken in before; name their wells if they are new")
    if not events and not faults:
        faults.append("line 2: there are no rows")
    taken = [e for e in events if e.event == "measured"]
    if taken and not faults:
        empty_ones = [n for i, n in enumerate(names) if all(e.values[i] is None for e in taken)]
        faults += [f"column {n!r}: the objective has no value in any row" for n in empty_ones]
    if faults:
        raise _refused(path, faults)
    campaign.record(number, {f"results-{digest[:12]}.csv": text}, events)
    failures = sum(e.event == FAILED for e in events)
    return {"measured": len(events) - failures, "failed": failures, "unproposed": unproposed}


def _row(
    campaign: Campaign,
    state: State,
    row: dict[str, str],
    where: str,
    number: int,
    names: list[str],
    correct: bool,
    faults: list[str],
) -> Event | None:
    """The event of a row, its well empty where the row names none; what is wrong with it goes to `faults`."""
    if None in row or None in row.values():
        faults.append(f"{where}: {'more' if None in row else 'fewer'} cells than the header has")
        return None
    given = (row.get("round") or "").strip()
    if given and not (given.isascii() and given.isdigit() and 1 <= int(given) <= max(state.rounds, 1)):
        faults.append(
            f"{where}, column 'round': {given[:20]!r}; rounds 1 to {max(state.rounds, 1)} are there"
        )
        return None
    number = int(given) if given else number
    well = (row.get("well") or "").strip().upper()
    before = state.wells.get((number, well))
    if well and before is None:
        faults.append(f"{where}, column 'well': round {number} has no well {well}")
        return None
    written = (row.get("variant") or "").strip()
    if before is not None and not written:
        written = before.variant
    try:
        variant = campaign.space.read(written)
    except MutationError as error:
        faults.append(f"{where}, column 'variant': {error.message}")
        return None
    name = str(variant)
    if not campaign.space.holds(variant):
        faults.append(f"{where}, column 'variant': {name} is outside the campaign's space")
        return None
    values = tuple(_number(row[n], f"{where}, column {n!r}", faults) for n in names)
    errors = tuple(
        _number(row.get(f"{n}_se") or "", f"{where}, column '{n}_se'", faults, positive=True) for n in names
    )
    status = (row.get("status") or "").strip().lower()
    if status not in ("", "ok", FAILED):
        faults.append(f"{where}, column 'status': {status!r}; write ok or failed")
    failed = all(v is None for v in values)
    if status == FAILED and not failed:
        faults.append(f"{where}, column 'status': a failed well with a value; leave out one of them")
    if before is not None:
        if before.variant != name:
            faults.append(f"{where}, column 'variant': well {well} holds {before.variant}, not {name}")
        elif before.event not in OPEN and not correct:
            faults.append(
                f"{where}, column 'well': {well} is {before.event} already; pass --correct to replace it"
            )
    empty = (None,) * len(names)
    kind = FAILED if failed else "measured"
    return Event(kind, number, well, name, "", *((empty, empty) if failed else (values, errors)))


def _number(cell: str, where: str, faults: list[str], *, positive: bool = False) -> float | None:
    if not cell.strip():
        return None
    try:
        value = float("" if "_" in cell else cell)  # Python reads 1_5 as 15
    except ValueError:
        faults.append(f"{where}: {cell.strip()[:20]!r} is not a number")
        return None
    if not math.isfinite(value) or (positive and value < 0):
        faults.append(f"{where}: {cell.strip()[:20]!r} is not allowed")
        return None
    return value


def _refused(path: str, faults: list[str]) -> TableError:
    more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
    return TableError(
        f"{path}: {'; '.join(f.rstrip('.') for f in faults[:10])}{more}.", hint="Nothing was taken in."
    )

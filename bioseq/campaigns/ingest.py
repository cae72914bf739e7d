"""Results into the ledger: every row is checked before any is taken."""

from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path

from bioseq.campaigns.campaign import Campaign
from bioseq.campaigns.ledger import Event
from bioseq.campaigns.state import OPEN
from bioseq.errors import MutationError, TableError

FAILED = "failed"


def ingest(
    campaign: Campaign, path: str | Path, *, round_: int | None = None, correct: bool = False
) -> dict[str, int]:
    """Counts of measured, failed and unproposed wells. Columns: `variant`, one an objective, and optionally `well`,
    `status` (ok, failed) and a standard error `COLUMN_se`. An empty value is a well without that measurement; a row
    without any value failed. `correct` replaces values of wells measured before. Raises `TableError` with lines."""
    with campaign.locked():
        return _ingest(campaign, Path(path), round_, correct)


def _ingest(campaign: Campaign, path: Path, round_: int | None, correct: bool) -> dict[str, int]:
    data = path.read_bytes()
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
    columns = reader.fieldnames or []
    names = [o.column for o in campaign.objectives]
    known = {"variant", "well", "status", *names, *(f"{n}_se" for n in names), "kind", "round", "reason"}
    faults = [f"line 1: there is no column {c!r}" for c in ("variant", *names) if c not in columns]
    faults += [f"line 1: column {c!r} is not known" for c in columns if c not in known]
    if len(set(columns)) < len(columns):
        faults.append("line 1: a column is given twice")
    if faults:
        raise _refused(path, faults)
    open_wells: dict[str, list[str]] = {}
    for (r, well), e in state.wells.items():
        if r == number and e.event in OPEN:
            open_wells.setdefault(e.variant, []).append(well)
    events: list[Event] = []
    seen: dict[str, int] = {}
    extra = sum(w.startswith("+") for _, w in state.wells)
    unproposed = 0
    for row in reader:
        where = f"line {reader.line_num}"
        if None in row or None in row.values():
            faults.append(f"{where}: {'more' if None in row else 'fewer'} cells than the header has")
            continue
        try:
            variant = campaign.space.read(row["variant"])
        except MutationError as error:
            faults.append(f"{where}, column 'variant': {error.message}")
            continue
        name, well = str(variant), (row.get("well") or "").strip().upper()
        if not campaign.space.holds(variant):
            faults.append(f"{where}, column 'variant': {name} is outside the campaign's space")
            continue
        values, errors = [], []
        for n in names:
            values.append(_number(row[n], f"{where}, column {n!r}", faults))
            errors.append(
                _number(row.get(f"{n}_se") or "", f"{where}, column '{n}_se'", faults, positive=True)
            )
        status = (row.get("status") or "").strip().lower()
        if status not in ("", "ok", FAILED):
            faults.append(f"{where}, column 'status': {status!r}; write ok or failed")
        failed = status == FAILED or all(v is None for v in values)
        if well:
            if well in seen:
                faults.append(f"{where}, column 'well': {well} was given in line {seen[well]} already")
            seen[well] = reader.line_num
            before = state.wells.get((number, well))
            if before is None:
                faults.append(f"{where}, column 'well': round {number} has no well {well}")
            elif before.variant != name:
                faults.append(f"{where}, column 'variant': well {well} holds {before.variant}, not {name}")
            elif before.event not in OPEN and not correct:
                faults.append(
                    f"{where}, column 'well': {well} is {before.event} already; pass --correct to replace it"
                )
        elif open_wells.get(name):
            well = open_wells[name].pop(0)
        elif correct and (
            own := [w for (r, w), e in state.wells.items() if r == number and e.variant == name]
        ):
            well = own[0]
        else:
            extra, unproposed = extra + 1, unproposed + 1
            well = f"+{extra}"
        kind = FAILED if failed else "measured"
        empty = (None,) * len(names)
        events.append(
            Event(
                kind,
                number,
                well,
                name,
                digest,
                *((empty, empty) if failed else (tuple(values), tuple(errors))),
            )
        )
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


def _number(cell: str, where: str, faults: list[str], *, positive: bool = False) -> float | None:
    if not cell.strip():
        return None
    try:
        value = float(cell)
    except ValueError:
        faults.append(f"{where}: {cell.strip()[:20]!r} is not a number")
        return None
    if not math.isfinite(value) or (positive and value < 0):
        faults.append(f"{where}: {cell.strip()[:20]!r} is not allowed")
        return None
    return value


def _refused(path: Path, faults: list[str]) -> TableError:
    more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
    return TableError(f"{path}: {'; '.join(faults[:10])}{more}.", hint="Nothing was taken in.")

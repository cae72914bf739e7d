"""Why a hit is a hit: one sentence of what each head says of it, and how far to trust that.

The bounds are the page's: closer than 95 % of the training proteins is inside what a head was trained on, further than
99 % of them is far outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EDGE, FAR = 0.95, 0.99


def reason(row: dict[str, str], heads: Sequence[dict[str, Any]]) -> str:
    """`row` is one of hits.csv, `heads` those of the run's manifest (`name` and `task`). Heads that predict every residue
    have no say in a sentence."""
    said = [_head(row, h["name"], h["task"]) for h in heads if f"{h['name']}.ood_percentile" in row]
    text = "; ".join(s for s in said if s)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _head(row: dict[str, str], name: str, task: str) -> str:
    if task == "per_residue":
        return ""
    title = name.replace("_", " ")
    if task == "regression":
        targets = [k.removesuffix(".value") for k in row if k.startswith(f"{name}.") and k.endswith(".value")]
        what = ", ".join(f"{t.replace('_', ' ')} {_interval(row, t)}" for t in targets)
    else:
        labels = [v for v in (row[f"{name}.value"] or "").split(";") if row.get(f"{name}.{v}")]
        if not labels:  # a binary head's negative, or no label over its threshold
            labels = [row[f"{name}.value"]] if row[f"{name}.value"] else []
        chances = [f"{v} {_percent(row.get(f'{name}.{v}', ''))}".strip() for v in labels]
        what = f"{title}: {', '.join(chances)}" if chances else f"{title}: no label is likely"
    return f"{what} ({_trust(row, name)})"


def _interval(row: dict[str, str], target: str) -> str:
    low, high = row.get(f"{target}.low"), row.get(f"{target}.high")
    bounds = f", {_number(low)} to {_number(high)}" if low and high else ""
    return f"{_number(row[f'{target}.value'])}{bounds}"


def _trust(row: dict[str, str], name: str) -> str:
    place = float(row[f"{name}.ood_percentile"] or "nan")
    if place >= FAR:
        where = "far outside what the head was trained on: an extrapolation"
    elif place >= EDGE:
        where = "at the edge of what the head was trained on"
    else:
        where = "inside what the head was trained on"
    if f"{name}.nearest" not in row:
        return where
    if not row[f"{name}.nearest"]:
        return f"{where}; no homolog there"
    label = row[f"{name}.nearest_label"]
    near = f"nearest homolog there {row[f'{name}.nearest']}, {_percent(row[f'{name}.nearest_identity'])} identical"
    return f"{where}; {near}{f', {label}' if label else ''}"


def _percent(text: str) -> str:
    if text and 0.995 <= float(text) < 1:
        return "over 99%"
    return f"{float(text):.0%}" if text else ""


def _number(text: str | None) -> str:
    return f"{float(text):.4g}" if text else "unknown"

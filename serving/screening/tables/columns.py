"""The table's columns: how a head's prediction becomes cells, and what may be compared and ranked by.

    id row length status error | HEAD.value HEAD.low HEAD.high HEAD.LABEL... HEAD.ood HEAD.ood_percentile | notes

A head that carries its training rows also has HEAD.nearest (an id), HEAD.nearest_identity, HEAD.nearest_coverage,
HEAD.nearest_label, HEAD.homologs (how many training sequences are relatives) and HEAD.homologs_effective.

A regression head of several targets has HEAD.TARGET.value, .low and .high for each. A multilabel head's value
is a list of labels, a per-residue head's a text of length L with the class probabilities, flattened, beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bioseq.errors import BioseqError
from bioseq.expressions.expression import Kind, quote

RECORD_FIELDS = [
    pa.field("id", pa.string()),
    pa.field("row", pa.int64()),
    pa.field("length", pa.int32()),
    pa.field("status", pa.string()),
    pa.field("error", pa.string()),
]
RECORD_KINDS: dict[str, Kind] = {
    "id": "text",
    "row": "number",
    "length": "number",
    "status": "text",
    "error": "text",
}
OK, QUARANTINED = "ok", "quarantined"


@dataclass(frozen=True)
class HeadColumns:
    """One head as the table sees it. `name` is the prefix of its columns."""

    name: str
    task: str
    labels: tuple[str, ...]
    version: int | None = None
    hash: str = ""
    units: Any = None
    per_residue: bool = False
    homologs: bool = False  # whether it names the nearest of its training sequences

    @property
    def residues(self) -> bool:
        return self.per_residue or self.task == "per_residue"

    @property
    def targets(self) -> tuple[str, ...]:
        """Prefixes of the numbers of a regression head: its name, or one for each of several targets."""
        if self.task != "regression":
            return ()
        return (self.name,) if len(self.labels) < 2 else tuple(f"{self.name}.{t}" for t in self.labels)

    def fields(self) -> list[pa.Field]:
        """Arrow fields, in the table's order."""
        number = pa.float64()
        if self.residues:
            cells = [("value", pa.string()), ("probabilities", pa.list_(pa.float32()))]
        elif self.task == "regression":
            cells = [
                (f"{t[len(self.name) + 1 :]}.{k}".strip("."), number)
                for t in self.targets
                for k in ("value", "low", "high")
            ]
        else:
            value = pa.list_(pa.string()) if self.task == "multilabel" else pa.string()
            cells = [("value", value), *((label, number) for label in self.labels)]
        cells += [("ood", number), ("ood_percentile", number)]
        if self.homologs:
            cells += [("nearest", pa.string()), ("nearest_identity", number), ("nearest_coverage", number)]
            cells += [("nearest_label", pa.string()), ("homologs", number), ("homologs_effective", number)]
        return [pa.field(f"{self.name}.{name}", kind) for name, kind in cells]

    def kinds(self) -> dict[str, Kind]:
        """What an expression may do with each column."""
        kinds: dict[str, Kind] = {}
        for field in self.fields():
            if pa.types.is_floating(field.type):
                kinds[field.name] = "number"
            else:
                kinds[field.name] = "opaque" if self.residues or pa.types.is_list(field.type) else "text"
        return kinds

    def scores(self) -> list[str]:
        """SQL of what this head is ranked by by default: a regression's values, else the highest
        label probability. Empty for a per-residue head."""
        if self.residues:
            return []
        if self.task == "regression":
            return [quote(f"{t}.value") for t in self.targets]
        probabilities = [quote(f"{self.name}.{label}") for label in self.labels]
        return [f"greatest({', '.join(probabilities)})" if len(probabilities) > 1 else probabilities[0]]

    def cells(self, prediction: dict[str, Any]) -> dict[str, Any]:
        """Column -> cell of one prediction. Raises `BioseqError` if a number in it is not finite."""
        name, value = self.name, prediction["value"]
        cells: dict[str, Any] = {}
        if self.residues:
            flat = [float(p) for row in prediction["probabilities"] for p in row]
            cells = {f"{name}.value": value, f"{name}.probabilities": flat}
            _finite(flat)
        elif self.task == "regression":
            for target in self.targets:
                key = target[len(name) + 1 :]
                one = value[key] if isinstance(value, dict) else value
                interval = prediction["interval"]
                if isinstance(interval, dict):
                    interval = interval[key]
                low, high = interval if interval is not None else (None, None)
                cells |= {
                    f"{target}.value": _float(one),
                    f"{target}.low": _float(low),
                    f"{target}.high": _float(high),
                }
        else:
            cells[f"{name}.value"] = list(value) if self.task == "multilabel" else str(value)
            for label in self.labels:
                cells[f"{name}.{label}"] = _float(prediction["probabilities"][label])
        cells[f"{name}.ood"] = _float(prediction["ood"])
        cells[f"{name}.ood_percentile"] = _float(prediction["ood_percentile"])
        if self.homologs:
            cells |= {f"{name}.{k}": v for k, v in _evidence(prediction).items()}
        return cells


def _evidence(prediction: dict[str, Any]) -> dict[str, Any]:
    """The nearest training sequence, and how many are relatives."""
    nearest: dict[str, Any] = next(iter(prediction.get("nearest") or []), {})
    found = prediction.get("homologs") or {}
    label = nearest.get("label")
    if isinstance(label, list):
        label = ", ".join(label)
    elif isinstance(label, dict):
        label = ", ".join(f"{k} {v:g}" for k, v in label.items() if v is not None)
    return {
        "nearest": nearest.get("id"),
        "nearest_identity": _float(nearest.get("identity")),
        "nearest_coverage": _float(nearest.get("coverage")),
        "nearest_label": None if label is None else str(label),
        "homologs": _float(found.get("number")),
        "homologs_effective": _float(found.get("effective")),
    }


def _finite(values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise BioseqError("the model's answer is not a finite number.", code="prediction.not_finite")


def _float(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    _finite((number,))
    return number


def part_schema(heads: Sequence[HeadColumns]) -> pa.Schema:
    """Of a shard's part: one row a distinct sequence."""
    fields = [pa.field("unit", pa.int64()), pa.field("error", pa.string()), pa.field("note", pa.string())]
    return pa.schema(fields + [f for head in heads for f in head.fields()])


def table_schema(heads: Sequence[HeadColumns]) -> pa.Schema:
    """Of the merged table: one row a record, by row."""
    return pa.schema(
        RECORD_FIELDS + [f for h in heads for f in h.fields()] + [pa.field("notes", pa.string())]
    )


def kinds(heads: Sequence[HeadColumns]) -> dict[str, Kind]:
    """All columns that expressions may name."""
    return {**RECORD_KINDS, **{k: v for head in heads for k, v in head.kinds().items()}}

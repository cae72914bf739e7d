"""What designs are scored by: columns with their uncertainty, an expression over them, and its lower confidence bound.

Each column has a mean and a standard deviation: none for the zero-shot score and the number of mutations, that of a
campaign's surrogate, that of a head's interval (regression) or of its ensemble (probabilities). The expression is
computed of DRAWS draws of all columns, and the bound is their mean less `caution` standard deviations, so that a column that
counts against a design is bounded from the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bioseq.design.constraints import Constraints
from bioseq.errors import BioseqError, InputError, MissingExtraError, SpecError

if TYPE_CHECKING:
    from bioseq.expressions.expression import Kind
    from bioseq.inference.predictor import Predictor

DRAWS = 16
SURE = 0.9  # share of the draws in which `where` must hold
Columns = dict[str, tuple[np.ndarray, np.ndarray]]


class Source(Protocol):
    """Gives columns, (mean, standard deviation) float64 [N] each, of variants."""

    def columns(self, codes: np.ndarray) -> Columns: ...


class ZeroShot:
    """The sum of the zero-shot scores of the substitutions, float [L, 20], each in the wild type's context."""

    def __init__(self, table: np.ndarray, wild: np.ndarray):
        self.table, self.wild = table, wild

    def columns(self, codes: np.ndarray) -> Columns:
        changed = codes != self.wild
        safe = np.where(changed, codes, 0)
        scores = np.where(changed, self.table[np.arange(len(self.wild)), safe], 0.0).sum(1)
        none = np.zeros(len(codes))
        return {"zero_shot": (scores, none), "mutations": (changed.sum(1).astype(float), none)}


class Heads:
    """Heads of one predictor."""

    def __init__(self, model: Predictor, heads: Sequence[str], constraints: Constraints):
        self.model, self.heads, self.constraints = model, list(heads), constraints

    def columns(self, codes: np.ndarray) -> Columns:
        rows = self.model.predict(
            self.constraints.text(codes), self.heads, members=True, long_sequences="window"
        )
        out: Columns = {}
        for head in self.heads:
            for row in (r[head] for r in rows):
                for name, pair in _numbers(head, row).items():
                    out.setdefault(name, ([], []))  # type: ignore[arg-type]
                    for part, value in zip(out[name], pair):
                        part.append(value)  # type: ignore[attr-defined]
        return {k: (np.array(m, float), np.array(s, float)) for k, (m, s) in out.items()}


def _numbers(head: str, row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Columns as screening names them. Raises `SpecError` for a head per residue."""
    if row["task"] == "per_residue":
        raise SpecError(
            f"{head} predicts every residue; a design is scored by heads of whole proteins.", field="heads"
        )
    found = {f"{head}.ood": (float(row["ood"]), 0.0)}
    if row["task"] == "regression":
        several = isinstance(row["value"], dict)
        values = row["value"] if several else {"": row["value"]}
        for target, value in values.items():
            low, high = row["interval"][target] if several else row["interval"]
            name = f"{head}.{target}.value" if several else f"{head}.value"
            found[name] = (float(value), float(high - low) / (2 * 1.645))  # of 90 %
        return found
    for label, p in row["probabilities"].items():
        spread = np.std([m[label] for m in row.get("members") or [row["probabilities"]]])
        found[f"{head}.{label}"] = (float(p), float(spread))
    return found


class Surrogates:
    """The surrogates of a campaign's objectives, fitted once. They are reached through the entry point
    `bioseq.surrogates`, as the core does not import what fits them."""

    def __init__(self, folder: str | Path, constraints: Constraints):
        from bioseq.campaigns.campaign import Campaign

        self.campaign, self.constraints = Campaign(folder), constraints
        found = list(entry_points(group="bioseq.surrogates", name="campaign"))
        if not found:
            raise MissingExtraError("training", "train")
        self.fitted = found[0].load()(self.campaign)

    def columns(self, codes: np.ndarray) -> Columns:
        near = codes[:, self.campaign.space.sites]
        return {f"campaign.{name}": predict(near) for name, predict in self.fitted.items()}


@dataclass
class Scores:
    """float [N]: the objective's mean, sd and bound (-inf where it is undefined or `where` does not hold)."""

    mean: np.ndarray
    sd: np.ndarray
    bound: np.ndarray
    columns: dict[str, np.ndarray]


@dataclass
class Scorer:
    """Raises `ExpressionError` with the column of the fault."""

    sources: list[Source]
    objective: str
    where: str | None
    heads: Sequence[str]
    caution: float
    wild: np.ndarray
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            import duckdb

            from bioseq.expressions.expression import compile_expression
        except ModuleNotFoundError as error:
            raise MissingExtraError(error.name or "duckdb", "serve") from None
        self.names = list(self._columns(self.wild[None]))
        kinds: dict[str, Kind] = dict.fromkeys(self.names, "number")
        shorts = (*self.heads, "campaign")
        rank, _ = compile_expression(self.objective, kinds, heads=shorts, kind="number")
        keep = "TRUE"
        if self.where is not None:
            keep, _ = compile_expression(self.where, kinds, heads=shorts, kind="truth")
        self.sql = f"SELECT CAST({rank} AS DOUBLE) AS value, ({keep}) AS kept FROM drawn"
        self.database = duckdb.connect(config={"threads": 1})
        grid = (np.arange(DRAWS) + 0.5) / DRAWS
        z = np.sqrt(2) * _erfinv(2 * grid - 1)
        z /= z.std()
        rng = np.random.default_rng(0)
        self.z = {name: z[rng.permutation(DRAWS)] for name in self.names}

    def _columns(self, codes: np.ndarray) -> Columns:
        out: Columns = {}
        for source in self.sources:
            out |= source.columns(codes)
        return out

    def score(self, codes: np.ndarray) -> Scores:
        import pyarrow as pa

        if not len(codes):
            none = np.zeros(0)
            return Scores(none, none, none, dict.fromkeys(self.names, none))
        found = self._columns(codes)
        for name, (mean, _) in found.items():
            if not np.isfinite(mean).all():
                raise BioseqError(f"{name} is not a finite number.", code="prediction.not_finite")
        drawn = {name: (mean + sd * self.z[name][:, None]).reshape(-1) for name, (mean, sd) in found.items()}
        self.database.register("drawn", pa.table(drawn))
        table = self.database.execute(self.sql).fetchnumpy()
        self.database.unregister("drawn")
        value: np.ndarray = np.ma.filled(np.ma.asarray(table["value"], float), np.nan).reshape(DRAWS, -1)
        kept = np.ma.filled(np.ma.asarray(table["kept"]), False).astype(float).reshape(DRAWS, -1)
        defined = np.isfinite(value).all(0)
        value = np.where(np.isfinite(value), value, 0.0)
        mean, sd = value.mean(0), value.std(0)
        bound = np.where(defined & (kept.mean(0) >= SURE), mean - self.caution * sd, -np.inf)
        return Scores(mean, sd, bound, {name: mean for name, (mean, _) in found.items()})


def _erfinv(x: np.ndarray) -> np.ndarray:
    from statistics import NormalDist

    return np.array([NormalDist().inv_cdf((v + 1) / 2) for v in x]) / np.sqrt(2)


def check_sites(campaign_wild: str, wild_type: str) -> None:
    """Raise `InputError` where a campaign is of another protein."""
    if campaign_wild != wild_type:
        raise InputError(
            "the campaign has another wild type.",
            code="design.wild_type",
            hint="Give the campaign's own, or leave --wild-type out.",
        )

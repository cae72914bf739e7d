"""Label tables: read, checked row by row, and turned into arrays.

A table is CSV, TSV or Parquet (plain or compressed) with a `sequence` column, or with `mutant` (`A24G:L50P`) and a
wild type. Empty cells, `NA` and `nan` are missing labels, masked in training and scoring. Optional columns:
`id`, `set` (train, valid, test), `validation` (true: validation part of train), `cluster`, and a weight.
Residue labels come as FASTA (`training.tables.residue_labels`).

Every fault is a `TableError` with the one-based data rows (header not counted).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bioseq.errors import MutationError, SequenceError, TableError
from bioseq.sequences.alphabet import Alphabet, protein
from training.tables.columns import column_of, fail, file_hash, read_columns

MISSING = {"", "na", "nan", "n/a"}
TRAIN, VALID, TEST = 0, 1, 2
_PARTS = {"train": TRAIN, "training": TRAIN, "valid": VALID, "validation": VALID, "val": VALID, "test": TEST}
_TRUE, _FALSE = {"true", "1", "yes", "t"}, {"false", "0", "no", "f"} | MISSING


@dataclass(frozen=True)
class Labels:
    """A checked table of N rows.

    `y` float64 [N, T]: values (regression), 0/1 (binary, multilabel) or class numbers (multiclass), NaN where
    missing; per residue an empty [N, 0], and `residues` holds int64 [L] class numbers, -1 where masked.
    `classes` are the class names of binary, multiclass and per_residue. `part` int [N] TRAIN, VALID, TEST from
    the file, or None. `rows` are one-based data rows.
    """

    task: str
    targets: tuple[str, ...]
    classes: tuple[str, ...]
    sequences: list[str]
    ids: list[str]
    rows: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    residues: list[np.ndarray] | None = None
    part: np.ndarray | None = None
    cluster: list[str] | None = None
    wild_type: str | None = None
    data_hash: str = ""
    notes: tuple[str, ...] = field(default=())
    alphabet: str = "protein"

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, places: np.ndarray) -> Labels:
        """The rows at `places`."""
        places = np.asarray(places)
        return replace(
            self,
            sequences=[self.sequences[i] for i in places],
            ids=[self.ids[i] for i in places],
            rows=self.rows[places],
            y=self.y[places],
            weights=self.weights[places],
            residues=None if self.residues is None else [self.residues[i] for i in places],
            part=None if self.part is None else self.part[places],
            cluster=None if self.cluster is None else [self.cluster[i] for i in places],
        )

    def joined(self, other: Labels) -> Labels:
        """These rows, then the other's, of one table."""
        return replace(
            self,
            sequences=self.sequences + other.sequences,
            ids=self.ids + other.ids,
            rows=np.concatenate([self.rows, other.rows]),
            y=np.concatenate([self.y, other.y]),
            weights=np.concatenate([self.weights, other.weights]),
            residues=None if self.residues is None else self.residues + (other.residues or []),
            part=None,
            cluster=None,
        )

    def labelled(self) -> int:
        """Rows with at least one label."""
        if self.residues is not None:
            return sum(bool((r >= 0).any()) for r in self.residues)
        return int((~np.isnan(self.y)).any(1).sum())


def _missing(text: str) -> bool:
    return text.lower() in MISSING


def _number(text: str) -> float:
    if _missing(text):
        return float("nan")
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(text)
    return value


def clean_sequences(texts: Sequence[str], alphabet: Alphabet, max_residues: int | None) -> list[str]:
    """Upper case, final stop dropped. Illegal and empty ones are refused together, with rows."""
    out: list[str] = []
    bad: list[int] = []
    empty: list[int] = []
    first = ""
    for row, text in enumerate(texts, 1):
        try:
            alphabet.encode(text)
        except SequenceError as error:
            (bad if text else empty).append(row)
            first = first or error.bare
            continue
        out.append(text.upper().rstrip("*"))
    fail("the sequence is empty", empty)
    fail(f"illegal residues, the first: {first}", bad)
    if max_residues:
        long = [r for r, s in enumerate(out, 1) if len(s) > max_residues]
        fail(f"longer than {max_residues} residues", long)
    return out


def _variants(columns: dict[str, list[str]], path: object, wild_type: str | None) -> tuple[list[str], str]:
    from bioseq.sequences.mutations import apply, parse

    if wild_type is None:
        wild = {w.upper() for w in column_of(columns, "wild_type", path) if w}
        if len(wild) != 1:
            raise TableError(f"{path}: {len(wild)} different wild types; one is needed.")
        wild_type = wild.pop()
    wild_type = wild_type.upper().rstrip("*")
    out, bad, first = [], [], ""
    for row, text in enumerate(columns["mutant"], 1):
        try:
            out.append(apply(wild_type, parse(text, wild_type)))
        except MutationError as error:
            bad.append(row)
            first = first or str(error)
    fail(f"bad variants, the first: {first}", bad)
    return out, wild_type


def guess_task(values: Sequence[Sequence[str]]) -> str:
    """regression, binary, multiclass or multilabel from the text of the label columns: only 0 and 1 is
    binary (several columns: multilabel), numbers are regression, words are classes. Where half or more are
    numbers the rest are faults, which reading as numbers will name."""
    present = [v for column in values for v in column if not _missing(v)]
    numbers, words = set(), 0
    for value in present:
        try:
            numbers.add(float(value))
        except ValueError:
            words += 1
    if words > len(present) / 2:
        return "binary" if len(set(present)) == 2 else "multiclass"
    if not words and numbers <= {0.0, 1.0}:
        return "multilabel" if len(values) > 1 else "binary"
    return "regression"


def _targets(
    columns: dict[str, list[str]], targets: Sequence[str], task: str, path: object
) -> tuple[np.ndarray, tuple[str, ...]]:
    texts = [column_of(columns, t, path) for t in targets]
    if task in ("binary", "multiclass"):
        if len(texts) != 1:
            raise TableError(f"{task} takes one label column, {len(texts)} were given.")
        names = sorted({v for v in texts[0] if not _missing(v)})
        if task == "binary" and len(names) > 2:
            raise TableError(
                f"column {targets[0]!r} has {len(names)} different labels; binary needs two.",
                hint="Set the task to multiclass.",
            )
        if len(names) < 2:
            raise TableError(f"column {targets[0]!r} has one class only: nothing can be learnt.")
        place = {n: float(i) for i, n in enumerate(names)}
        return np.array([[place.get(v, np.nan)] for v in texts[0]]), tuple(names)
    y = np.full((len(texts[0]), len(texts)), np.nan)
    for j, (name, column) in enumerate(zip(targets, texts)):
        bad = []
        for i, text in enumerate(column):
            try:
                y[i, j] = _number(text)
            except ValueError:
                bad.append(i + 1)
        fail(f"column {name!r} holds labels that are no numbers", bad)
        present = y[~np.isnan(y[:, j]), j]
        if not len(present):
            raise TableError(f"column {name!r} has no label at all.")
        if task == "multilabel":
            odd = ~np.isnan(y[:, j]) & ~np.isin(y[:, j], (0.0, 1.0))
            fail(f"column {name!r} holds labels that are not 0 or 1", np.flatnonzero(odd) + 1)
        if present.min() == present.max():
            kind = "class" if task == "multilabel" else "value"
            raise TableError(f"column {name!r} has one {kind} only: nothing can be learnt.")
    return y, tuple(targets) if task == "multilabel" else ()


def _flag(text: str) -> bool:
    low = text.lower()
    if low in _TRUE:
        return True
    if low in _FALSE:
        return False
    raise ValueError(text)


def read_parts(sets: Sequence[str] | None, validation: Sequence[str] | None) -> np.ndarray | None:
    """TRAIN, VALID, TEST by row from the `set` and `validation` columns; None without a `set` column."""
    if sets is None:
        return None
    fail("`set` is not train, valid or test", [i for i, s in enumerate(sets, 1) if s.lower() not in _PARTS])
    part = np.array([_PARTS[s.lower()] for s in sets])
    if validation is not None:
        flags, bad = np.zeros(len(part), bool), []
        for i, text in enumerate(validation):
            try:
                flags[i] = _flag(text)
            except ValueError:
                bad.append(i + 1)
        fail("`validation` is not true or false", bad)
        fail("`validation` is true outside the training set", np.flatnonzero(flags & (part != TRAIN)) + 1)
        part[flags] = VALID
    return part


def _same(labels: Labels, a: int, b: int) -> bool:
    return bool(np.array_equal(labels.y[a], labels.y[b], equal_nan=True)) and (
        labels.residues is None or np.array_equal(labels.residues[a], labels.residues[b])
    )


def merge_duplicates(labels: Labels, replicates: str = "error") -> Labels:
    """One row a sequence. Equal labels are merged; different ones are an error, or with `mean` (regression)
    averaged by weight, the weights added. The same sequence on both sides of a split is an error."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, sequence in enumerate(labels.sequences):
        groups[sequence].append(i)
    several = [g for g in groups.values() if len(g) > 1]
    if not several:
        return labels
    conflict = [i for g in several if not all(_same(labels, g[0], i) for i in g[1:]) for i in g]
    if conflict and not (replicates == "mean" and labels.task == "regression"):
        fail(
            "the same sequence with conflicting labels",
            labels.rows[conflict],
            hint="Correct them"
            + (", or average them with --replicates mean." if labels.task == "regression" else "."),
        )
    if labels.part is not None:
        across = [i for g in several if len({int(labels.part[i]) for i in g}) > 1 for i in g]
        fail("the same sequence in several parts of the split", labels.rows[across])
    keep = np.array([g[0] for g in groups.values()])
    y, weights = labels.y.copy(), labels.weights.copy()
    for g in several:
        weights[g[0]] = labels.weights[g].sum()
        block, w = labels.y[g], labels.weights[g][:, None]
        seen = ~np.isnan(block)
        total = (w * seen).sum(0)
        mean = np.where(seen, block * w, 0).sum(0) / np.where(total > 0, total, 1)
        y[g[0]] = np.where(total > 0, mean, np.nan)
    dropped = len(labels) - len(keep)
    merged = replace(labels, y=y, weights=weights).take(keep)
    return replace(merged, notes=(*labels.notes, f"{dropped} repeated sequences merged"))


def read_labels(
    path: str | Path,
    targets: Sequence[str],
    *,
    task: str | None = None,
    wild_type: str | None = None,
    weight: str | None = None,
    id_column: str | None = None,
    replicates: str = "error",
    max_residues: int | None = None,
    alphabet: Alphabet | None = None,
) -> Labels:
    """Read and check a table. Raises `TableError` with row numbers, before anything is computed."""
    columns = read_columns(path)
    texts = [column_of(columns, t, path) for t in targets]
    task = task or guess_task(texts)
    y, classes = _targets(columns, targets, task, path)
    if "sequence" in columns:
        sequences = clean_sequences(columns["sequence"], alphabet or protein(), max_residues)
        wild_type = wild_type.upper().rstrip("*") if wild_type else None
    elif "mutant" in columns:
        sequences, wild_type = _variants(columns, path, wild_type)
    else:
        raise TableError(
            f"{path}: there is no column 'sequence' nor 'mutant'.", hint=f"It has {', '.join(columns)}."
        )
    n = len(sequences)
    weights = np.ones(n)
    if weight is not None:
        bad = []
        for i, text in enumerate(column_of(columns, weight, path)):
            try:
                weights[i] = _number(text)
            except ValueError:
                weights[i] = np.nan
            if not weights[i] >= 0:
                bad.append(i + 1)
        fail(f"weight column {weight!r} holds values that are no numbers >= 0", bad)
    names = column_of(columns, id_column, path) if id_column else columns.get("id") or columns.get("mutant")
    labels = Labels(
        task=task,
        targets=tuple(targets),
        classes=classes,
        sequences=sequences,
        ids=list(names) if names else [f"row{i + 1}" for i in range(n)],
        rows=np.arange(1, n + 1),
        y=y,
        weights=weights,
        part=read_parts(columns.get("set"), columns.get("validation")),
        cluster=columns.get("cluster"),
        wild_type=wild_type,
        data_hash=file_hash(path),
        alphabet=(alphabet or protein()).name,
    )
    return merge_duplicates(labels, replicates)


def without_unlabelled(labels: Labels) -> Labels:
    """Rows that have a label; the others can neither teach nor test, so they must not be counted."""
    keep = np.flatnonzero((~np.isnan(labels.y)).any(1))
    if len(keep) == len(labels):
        return labels
    dropped = f"{len(labels) - len(keep)} rows without any label left out"
    return replace(labels.take(keep), notes=(*labels.notes, dropped))

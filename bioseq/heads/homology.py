"""What a head's own training rows say of a sequence: their labels, transferred along a search, and the nearest of them.

The label of a query is the mean of the labels of the training rows found, weighted by their squared bit scores, with a
prior of weight `PRIOR` at the training rows' own mean, so that distant hits move it little. While a head is fitted,
calibrated or measured, a row's own hit and hits above 95 % identity are left out (`NEAR`); when it predicts, nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bioseq.heads.relatives import FOLDER, NEAR, Links
from bioseq.homologs.hits import Hits, encode
from bioseq.homologs.reference import ReferenceSet, open_reference
from bioseq.homologs.search import search
from bioseq.homologs.settings import SearchSettings
from bioseq.homologs.transfer import PRIOR, transfer_residues, without

if TYPE_CHECKING:
    from bioseq.bundles.bundle import Bundle

EXTRA = 2  # columns of a block beside the transferred labels: log of the summed weight, best identity
SEARCH_RESIDUES = SearchSettings(sensitivity=7.5, iterations=1, e_value=1.0, max_hits=50)
LETTERS = 20
SEARCH = SearchSettings(sensitivity=7.5, iterations=1, e_value=10.0, max_hits=300)


def find_links(
    sequences: Sequence[str], reference: ReferenceSet, *, threads: int | None = None, progress: Any = None
) -> Links:
    """Search the training rows for the homologs of cleaned sequences, some at a time."""
    parts = []
    for at in range(0, len(sequences), 2000):
        some = sequences[at : at + 2000]
        parts.append(_flat(search(some, reference, SEARCH, threads=threads, quiet=True)))
        if progress is not None:
            progress.add(len(some))
    return Links.joined(parts or [_flat([])])


def _flat(hits: Sequence[Hits]) -> Links:
    owner = np.repeat(np.arange(len(hits)), [len(h) for h in hits])
    columns = [
        np.concatenate([np.zeros(0), *(getattr(h, c) for h in hits)])
        for c in ("keys", "bits", "identity", "coverage")
    ]
    return Links(len(hits), owner, columns[0].astype(np.int64), *columns[1:])


def transfer(
    links: Links, y: np.ndarray, task: str, classes: int, allowed: np.ndarray | None = None
) -> np.ndarray:
    """The homology block, float32 [N, outputs + EXTRA]: logits of the transferred labels (values for a regression) and
    how much stood behind them. `y` [R, T] labels of the training rows, NaN missing; `allowed` bool [R]."""
    if allowed is not None:
        links = links.only(allowed[links.keys])
    known = y if allowed is None else y[allowed]
    if task == "multiclass":
        y, known = _onehot(y, classes), _onehot(known, classes)
    n, weight = links.count, links.bits**2
    base = np.nan_to_num(np.nanmean(known, axis=0), nan=0.0)
    out = np.empty((n, y.shape[1] + EXTRA))
    for j in range(y.shape[1]):
        label = y[links.keys, j]
        seen = ~np.isnan(label)
        total = np.bincount(links.owner[seen], weight[seen], minlength=n)
        found = np.bincount(links.owner[seen], (weight * np.nan_to_num(label))[seen], minlength=n)
        out[:, j] = (found + PRIOR * base[j]) / (total + PRIOR)
    if task != "regression":
        p = np.clip(out[:, : y.shape[1]], 1e-4, 1 - 1e-4)
        out[:, : y.shape[1]] = np.log(p) if task == "multiclass" else np.log(p / (1 - p))
    out[:, -2] = np.log10(1 + np.bincount(links.owner, weight, minlength=n))
    out[:, -1] = 0.0
    np.maximum.at(out[:, -1], links.owner, links.identity)
    return out.astype(np.float32)


def _onehot(y: np.ndarray, classes: int) -> np.ndarray:
    seen = ~np.isnan(y[:, 0])
    out = np.full((len(y), classes), np.nan)
    out[seen] = np.eye(classes)[y[seen, 0].astype(int)]
    return out


def residue_block(hits: Sequence[Hits], states: Sequence[np.ndarray], prior: np.ndarray) -> list[np.ndarray]:
    """For each query the residue block, float32 [L, C + 1 + 20]: log of the labels copied along the alignments (where
    there is none, the mean label of the residue itself, `prior` [21, C]), the evidence for them, and which residues the
    homologs have in the column, as shares."""
    labels, evidence = transfer_residues(hits, states, prior)
    out = []
    for one, p, weight in zip(hits, labels, evidence):
        own = np.eye(LETTERS + 2, dtype=np.float32)[np.minimum(encode(one.query), LETTERS)]
        counts = own[:, :LETTERS] + np.eye(LETTERS + 2, dtype=np.float32)[one.aligned].sum(0)[:, :LETTERS]
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1.0)
        out.append(np.column_stack([np.log(np.maximum(p, 1e-4)), weight, shares]).astype(np.float32))
    return out


def residue_prior(sequences: Sequence[str], states: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """Mean label by residue, float64 [21, C], with one count at the mean of all."""
    code = np.minimum(np.concatenate([encode(s) for s in sequences]), LETTERS)
    state = np.concatenate(states)
    table = np.zeros((LETTERS + 1, classes))
    np.add.at(table, (code[state >= 0], state[state >= 0]), 1.0)
    mean = table.sum(0) / max(table.sum(), 1.0)
    return (table + mean) / (table.sum(1, keepdims=True) + 1.0)


@dataclass
class TrainingRows:
    """The training rows that travel in a head's bundle: their sequences as a reference set, ids, and labels."""

    reference: ReferenceSet
    ids: list[str]
    y: np.ndarray
    task: str
    names: list[str]  # labels or targets
    unit: str | None = None
    variants: bool = False  # of one protein: compared place by place
    states: list[np.ndarray] | None = None  # per residue: class numbers int [L] of each row, -1 unknown

    def __post_init__(self) -> None:
        if self.states is not None:
            sequences = [r.sequence for r in self.reference.records()]
            self.prior = residue_prior(sequences, self.states, len(self.names))

    @classmethod
    def read(cls, bundle: Bundle, tensors: dict[str, torch.Tensor]) -> TrainingRows | None:
        """Those of a head's bundle, taken out of its tensors; None where they were kept out of it."""
        manifest = bundle.manifest
        if f"{FOLDER}/manifest.json" not in manifest.files:
            return None
        reference = open_reference(bundle.path / FOLDER)
        records = list(reference.records())
        states = None
        if f"{FOLDER}.states" in tensors:
            flat = tensors.pop(f"{FOLDER}.states").numpy().astype(np.int64)
            states = np.split(flat, np.cumsum([len(r.sequence) for r in records])[:-1])
        settings = manifest.extra["head"]
        return cls(
            reference,
            [r.id for r in records],
            tensors.pop(f"{FOLDER}.labels").double().numpy(),
            manifest.task or "",
            list(settings.get("classes") or settings.get("targets") or manifest.labels),
            manifest.units if isinstance(manifest.units, str) else None,
            settings.get("homologs") == "variants",
            states,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        out = {f"{FOLDER}.labels": torch.from_numpy(self.y).float()}
        if self.states is not None:
            out[f"{FOLDER}.states"] = torch.from_numpy(np.concatenate(self.states).astype(np.int8))
        return out

    def residue_links(
        self, sequences: Sequence[str], *, fitting: bool = False, threads: int | None = None
    ) -> tuple[Links, list[np.ndarray]]:
        """(hits, residue block) of each sequence, of length L each. `fitting` leaves near-identical rows out."""
        assert self.states is not None
        hits = search(sequences, self.reference, SEARCH_RESIDUES, threads=threads, places=True, quiet=True)
        if fitting:
            hits = [without(h, None, above_identity=NEAR) for h in hits]
        return _flat(hits), residue_block(hits, self.states, self.prior)

    def links(self, sequences: Sequence[str], *, threads: int | None = None) -> Links:
        if self.variants:
            return self._compared(sequences)
        return find_links(sequences, self.reference, threads=threads)

    def _compared(self, sequences: Sequence[str], most: int = 100) -> Links:
        """The training rows with the fewest differences from each sequence of their length."""
        own = [r.sequence for r in self.reference.records()]
        table = np.frombuffer("".join(own).encode(), np.uint8).reshape(len(own), -1)
        length = table.shape[1]
        keys, identity = [], []
        for s in sequences:
            if len(s) != length:
                keys.append(np.zeros(0, np.int64))
                identity.append(np.zeros(0))
                continue
            equal = (table == np.frombuffer(s.encode("latin-1", "replace"), np.uint8)).mean(1)
            best = np.argsort(-equal, kind="stable")[:most]
            keys.append(best)
            identity.append(equal[best])
        owner = np.repeat(np.arange(len(sequences)), [len(k) for k in keys])
        flat = np.concatenate([*identity, np.zeros(0)])
        return Links(
            len(sequences),
            owner,
            np.concatenate([*keys, np.zeros(0, np.int64)]),
            flat,
            flat,
            np.ones(len(flat)),
        )

    def evidence(self, links: Links, most: int = 1) -> list[dict[str, Any]]:
        """For each query `nearest`, the best `most` training rows, and `homologs`, how many were found: their number
        and the effective number of those that carry the transferred label (Kish 1965). None for variants of one protein,
        which are all homologs of each other."""
        weight = links.bits**2
        number = np.bincount(links.owner, minlength=links.count)
        total = np.bincount(links.owner, weight, minlength=links.count)
        square = np.bincount(links.owner, weight**2, minlength=links.count)
        effective = total**2 / np.maximum(square, 1e-9)
        first = np.concatenate([[0], np.cumsum(number)])
        out = []
        for i in range(links.count):
            nearest = []
            for p in range(first[i], min(first[i + 1], first[i] + most)):
                label = self.label(int(links.keys[p]))
                nearest.append(
                    {
                        "id": self.ids[links.keys[p]],
                        "identity": round(float(links.identity[p]), 4),
                        "coverage": round(float(links.coverage[p]), 4),
                        "label": label,
                        "text": self.text(links, p, label),
                    }
                )
            told = (
                None
                if self.variants
                else {"number": int(number[i]), "effective": round(float(effective[i]), 2)}
            )
            out.append({"nearest": nearest, "homologs": told})
        return out

    def label(self, key: int) -> Any:
        """The label of a training row, in the form of a prediction's value; None where it has none."""
        row = self.y[key] if len(self.y) else np.zeros(0)
        if self.task == "per_residue" or np.isnan(row).all():
            return None
        if self.task == "regression":
            values = [None if np.isnan(v) else float(v) for v in row]
            return values[0] if len(values) == 1 else dict(zip(self.names, values))
        if self.task == "multilabel":
            return [n for n, v in zip(self.names, row) if v == 1]
        return self.names[int(row[0])]

    def text(self, links: Links, place: int, label: Any) -> str:
        """One sentence for people."""
        where = (
            f"{self.ids[links.keys[place]]}: {links.identity[place]:.0%} identical over "
            f"{links.coverage[place]:.0%} of this sequence"
        )
        if label is None:
            return where
        if isinstance(label, float):
            return f"{where}; measured {label:.4g}" + (f" {self.unit}" if self.unit else "")
        if isinstance(label, dict):
            return f"{where}; measured " + ", ".join(
                f"{k} {v:.4g}" for k, v in label.items() if v is not None
            )
        if isinstance(label, list):
            return (
                f"{where}; annotated {', '.join(label)}"
                if label
                else f"{where}; annotated with none of the labels"
            )
        return f"{where}; {label}"

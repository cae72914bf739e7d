"""Made-up tables whose labels follow from the sequences."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def sequences(n: int, seed: int = 0, low: int = 25, high: int = 45) -> list[str]:
    """Random proteins, each with a share of K and of W of its own."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        p = np.ones(20)
        p[LETTERS.index("K")], p[LETTERS.index("W")] = rng.uniform(0, 6, 2)
        out.append("".join(rng.choice(list(LETTERS), rng.integers(low, high), p=p / p.sum())))
    return out


def write_table(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    with open(path, "w", newline="") as handle:
        out = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter)
        out.writeheader()
        out.writerows(rows)
    return path


def table(n: int = 150, seed: int = 0) -> list[dict]:
    """Rows with regression (`k`, `w`), 0/1 (`many_k`, `many_w`) and class (`kind`) labels, and a set column."""
    rng = np.random.default_rng(seed + 1)
    rows = []
    for i, s in enumerate(sequences(n, seed)):
        k, w = s.count("K") / len(s), s.count("W") / len(s)
        rows.append(
            {
                "id": f"p{i}",
                "cluster": f"c{i}",
                "sequence": s,
                "k": round(k + rng.normal(0, 0.01), 5),
                "w": round(w + rng.normal(0, 0.01), 5),
                "many_k": int(k > 0.12),
                "many_w": int(w > 0.12),
                "kind": "k" if k > w + 0.05 else "w" if w > k + 0.05 else "none",
                "set": "train" if i < n * 0.6 else "valid" if i < n * 0.8 else "test",
            }
        )
    return rows

"""How far a protein lies from what a head was trained on, and which training proteins lie nearest.

Score, >= 0, higher is further:  ood = sqrt(d^2 + u^2)

- d: Mahalanobis distance of the pooled embedding, divided by the square root of the kept dimensions, in a
  whitened space of at most 64 principal directions with shrunken variances (Lee et al. 2018, arXiv
  1807.03888). About 1 on training proteins.
- u (heads for any protein): how little the order of residues looks like a protein's. A linear log-density
  ratio between training proteins and their own shuffled residues (noise-contrastive estimation, Gutmann &
  Hyvarinen 2012), over dipeptides, gapped pairs and the composition of the ends; u is how many interquartile
  ranges of the training proteins it lies below their median, 0 above it. Composition alone cannot change it
  much, since the shuffled ones have the same.

`ood_percentile` is the score's place among training proteins that were not used to fit it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from bioseq.heads import features as blocks
from bioseq.heads.calibration import percentile_of
from bioseq.heads.features import Context

ORDER = ("composition", "dipeptide", "gapped", "terminal")


def order_features(sequences: Sequence[str], alphabet: str = "protein") -> np.ndarray:
    return np.column_stack([blocks.compute(b, sequences, Context(alphabet=alphabet)) for b in ORDER])


@dataclass
class OodScore:
    """`mean` [D], `project` [D, K]; `order` None or (mean, scale, weight) float32 [F] each; `order_at` (median,
    interquartile range) of the log ratio on training proteins; `grid` float32 [101]; `points` float16 [R, K]
    whitened training embeddings of `ids`."""

    mean: np.ndarray
    project: np.ndarray
    grid: np.ndarray
    order: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    order_at: tuple[float, float] = (0.0, 1.0)
    points: np.ndarray | None = None
    ids: list[str] = field(default_factory=list)
    alphabet: str = "protein"

    def place(self, pooled: np.ndarray) -> np.ndarray:
        """Whitened embedding, float32 [N, K]."""
        return (pooled - self.mean) @ self.project

    def score(self, pooled: np.ndarray, sequences: Sequence[str]) -> np.ndarray:
        """float64 [N] of pooled embeddings [N, D] and cleaned sequences."""
        z = self.place(pooled)
        squared = (z.astype(np.float64) ** 2).mean(1)
        if self.order is not None:
            mean, scale, weight = self.order
            ratio = ((order_features(sequences, self.alphabet) - mean) * scale) @ weight
            squared = squared + np.maximum(0.0, (self.order_at[0] - ratio) / self.order_at[1]) ** 2
        return np.sqrt(squared)

    def percentile(self, score: np.ndarray) -> np.ndarray:
        return percentile_of(score, self.grid)

    def nearest(self, pooled: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
        """The k training examples of highest cosine in whitened space: (id, similarity), best first."""
        if self.points is None or not len(self.points):
            return [[] for _ in pooled]
        z = self.place(pooled)
        points = self.points.astype(np.float32)
        z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        cosine = z @ points.T
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        return [[(self.ids[j], float(row[j])) for j in best] for row, best in zip(cosine, order)]

    def tensors(self) -> dict[str, torch.Tensor]:
        out = {"ood.mean": self.mean, "ood.project": self.project, "ood.grid": self.grid}
        if self.order is not None:
            out |= dict(zip(("ood.order.mean", "ood.order.scale", "ood.order.weight"), self.order))
            out["ood.order.at"] = np.array(self.order_at, np.float64)
        if self.points is not None:
            out["neighbours.points"] = self.points
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in out.items()}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, torch.Tensor], ids: list[str], alphabet: str = "protein"
    ) -> OodScore:
        get = {name: t.numpy() for name, t in tensors.items()}
        order, at = None, (0.0, 1.0)
        if "ood.order.weight" in get:
            order = (get["ood.order.mean"], get["ood.order.scale"], get["ood.order.weight"])
            at = (float(get["ood.order.at"][0]), float(get["ood.order.at"][1]))
        return cls(
            get["ood.mean"],
            get["ood.project"],
            get["ood.grid"],
            order,
            at,
            get.get("neighbours.points"),
            ids,
            alphabet,
        )

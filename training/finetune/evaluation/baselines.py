"""The simple models that every head is shown beside, trained on the same rows and chosen on the same validation.

- `majority`: the training mean, or the commonest class.
- `composition`: composition and dipeptides with ridge or logistic regression, L2 chosen on validation.
- `onehot`: one-hot residues with ridge or logistic regression, for tables of one length.
- `nearest`: the mean label of the k nearest training embeddings by cosine, k in 1, 3, 10 chosen on validation.
- per residue: the commonest state, and logistic regression on the letters of a window of 15 residues, the
  form of the first neural predictors (Qian & Sejnowski 1988).

They report through the same scores as the head; none of them is tuned beyond what is said here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bioseq.heads import features as blocks
from bioseq.heads.features import Context
from training.finetune.metrics import main_score
from training.finetune.models.linear import fit_linear

WINDOW = 15


def _majority(task: str, y: np.ndarray, n: int, n_out: int) -> np.ndarray:
    if task == "multiclass":
        counts = np.bincount(y[~np.isnan(y[:, 0]), 0].astype(int), minlength=n_out)
        return np.tile(counts / counts.sum(), (n, 1))
    return np.tile(np.nanmean(y, axis=0), (n, 1))


def _neighbours(
    task: str, train: np.ndarray, y: np.ndarray, rows: np.ndarray, k: int, n_out: int
) -> np.ndarray:
    centre = train.mean(0)
    a, b = rows - centre, train - centre
    a = a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12)
    b = b / np.maximum(np.linalg.norm(b, axis=1, keepdims=True), 1e-12)
    nearest = np.argpartition(-(a @ b.T), min(k, len(b)) - 1, axis=1)[:, :k]
    if task == "multiclass":
        votes = y[nearest, 0]
        return np.stack([(votes == c).mean(1) for c in range(n_out)], axis=1)
    mean = np.nanmean(y, axis=0)
    seen = ~np.isnan(y[nearest])
    total = np.where(seen, y[nearest], 0).sum(1)
    return np.where(seen.any(1), total / np.maximum(seen.sum(1), 1), mean)


def sequence_baselines(
    task: str,
    sequences: dict[str, list[str]],
    embeddings: dict[str, np.ndarray],
    y: dict[str, np.ndarray],
    weight: np.ndarray,
    n_out: int,
    context: Context | None,
    embedded: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Predictions on `test` by baseline, as `training.finetune.metrics.score` takes them. The dicts have `train`, `valid`
    and `test`; `context` for tables of one length; `embedded` the training rows that have an embedding."""
    out = {"majority": _majority(task, y["train"], len(y["test"]), n_out)}
    sets: dict[str, tuple[str, ...]] = {"composition_dipeptides": ("composition", "dipeptide")}
    if context is not None and context.sites:
        sets["onehot"] = ("onehot",)
    for name, chosen in sets.items():
        x = {
            part: np.column_stack([blocks.compute(b, s, context or Context()) for b in chosen])
            for part, s in sequences.items()
        }
        widths = [blocks.width(b, context or Context()) for b in chosen]
        predict, _, _ = fit_linear(
            task, x["train"], y["train"], weight, x["valid"], y["valid"], widths, n_out
        )
        out[name] = predict(x["test"])
    near = y["train"] if embedded is None else y["train"][embedded]
    best = (-np.inf, 1)
    for k in (1, 3, 10):
        tried = _neighbours(task, embeddings["train"], near, embeddings["valid"], k, n_out)
        value = main_score(task, y["valid"], tried)
        if value > best[0]:
            best = (value, k)
    out[f"nearest_{best[1]}"] = _neighbours(
        task, embeddings["train"], near, embeddings["test"], best[1], n_out
    )
    return out


def windows_onehot(sequences: Sequence[str], size: int = WINDOW) -> np.ndarray:
    """int64 [residues, size]: places of letters in a window around each residue, 20 beyond the ends."""
    half, rows = size // 2, []
    for s in sequences:
        code = np.concatenate([np.full(half, 20), blocks.codes(s), np.full(half, 20)])
        rows.append(np.lib.stride_tricks.sliding_window_view(code, size))
    return np.concatenate(rows)


def residue_baselines(
    sequences: dict[str, list[str]],
    states: dict[str, list[np.ndarray]],
    n_out: int,
    *,
    limit: int = 60_000,
    epochs: int = 4,
    seed: int = 0,
) -> dict[str, list[np.ndarray]]:
    """Probabilities on `test`, a list of [L, C]. The window model sees at most `limit` labelled residues."""
    rng = np.random.default_rng(seed)
    train = np.concatenate(states["train"])
    counts = np.bincount(train[train >= 0], minlength=n_out)
    share = counts / counts.sum()
    majority = [np.tile(share, (len(s), 1)) for s in sequences["test"]]
    places = windows_onehot(sequences["train"])
    chosen = rng.permutation(np.flatnonzero(train >= 0))[:limit]
    x, t = torch.from_numpy(places[chosen]), torch.from_numpy(train[chosen])
    offsets = torch.arange(WINDOW) * 21
    table = torch.nn.EmbeddingBag(WINDOW * 21, n_out, mode="sum")
    torch.nn.init.zeros_(table.weight)
    bias = torch.nn.Parameter(torch.zeros(n_out))
    optimiser = torch.optim.Adam([*table.parameters(), bias], lr=0.02)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(1024):
            loss = torch.nn.functional.cross_entropy(table(x[rows] + offsets) + bias, t[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        flat = torch.softmax(table(torch.from_numpy(windows_onehot(sequences["test"])) + offsets) + bias, 1)
    cuts = np.cumsum([len(s) for s in sequences["test"]])[:-1]
    return {"majority": majority, "window_letters": np.split(flat.numpy(), cuts)}

"""The models that every head is shown beside and must beat, fitted on the same rows and chosen in the same way.

- `majority`: the training mean, or the commonest class.
- `composition_dipeptides`: composition and pairs of neighbours with ridge or logistic regression.
- `onehot`: one-hot residues with ridge or logistic regression, for variants of one protein.
- `nearest_K`: the mean label of the K nearest training rows, K of 1, 3, 10: by cosine of embeddings, for variants of
  one protein by the number of differences.
- `homology_transfer`: the labels of homologs among the training rows (`bioseq.heads.homology`).
- `zero_shot`: for variants the backbone's masked-marginal score, which saw no label but for its sign: it is turned round
  where the labels of the rows fitted on fall with it.
- per residue: the commonest state, and logistic regression on the letters of a window of 15 residues, the
  form of the first neural predictors (Qian & Sejnowski 1988).

None of them is tuned beyond what is said here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bioseq.heads import features as blocks
from bioseq.ranking import spearman
from training.finetune.metrics import main_score
from training.finetune.models.frozen import fit_frozen
from training.finetune.models.linear import as_probabilities
from training.finetune.models.rows import Held, Rows

WINDOW = 15


def sequence_baselines(task: str, rows: Rows, held: Held, n_out: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Outputs on the test part by baseline, as `training.finetune.metrics` takes them."""
    trained, context = rows.trained, rows.context
    out = {"majority": _majority(task, rows.y[trained], len(held.sequences), n_out)}
    sets: dict[str, tuple[str, ...]] = {"composition_dipeptides": ("composition", "dipeptide")}
    if context.sites:
        sets["onehot"] = ("onehot",)
    for name, chosen in sets.items():
        fit = fit_frozen(task, rows, n_out, models=("linear",), sets=(chosen,), balance="none", seed=seed)
        out[name] = fit.outputs(held.matrix(chosen, context, trained))
    if context.wild_type:
        space, test = (blocks.compute("onehot", s, context) for s in (rows.sequences, held.sequences))
    else:
        space, test = (e.reshape(len(e), -1) for e in (rows.embeddings, held.embeddings))
    known = np.flatnonzero(~np.isnan(space).any(1))  # rows that were embedded
    best = (-np.inf, 1)
    for k in (1, 3, 10):
        tried = [
            _neighbours(task, space, rows.y, np.intersect1d(train, known), space[valid], k, n_out)
            for train, valid in rows.folds
        ]
        value = main_score(task, rows.y[rows.out_of_fold], np.concatenate(tried))
        if value > best[0]:
            best = (value, k)
    out[f"nearest_{best[1]}"] = _neighbours(
        task, space, rows.y, np.intersect1d(trained, known), test, best[1], n_out
    )
    if held.homology is not None:
        block = held.homology(trained)[:, : n_out if task != "regression" else rows.y.shape[1]]
        out["homology_transfer"] = as_probabilities(task, block.astype(np.float64))
    if context.odds is not None and task in ("regression", "binary"):
        seen = blocks.compute("masked_marginal", [rows.sequences[i] for i in trained], context)
        score = blocks.compute("masked_marginal", held.sequences, context) * _signs(rows.y[trained], seen)
        out["zero_shot"] = score if task == "regression" else as_probabilities(task, score)
    return out


def _signs(y: np.ndarray, score: np.ndarray) -> np.ndarray:
    """-1 for each target that falls with the score, else 1; [T] of [N, T] and [N, 1]."""
    kept = [~np.isnan(column) for column in y.T]
    found = [spearman(column[keep], score[keep, 0]) for column, keep in zip(y.T, kept)]
    return np.where(np.array(found) < 0, -1.0, 1.0)


def _majority(task: str, y: np.ndarray, n: int, n_out: int) -> np.ndarray:
    if task == "multiclass":
        counts = np.bincount(y[~np.isnan(y[:, 0]), 0].astype(int), minlength=n_out)
        return np.tile(counts / counts.sum(), (n, 1))
    return np.tile(np.nanmean(y, axis=0), (n, 1))


def _neighbours(
    task: str, space: np.ndarray, y: np.ndarray, train: np.ndarray, rows: np.ndarray, k: int, n_out: int
) -> np.ndarray:
    y, known = y[train], space[train]
    centre = known.mean(0)
    a, b = np.nan_to_num(rows - centre), known - centre
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

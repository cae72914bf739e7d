"""The picture of a run: training loss, and perplexity on each held-out set, over tokens seen."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from bioseq.output import atomic_file
from training.pretrain.records.run_folder import read_metrics


def plot_run(folder: Path) -> Path | None:
    """Write loss.png from metrics.jsonl. None (with a message) where matplotlib is not installed, or without
    rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no loss.png.", file=sys.stderr)
        return None
    rows = read_metrics(folder)
    train = [r for r in rows if r["kind"] == "train"]
    evals = [r for r in rows if r["kind"] == "eval"]
    if not train:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = np.array([r["tokens"] for r in train]) / 1e6
    loss = np.array([r["loss"] for r in train])
    left.plot(tokens, loss, color="0.75", linewidth=0.8, label="logged")
    left.plot(tokens, _smooth(loss), color="C0", label="smoothed")
    left.set(xlabel="tokens seen (millions)", ylabel="training loss (nats a masked residue)")
    left.legend(frameon=False)
    for i, name in enumerate(sorted({n for r in evals for n in r["sets"]})):
        points = [(r["tokens"] / 1e6, r["sets"][name]["perplexity"]) for r in evals if name in r["sets"]]
        right.plot(*zip(*points), marker="o", markersize=3, color=f"C{i}", label=name)
    right.set(xlabel="tokens seen (millions)", ylabel="perplexity (held-out subset)")
    if evals:
        right.legend(frameon=False)
    target = folder / "loss.png"
    with atomic_file(target, force=True) as file:
        figure.savefig(file, dpi=120, format="png")
    return target


def _smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """Centred running mean, shorter at the ends."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)

"""Per-residue heads: a stack of 1D convolutions over each residue's embedding, letter and residue block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from bioseq.heads import features as blocks


def flat_residues(features: np.ndarray) -> np.ndarray:
    """[L, D] of [L, D] or [layers, L, D]."""
    return features if features.ndim == 2 else np.concatenate(list(features), axis=1)


def residue_inputs(features: np.ndarray, sequence: str, block: np.ndarray | None = None) -> np.ndarray:
    """Inputs of the first convolution: embedding, letter and residue block, float32 [L, D + 21 + B]."""
    letters = np.eye(21, dtype=np.float32)[blocks.codes(sequence)]
    parts = [flat_residues(features), letters] + ([] if block is None else [block])
    return np.concatenate(parts, axis=1, dtype=np.float32)


@torch.inference_mode()
def convolve(
    features: Sequence[np.ndarray],
    sequences: Sequence[str],
    blocks_of: Sequence[np.ndarray] | None,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scaling: tuple[np.ndarray, np.ndarray],
    skip: torch.Tensor | None,
) -> list[np.ndarray]:
    """Outputs float32 [L_i, C]. All proteins lie in one row with gaps as wide as the reach, so that none sees another.
    `scaling` are mean and scale of the inputs; `skip` [1, H, C] leads from the last H of them to the outputs."""
    if not len(features):
        return []
    reach = sum((w.shape[2] - 1) // 2 for w, _ in layers)
    mean, scale = scaling
    rows, spans, at = [], [], 0
    for i, (feature, sequence) in enumerate(zip(features, sequences)):
        x = residue_inputs(feature, sequence, None if blocks_of is None else blocks_of[i])
        rows += [(x - mean) * scale, np.zeros((reach, x.shape[1]), np.float32)]
        spans.append((at, at + len(x)))
        at += len(x) + reach
    first_FT = x_FT = torch.from_numpy(np.concatenate(rows, dtype=np.float32)).T[None]
    inside = torch.zeros(1, 1, at)
    for start, end in spans:
        inside[..., start:end] = 1.0
    for i, (weight, bias) in enumerate(layers):
        padding = (weight.shape[2] - 1) // 2
        x_FT = F.conv1d(F.gelu(x_FT) if i else x_FT, weight, bias, padding=padding) * inside
    out = x_FT[0].T
    if skip is not None:
        out = out + first_FT[0, -skip.shape[1] :].T @ skip[0]
    flat = out.contiguous().numpy()
    return [flat[start:end] for start, end in spans]

"""Per-residue heads: a stack of 1D convolutions over each residue's embedding, letter, profile and transferred labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from bioseq.heads import features as blocks


def flat_residues(features: np.ndarray) -> np.ndarray:
    """[L, D] of [L, D] or [layers, L, D]."""
    return features if features.ndim == 2 else np.concatenate(list(features), axis=1)


def residue_inputs(features: np.ndarray | None, sequence: str, *extra: np.ndarray | None) -> np.ndarray:
    """Inputs of the first convolution: embedding where it is read, letter, then profile and transferred labels where
    they are read; float32 [L, D + 21 + B]."""
    letters = np.eye(21, dtype=np.float32)[blocks.codes(sequence)]
    parts = [*([] if features is None else [flat_residues(features)]), letters]
    return np.concatenate([*parts, *(e for e in extra if e is not None)], axis=1, dtype=np.float32)


@torch.inference_mode()
def convolve(
    inputs: Sequence[np.ndarray],
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scaling: tuple[np.ndarray, np.ndarray],
    skip: torch.Tensor | None,
) -> list[np.ndarray]:
    """Outputs float32 [L_i, C] of `residue_inputs`. All proteins lie in one row with gaps as wide as the reach, so that
    none sees another. `scaling` are mean and scale of the inputs; `skip` [1, H, C] leads from the last H of them to the
    outputs."""
    if not len(inputs):
        return []
    reach = sum((w.shape[2] - 1) // 2 for w, _ in layers)
    mean, scale = scaling
    rows, spans, at = [], [], 0
    for x in inputs:
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

"""Contacts between residues from attention maps, by the regression that an ESM-2 checkpoint carries.

p[i, j] = sigmoid(b + sum over layers l and heads h of w[l, h] A[l, h, i, j]), where A is the attention map of a head
without its special tokens, made symmetric (a + a^T) and corrected for the product of its averages (APC: minus row sum times
column sum over the whole sum). Rao et al. 2021, "Transformer protein language models are unsupervised structure
learners", doi 10.1101/2020.12.15.422761; transformers' `EsmContactPredictionHead` computes the same.

The regression is a sum, so one layer's maps are in memory at a time.

Legend: T tokens of a sequence, L residues of it, H heads, D width, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bioseq.backbones.packed.encoder import EncoderLayer, PackedEncoder

_WEIGHT, _BIAS = "contact_head.regression.weight", "contact_head.regression.bias"


@dataclass(frozen=True)
class ContactHead:
    """`weight` float32 [layers, H], `bias`."""

    weight: Tensor
    bias: float

    @classmethod
    def of(cls, extras: Mapping[str, Tensor], layers: int) -> ContactHead | None:
        """From a checkpoint's extra tensors, under any prefix; None if it has no such head, or one that does not fit."""
        found = {n: t for n, t in extras.items() if n.endswith((_WEIGHT, _BIAS))}
        weight = next((t for n, t in found.items() if n.endswith(_WEIGHT)), None)
        bias = next((t for n, t in found.items() if n.endswith(_BIAS)), None)
        if weight is None or bias is None or weight.numel() % layers:
            return None
        return cls(weight.float().reshape(layers, -1), float(bias))


def needed_bytes(encoder: PackedEncoder, residues: int) -> int:
    """Bytes of the maps that are in memory at a time: a layer's scores and their softmax."""
    return 2 * 4 * encoder.config.n_heads * (residues + 2) ** 2


@torch.inference_mode()
def contact_map(encoder: PackedEncoder, tokens_T: Tensor, head: ContactHead) -> Tensor:
    """Probabilities of a contact, float32 [L, L], symmetric, of one sequence's tokens, <cls> first and <eos> last."""
    cu_seqlens = torch.tensor([0, len(tokens_T)], dtype=torch.int32, device=tokens_T.device)
    x_TD = encoder.embed(tokens_T, cu_seqlens)
    cos, sin = encoder.rotation(cu_seqlens, len(tokens_T), x_TD.dtype)
    length = len(tokens_T) - 2
    logits_LL = torch.full((length, length), head.bias, device=tokens_T.device)
    for layer, weight_H in zip(encoder.layers, head.weight.to(tokens_T.device), strict=True):
        assert isinstance(layer, EncoderLayer)
        q_THd, k_THd, _ = layer.attention_inputs(x_TD, cos, sin)
        # No name holds the scores, and the rest is done in place: two maps of a layer at most.
        maps_HLL = torch.softmax(
            torch.einsum("ihd,jhd->hij", q_THd.float() * q_THd.shape[-1] ** -0.5, k_THd.float()), dim=-1
        )[:, 1:-1, 1:-1]
        maps_HLL = maps_HLL + maps_HLL.transpose(1, 2)
        rows_HL, whole_H = maps_HLL.sum(2), maps_HLL.sum((1, 2))
        maps_HLL.addcmul_(rows_HL[:, :, None], (rows_HL / whole_H[:, None])[:, None, :], value=-1)
        logits_LL += torch.einsum("h,hij->ij", weight_H, maps_HLL)
        del maps_HLL
        x_TD = layer(x_TD, cos, sin, cu_seqlens, len(tokens_T))
    return torch.sigmoid(logits_LL)

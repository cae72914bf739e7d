"""Attention over packed sequences: the one place where a backend is chosen.

Legend: T tokens of the pack, H heads, d head size, L tokens of one sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _loop(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """One attention a sequence: on a CPU the largest unit that fits the caches.

    Split and cat, not slices: the backward pass of a slice fills a zero tensor as large as the pack. In
    training at half precision plain matrix products are used, as the fused kernel's backward pass takes about
    twice their time there (measured, AVX512_BF16).
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    dtype = q_THd.dtype
    plain = q_THd.requires_grad and dtype != torch.float32
    if not plain:
        # The CPU kernel computes in float32 anyway: converting once is 3 to 7 % faster for the whole encoder.
        q_THd, k_THd, v_THd = q_THd.float(), k_THd.float(), v_THd.float()
    scale = q_THd.shape[-1] ** -0.5
    mixed = []
    for q, k, v in zip(q_THd.split(lengths), k_THd.split(lengths), v_THd.split(lengths)):
        if plain:
            weights = torch.softmax(torch.bmm(q.transpose(0, 1) * scale, k.permute(1, 2, 0)), dim=-1)
            mixed.append(torch.bmm(weights, v.transpose(0, 1)).transpose(0, 1))
        else:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            mixed.append(F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1))
    return torch.cat(mixed).to(dtype)


def _varlen(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Torch's variable-length flash attention (CUDA, half precision). Its signature differs between
    releases; these positional arguments are shared by all."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q_THd, k_THd, v_THd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return out if isinstance(out, Tensor) else out[0]


def backend(q_THd: Tensor) -> str:
    """`varlen` on CUDA in half precision, `loop` elsewhere (float32 has no varlen kernel)."""
    return "varlen" if q_THd.is_cuda and q_THd.dtype in (torch.bfloat16, torch.float16) else "loop"


def attend(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each packed sequence; [T, H, d] in, [T, H, d] out."""
    run = _varlen if backend(q_THd) == "varlen" else _loop
    return run(q_THd, k_THd, v_THd, cu_seqlens, max_seqlen)

"""Attention over packed sequences: the one place where a backend is chosen.

Legend: T tokens of the pack, H heads, d head size, L tokens of one sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _loop(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """One fused attention a sequence: on a CPU the largest unit that fits the caches."""
    out_THd = torch.empty_like(q_THd)
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:]):
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q_THd, k_THd, v_THd))
        out_THd[start:end] = F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)
    return out_THd


def _varlen(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Torch's variable-length flash attention (CUDA, half precision). Its signature differs between
    releases; these positional arguments are shared by all."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q_THd, k_THd, v_THd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def backend(q_THd: Tensor) -> str:
    """`varlen` on CUDA in half precision, `loop` elsewhere (float32 has no varlen kernel)."""
    return "varlen" if q_THd.is_cuda and q_THd.dtype in (torch.bfloat16, torch.float16) else "loop"


def attend(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each packed sequence; [T, H, d] in, [T, H, d] out."""
    run = _varlen if backend(q_THd) == "varlen" else _loop
    return run(q_THd, k_THd, v_THd, cu_seqlens, max_seqlen)

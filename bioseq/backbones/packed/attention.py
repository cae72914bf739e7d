"""Attention over packed sequences: the one place where a backend is chosen.

Legend: T tokens of the pack, H heads, d head size, L tokens of one sequence.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def processor() -> str:
    """`amx`, `avx512_bf16` or ``: what this CPU multiplies bfloat16 matrices with."""
    for name, asked in (("amx", "_is_amx_tile_supported"), ("avx512_bf16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, asked, lambda: False)():
            return name
    return ""


def kernel(dtype: torch.dtype, head_dim: int, length: int, *, training: bool = False) -> str:
    """How one sequence is attended to on this CPU: `fused`, `float32` (fused, after a conversion) or `products`
    (matrix products and a softmax between them).

    In training at half precision the fused kernel's backward pass takes about twice the time of the products'. In
    inference the fused kernel multiplies in float32 where there is no AMX, so products in bfloat16 take half its time,
    until the scores of a head no longer fit the cache; measured on AVX512_BF16 with heads of 16, 32 and 64. Where
    float32 is computed anyway, converting once is 3 to 7 % faster for the whole encoder.
    """
    if dtype == torch.float32:
        return "fused"
    if training:
        return "products"
    if dtype == torch.bfloat16 and processor() == "amx":
        return "fused"
    if dtype == torch.bfloat16 and processor() == "avx512_bf16" and length <= 12 * head_dim:
        return "products"
    return "float32"


def _loop(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """One attention a sequence: on a CPU the largest unit that fits the caches.

    Split and cat, not slices: the backward pass of a slice fills a zero tensor as large as the pack.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    dtype, head_dim, training = q_THd.dtype, q_THd.shape[-1], q_THd.requires_grad
    scale = head_dim**-0.5
    mixed = []
    for q, k, v in zip(q_THd.split(lengths), k_THd.split(lengths), v_THd.split(lengths)):
        how = kernel(dtype, head_dim, len(q), training=training)
        if how == "products":
            weights = torch.softmax(torch.bmm(q.transpose(0, 1) * scale, k.permute(1, 2, 0)), dim=-1)
            mixed.append(torch.bmm(weights, v.transpose(0, 1)).transpose(0, 1))
            continue
        if how == "float32":
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        mixed.append(F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1).to(dtype))
    return torch.cat(mixed)


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

"""The device's own matrix rate, measured: what "model FLOP utilisation" is a share of."""

from __future__ import annotations

import time
from functools import lru_cache

import torch


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, precision: str) -> float:
    """Best of a few large matrix products on `device` at the training precision and the current number of
    threads, in FLOP/s. Takes about half a second."""
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=kind)
    best = 0.0
    for _ in range(6):
        _sync(device)
        began = time.perf_counter()
        a @ a
        _sync(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - began))
    return best


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Pretraining on 8 to 512 GPUs, on paper: tokens/s, memory a GPU, and what limits. Writes a Markdown table.

    python benchmarks/scaling.py [--mfu 0.45] > docs/scaling-table.md

A roofline, not a measurement: compute from an assumed share of an assumed peak, communication from stated
bandwidths, the two overlapping by a stated share. No GPU number here is measured; pass --mfu (and --peak) from
`benchmarks/pretrain.py --gpu` to base the table on a measured one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from bioseq.backbones.packed.config import CONFIGS, ModelConfig


@dataclass(frozen=True)
class Machine:
    """`peak` FLOP/s of a GPU in bf16, dense; `memory` bytes of a GPU; bandwidths in bytes/s a GPU, one way."""

    peak: float = 989e12  # H100 SXM data sheet, dense bf16
    memory: float = 80e9
    inside: float = 450e9  # NVLink 4, 900 GB/s both ways
    between: float = 50e9  # 400 Gbit/s InfiniBand a GPU
    gpus_a_node: int = 8
    overlap: float = 0.8  # share of communication that hides behind the backward pass
    mfu: float = 0.45


@dataclass(frozen=True)
class Row:
    gpus: int
    tokens_per_s: float
    efficiency: float
    memory: float
    limit: str


def ring(size: float, gpus: int, machine: Machine) -> float:
    """Seconds of one ring pass (all-gather or reduce-scatter) of `size` bytes over `gpus`; an all-reduce is two."""
    if gpus == 1:
        return 0.0
    speed = machine.inside if gpus <= machine.gpus_a_node else machine.between
    return size * (gpus - 1) / gpus / speed


def estimate(c: ModelConfig, gpus: int, micro: int, step: int, sharded: bool, length: int, m: Machine) -> Row:
    """One optimiser step of `step` tokens over all GPUs, in micro-batches of at most `micro` tokens a GPU."""
    own = step / gpus
    turns = max(1, round(own / micro))
    # Forward once, backward twice; the LM head at 15 % of the tokens.
    dense = c.flops_per_token(length)
    head = 0.15 * (c.flops_per_token(0, lm_head=True) - c.flops_per_token(0))
    compute = 3 * (dense + head) * own / (m.peak * m.mfu)
    n = c.n_parameters
    if sharded:
        # bf16 all-gather in forward and backward of every micro-batch, fp32 reduce-scatter once.
        communication = turns * 2 * ring(2 * n, gpus, m) + ring(4 * n, gpus, m)
        states = 16 * n / gpus + 2 * 2 * n / c.n_layers
    else:
        communication = 2 * ring(4 * n, gpus, m)
        states = 16 * n
    shown = max(0.0, communication - m.overlap * compute * 2 / 3)
    seconds = compute + shown
    # Activations kept for backward, bytes a token and layer, flash attention: about 34 x width in half
    # precision (Korthikanti et al. 2022, arXiv 2205.05198, without the attention matrix).
    activations = 34 * c.d_model * c.n_layers * min(own, micro)
    memory = states + activations
    limit = "memory" if memory > m.memory else ("network" if shown > 0.1 * compute else "compute")
    if own < micro / 8:
        limit = "too few tokens a GPU"
    return Row(gpus, step / seconds, compute / seconds, memory, limit)


SIZES = {  # tokens a micro-batch, tokens a step, sharded: as in the recipes
    "8m": (65_536, 524_288, False),
    "35m": (65_536, 524_288, False),
    "150m": (32_768, 1_048_576, False),
    "650m": (16_384, 2_097_152, True),
    "3b": (8_192, 2_097_152, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mfu", type=float, default=Machine.mfu)
    parser.add_argument("--peak", type=float, default=Machine.peak)
    parser.add_argument("--length", type=int, default=300, help="mean tokens a sequence")
    args = parser.parse_args()
    machine = Machine(mfu=args.mfu, peak=args.peak)
    print("| size | GPUs | million tokens/s | of linear | memory a GPU | limited by |")
    print("|---|---|---|---|---|---|")
    for name, (micro, step, sharded) in SIZES.items():
        for gpus in (8, 16, 32, 64, 128, 256, 512):
            row = estimate(CONFIGS[name], gpus, micro, step, sharded, args.length, machine)
            print(
                f"| {name} | {gpus} | {row.tokens_per_s / 1e6:.2f} | {row.efficiency:.0%} | "
                f"{row.memory / 1e9:.1f} GB | {row.limit} |"
            )


if __name__ == "__main__":
    main()

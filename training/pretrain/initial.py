"""First weights of a run from scratch.

"esm2": normal weights of a small standard deviation, zero biases.

"local": the same, but the query and key biases of half of the heads in the first half of the layers begin as
rotary patterns that peak at a fixed neighbour (-1, +1, -2, +2, ...). With rotary positions a constant query and key score as
a sum of cosines of the distance, so two bias vectors are enough to say "look at the residue before", and
training may move on from there. Short runs otherwise spend much of their time on finding the neighbours. The
architecture is unchanged.

In both the LM head's bias begins at the log frequencies of the training residues: step 0 is the unigram
model instead of a uniform guess.
"""

from __future__ import annotations

import numpy as np
import torch

from bioseq.backbones.packed.encoder import PackedEncoder

_STRENGTH = 3.5  # of the patterns; the residue beside the one meant gets about a quarter of its weight


def initialise(encoder: PackedEncoder, *, kind: str, std: float, seed: int, frequencies: np.ndarray) -> None:
    """Set all weights in place; a pure function of the arguments. `frequencies` [<= V] sum to 1."""
    encoder.init_weights(torch.Generator().manual_seed(seed), std=std)
    with torch.no_grad():
        if encoder.lm_head is not None:
            share = np.full(encoder.config.vocab_size, 1e-6)
            share[: len(frequencies)] += frequencies
            encoder.lm_head.bias.copy_(torch.from_numpy(np.log(share / share.sum())))
        if kind == "local":
            for i in range(encoder.config.n_layers):
                _look_at_neighbours(encoder, i)


def _look_at_neighbours(encoder: PackedEncoder, layer: int) -> None:
    heads, size = encoder.config.n_heads, encoder.config.head_dim
    # The first half of the layers gathers, with half of its heads; all others are free.
    count = min(16, heads // 2) if 2 * layer < encoder.config.n_layers else 0
    angles = 10000.0 ** (-np.arange(0, size, 2) / size)
    bias_3Hd = encoder.layers[layer].qkv.bias.view(3, heads, size)  # type: ignore[operator, union-attr]
    for head in range(count):
        offset = (head // 2 + 1) * (1 if head % 2 else -1)
        pattern = np.concatenate((np.cos(angles * offset), np.sin(angles * offset)))
        bias_3Hd[0, head] = torch.from_numpy(_STRENGTH * pattern)
        bias_3Hd[1, head] = torch.from_numpy(_STRENGTH * np.repeat([1.0, 0.0], size // 2))

"""What training asks of the encoder: the last layer at chosen tokens alone."""

from __future__ import annotations

import torch

from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_the_last_layer_at_chosen_tokens_equals_those_of_all() -> None:
    encoder = PackedEncoder(ModelConfig("t", 2, 32, 2, 64))
    encoder.init_weights(torch.Generator().manual_seed(0), std=0.2)
    cu, rows = _ends([20, 30]), torch.tensor([3, 7, 19, 20, 44])
    tokens = torch.randint(4, 24, (50,), generator=torch.Generator().manual_seed(1))
    results = []
    for chosen in (False, True):
        encoder.zero_grad()
        hidden = encoder(tokens, cu, 30, rows_K=rows) if chosen else encoder(tokens, cu, 30)[rows]
        encoder.logits(hidden).square().sum().backward()
        results.append((hidden.detach(), encoder.layers[0].up.weight.grad.clone()))  # type: ignore[operator, union-attr]
    assert results[1][0].shape == (5, 32)
    assert _relative(results[1][0], results[0][0]) < 1e-5 and _relative(results[1][1], results[0][1]) < 1e-5
    none = encoder(tokens, cu, 30, rows_K=rows[:0])  # a worker without masked residues
    assert none.shape == (0, 32)
    none.sum().backward()

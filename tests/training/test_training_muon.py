"""Muon against torch's own, step by step, and through a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bioseq.errors import SpecError
from training.pretrain.muon import Muon, orthogonal
from training.pretrain.records import checkpoint as checkpoints
from training.pretrain.run import run

_SHAPES = [(24, 8), (8, 8), (8, 32), (24, 8), (8, 8)]


def _matrices() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in _SHAPES]


def test_it_does_what_torch_does_matrix_by_matrix():
    ours, theirs = _matrices(), _matrices()
    settings = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}
    mine = Muon(ours, **settings)
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=draw)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
        for a, b in zip(ours, theirs):  # products in bfloat16, batched or not
            assert torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b) < 5e-3


def test_updates_are_nearly_orthogonal():
    stack = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(stack).float())
    assert values.min() > 0.5 and values.max() < 1.4


def test_a_resumed_run_is_the_run(tiny, tmp_path):
    whole = tiny(output=str(tmp_path / "whole"), optimiser__kind="muon")
    run(whole, progress=False)
    from training.corpus.corpus import open_corpus
    from training.pretrain.distributed.team import SINGLE
    from training.pretrain.loop import train
    from training.pretrain.records.run_folder import RunFolder

    part = tiny(output=str(tmp_path / "part"), optimiser__kind="muon")
    folder = RunFolder(tmp_path / "part", part, SINGLE, progress=False)
    folder.begin(0)
    train(part, open_corpus(part.corpus), SINGLE, folder, stop_after=11)
    folder.close()
    run(part.override({"resume": True}), progress=False)
    a, b = (checkpoints.last(tmp_path / name / "checkpoints") for name in ("whole", "part"))
    assert a is not None and b is not None and a.step == b.step == 20
    tensors = a.model() | a.optimizer()
    assert any(name.endswith("|momentum_buffer") for name in tensors)
    for name, value in (b.model() | b.optimizer()).items():
        assert torch.equal(value, tensors[name]), name


def test_it_is_refused_where_matrices_are_sharded(tiny):
    with pytest.raises(SpecError, match=r"optimiser\.kind"):
        tiny(optimiser__kind="muon", workers__parallel="fsdp")

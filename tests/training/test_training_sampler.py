from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioseq.errors import InputError, SequenceTooLongError, SpecError
from training.pretrain.sampler import Sampler, share


def _corpus(lengths, clusters=None):
    order = starts = None
    if clusters is not None:
        order = np.argsort(clusters, kind="stable")
        starts = np.append(np.flatnonzero(np.diff(np.asarray(clusters)[order], prepend=-1)), len(clusters))
    return SimpleNamespace(lengths=np.asarray(lengths, np.int32), cluster_order=order, cluster_starts=starts)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=200),
    budget=st.integers(62, 400),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_holds_every_record_once_and_no_batch_is_empty(lengths, budget, seed):
    sampler = Sampler(_corpus(lengths), seed=seed, tokens_per_step=budget, crop=60)
    for epoch in (0, 3):
        first = epoch * sampler.steps_per_epoch
        batches = [sampler.batch(first + i) for i in range(sampler.steps_per_epoch)]
        assert all(len(b) for b in batches)
        assert sorted(np.concatenate([b.records for b in batches]).tolist()) == list(range(len(lengths)))


def test_any_step_is_the_same_asked_alone_or_in_turn_and_epochs_differ():
    lengths = np.random.default_rng(0).integers(5, 50, 300)
    make = lambda: Sampler(_corpus(lengths), seed=7, tokens_per_step=300, crop=30)  # noqa: E731
    walked = make()
    inturn = [walked.batch(i) for i in range(2 * walked.steps_per_epoch)]
    for step in (0, 5, walked.steps_per_epoch + 1):
        alone = make().batch(step)
        for name in ("records", "starts", "lengths"):
            assert np.array_equal(getattr(alone, name), getattr(inturn[step], name))
    n = walked.steps_per_epoch
    assert [b.records.tolist() for b in inturn[:n]] != [b.records.tolist() for b in inturn[n:]]


def test_crops_lie_inside_and_move():
    sampler = Sampler(_corpus([100] * 50), seed=0, tokens_per_step=300, crop=20)
    items = [sampler.batch(i) for i in range(40)]
    starts = np.concatenate([i.starts for i in items])
    assert np.concatenate([i.lengths for i in items]).max() == 20
    assert starts.min() >= 0 and starts.max() <= 80 and len(set(starts.tolist())) > 30


def test_clusters_are_drawn_alike_whatever_their_size():
    clusters = [0] * 90 + [1] * 10
    sampler = Sampler(_corpus([8] * 100, clusters), seed=1, tokens_per_step=1000, crop=50, order="cluster")
    drawn = np.concatenate([sampler.batch(i).records for i in range(40)])
    assert np.mean(drawn < 90) == pytest.approx(0.5, abs=0.03)
    assert set(drawn.tolist()) == set(range(100))
    assert all(int(sampler.batch(i).tokens.sum()) <= 1000 for i in range(40))


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(3, 100), min_size=1, max_size=80), world=st.integers(1, 9))
def test_workers_hold_every_place_once_within_budget_in_equal_turns(tokens, world):
    sizes = np.array(tokens)
    parts = [share(sizes, rank, world, 120) for rank in range(world)]
    assert sorted(int(p) for part in parts for group in part for p in group) == list(range(len(tokens)))
    assert len({len(part) for part in parts}) == 1
    assert all(sizes[g].sum() <= 120 for part in parts for g in part)
    loads = [sum(int(sizes[g].sum()) for g in part) for part in parts]
    assert max(loads) - min(loads) <= sizes.max()


def test_refusals_name_the_field():
    with pytest.raises(InputError, match="empty"):
        Sampler(_corpus([]), seed=0, tokens_per_step=10, crop=5)
    with pytest.raises(SpecError, match=r"tokens_per_step.*longest sequence \(52 tokens\)"):
        Sampler(_corpus([50]), seed=0, tokens_per_step=40, crop=100)
    with pytest.raises(SpecError, match="sampling"):
        Sampler(_corpus([5]), seed=0, tokens_per_step=40, crop=100, order="cluster")
    with pytest.raises(SequenceTooLongError, match="100 tokens do not fit"):
        share(np.array([100]), 0, 1, 60)

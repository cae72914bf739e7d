"""The planner, packing, windows and their taper: properties over drawn lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioseq.errors import SequenceTooLongError
from bioseq.inference.batching import SPECIAL_TOKENS, Window, pack, plan, taper, windows
from bioseq.sequences.alphabet import protein

lengths_and_budget = st.integers(1, 60).flatmap(
    lambda budget: st.tuples(st.lists(st.integers(1, budget), max_size=60), st.just(budget))
)


@settings(max_examples=300)
@given(lengths_and_budget, st.booleans(), st.none() | st.integers(1, 8))
def test_every_item_once_within_the_budget_and_no_empty_batch(drawn, sort, max_items):
    lengths, budget = drawn
    groups = plan(lengths, budget, sort=sort, max_items=max_items)
    assert sorted(i for g in groups for i in g.tolist()) == list(range(len(lengths)))
    for group in groups:
        assert 0 < len(group) <= (max_items or len(lengths))
        assert sum(lengths[i] for i in group) <= budget


@settings(max_examples=200)
@given(lengths_and_budget, st.booleans())
def test_batches_are_as_full_as_the_order_allows(drawn, sort):
    """The first item of a batch would not have fitted into the one before it: no batch is closed early."""
    lengths, budget = drawn
    groups = plan(lengths, budget, sort=sort)
    for one, two in zip(groups, groups[1:]):
        assert sum(lengths[i] for i in one) + lengths[two[0]] > budget


@settings(max_examples=200)
@given(lengths_and_budget)
def test_sorted_plans_run_longest_first_with_ties_by_place(drawn):
    lengths, budget = drawn
    order = [i for g in plan(lengths, budget) for i in g.tolist()]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    assert [i for g in plan(lengths, budget, sort=False) for i in g.tolist()] == list(range(len(lengths)))


def test_plans_take_arrays_and_lists_alike():
    a = plan([3, 9, 4, 4], 10)
    b = plan(np.array([3, 9, 4, 4], dtype=np.int32), 10)
    assert [g.tolist() for g in a] == [g.tolist() for g in b] == [[1], [2, 3], [0]]
    assert all(g.dtype == np.int64 for g in a)


def test_no_items_no_batches():
    assert plan([], 10) == []


@given(st.lists(st.integers(1, 20), max_size=10), st.integers(1, 5))
def test_an_over_long_item_is_refused_and_named(lengths, over):
    at = len(lengths)
    with pytest.raises(SequenceTooLongError, match=f"{20 + over} tokens do not fit a batch of 20") as caught:
        plan([*lengths, 20 + over, *lengths], 20)
    assert caught.value.index == at


@pytest.mark.parametrize("length", [0, -1])
def test_items_without_tokens_are_refused(length):
    with pytest.raises(ValueError, match=f"item 1 has {length} tokens"):
        plan([3, length], 10)


@settings(max_examples=100)
@given(st.lists(st.text("MKLAG", min_size=1, max_size=9), min_size=1, max_size=8), st.data())
def test_a_pack_can_be_cut_back_into_its_sequences(texts, data):
    alphabet = protein()
    ids = [alphabet.encode(t).ids for t in texts]
    index = np.array(data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, unique=True)))
    batch = pack(ids, index, cls_id=alphabet.cls_id, eos_id=alphabet.eos_id)
    assert batch.tokens.dtype == np.int64 and batch.cu_seqlens.dtype == np.int32
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.tokens) == batch.n_tokens
    assert len(batch) == len(index)
    assert batch.max_seqlen == max(len(texts[i]) for i in index) + SPECIAL_TOKENS
    for i, start, end in zip(batch.index, batch.cu_seqlens, batch.cu_seqlens[1:]):
        assert alphabet.decode(batch.tokens[start:end]) == f"<cls>{texts[i]}<eos>"


def test_a_pack_does_not_touch_its_input():
    ids = [protein().encode("MKL").ids]
    before = ids[0].copy()
    batch = pack(ids, np.array([0]), cls_id=0, eos_id=2)
    batch.tokens[:] = 0
    assert (ids[0] == before).all()


window_settings = st.integers(1, 40).flatmap(
    lambda size: st.tuples(st.integers(1, 200), st.just(size), st.integers(0, size - 1))
)


@settings(max_examples=300)
@given(window_settings)
def test_windows_cover_everything_and_overlap_enough(drawn):
    length, size, overlap = drawn
    cover = windows(length, size, overlap)
    assert cover[0].start == 0 and cover[-1].end == length
    assert all(w.end - w.start == min(size, length) for w in cover)
    for one, two in zip(cover, cover[1:]):
        assert one.start < two.start
        assert one.end - two.start >= overlap
        assert two.start <= one.end
    # and not one window more than needed
    if length > size:
        assert len(cover) == -(-(length - overlap) // (size - overlap))


def test_windows_of_the_house():
    assert windows(1022, 1022, 256) == [Window(0, 1022)]
    assert windows(1023, 1022, 256) == [Window(0, 1022), Window(1, 1023)]
    assert windows(1788, 1022, 256) == [Window(0, 1022), Window(766, 1788)]


@pytest.mark.parametrize("overlap", [-1, 10, 11])
def test_overlaps_that_never_end_are_refused(overlap):
    with pytest.raises(ValueError, match="overlap"):
        windows(30, 10, overlap)


@settings(max_examples=300)
@given(window_settings)
def test_taper_weights_sum_to_one_at_every_residue(drawn):
    length, size, overlap = drawn
    cover = windows(length, size, overlap)
    weights = taper(cover, overlap)
    total = np.zeros(length)
    for window, weight in zip(cover, weights, strict=True):
        assert weight.dtype == np.float32 and len(weight) == window.end - window.start
        assert (weight > 0).all()
        total[window.start : window.end] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_taper_is_linear_over_an_overlap_of_two():
    first, second = taper([Window(0, 6), Window(3, 9)], 3)
    np.testing.assert_allclose(first, [1, 1, 1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(second, [0.25, 0.5, 0.75, 1, 1, 1])


@settings(max_examples=100)
@given(window_settings, st.integers(0, 2**32 - 1))
def test_what_all_windows_agree_on_comes_back_unchanged(drawn, seed):
    length, size, overlap = drawn
    values = np.random.default_rng(seed).normal(size=length)
    merged = np.zeros(length)
    cover = windows(length, size, overlap)
    for window, weight in zip(cover, taper(cover, overlap)):
        merged[window.start : window.end] += values[window.start : window.end] * weight
    np.testing.assert_allclose(merged, values, atol=1e-5)

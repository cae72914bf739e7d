from __future__ import annotations

import numpy as np
import pytest

from bioseq.errors import SpecError
from bioseq.sequences.alphabet import protein
from bioseq.sequences.masking import Masking, mask

A = protein()


def _ids(count: int) -> np.ndarray:
    return np.random.default_rng(1).choice(A.standard_ids, size=count).astype(np.uint8)


def test_shares_are_80_10_10_of_the_chosen_not_of_what_is_left():
    ids = np.full(400_000, A.id("A"), dtype=np.uint8)
    out, places = mask(ids, np.random.default_rng(0), mask_id=A.mask_id, letters=A.standard_ids)
    chosen = out[places]
    assert len(places) / len(ids) == pytest.approx(0.15, abs=0.003)
    assert np.mean(chosen == A.mask_id) == pytest.approx(0.8, abs=0.006)
    # One random letter in 20 is the letter that was there: 10 % kept and 0.5 % more that look kept.
    assert np.mean(chosen == A.id("A")) == pytest.approx(0.105, abs=0.005)
    others = chosen[(chosen != A.mask_id) & (chosen != A.id("A"))]
    counts = np.bincount(others, minlength=33)
    assert set(np.flatnonzero(counts)) == set(A.standard_ids.tolist()) - {A.id("A")}
    assert counts[counts > 0].min() > 0.85 * counts[counts > 0].mean()


def test_what_is_not_chosen_is_untouched_and_the_input_too():
    ids = _ids(5000)
    before = ids.copy()
    out, places = mask(ids, np.random.default_rng(3), mask_id=A.mask_id, letters=A.standard_ids)
    rest = np.setdiff1d(np.arange(len(ids)), places)
    assert np.array_equal(out[rest], ids[rest]) and np.array_equal(ids, before)
    assert np.all(np.diff(places) > 0)


def test_exactly_one_draw_a_residue_is_taken_from_the_generator():
    ids = _ids(777)
    used, counted = np.random.default_rng(5), np.random.default_rng(5)
    mask(ids, used, mask_id=A.mask_id, letters=A.standard_ids)
    counted.random(777)
    assert used.random() == counted.random()


def test_a_mask_only_masking_never_shows_the_answer():
    ids = _ids(2000)
    how = Masking(rate=0.5, mask=1.0, random=0.0)
    out, places = mask(ids, np.random.default_rng(0), mask_id=A.mask_id, letters=A.standard_ids, how=how)
    assert np.all(out[places] == A.mask_id) and 900 < len(places) < 1100


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("rate", {"rate": 0.0}),
        ("rate", {"rate": 1.0}),
        ("mask", {"mask": 1.2}),
        ("random", {"mask": 0.9, "random": 0.2}),
    ],
)
def test_impossible_shares_name_their_field(field, values):
    with pytest.raises(SpecError, match=f"masking.{field}"):
        Masking(**values)

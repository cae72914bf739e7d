"""Reliability: rising, honest on held-back pairs, and refused for few labels."""

from __future__ import annotations

import numpy as np
import pytest

from bioseq.errors import InputError
from bioseq.vectors.annotate import Annotator, calibrate


def test_the_curve_follows_the_share_of_right_labels() -> None:
    rng = np.random.default_rng(0)
    x = rng.random(4000)
    curve = calibrate(x, rng.random(4000) < x)
    at = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(curve.at(at), at, atol=0.08)
    assert (np.diff(curve.share) >= 0).all() and curve.error < 0.06 and curve.pairs == 4000


def test_similarity_that_says_nothing_gives_the_mean() -> None:
    rng = np.random.default_rng(1)
    curve = calibrate(rng.random(2000), rng.random(2000) < 0.3)
    assert abs(float(curve.at(np.array([0.5]))[0]) - 0.3) < 0.06


def test_a_protein_is_not_its_own_neighbour_and_few_labels_are_refused() -> None:
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(5, 8)) * 5
    rows = np.concatenate([c + rng.normal(size=(10, 8)) for c in centres]).astype(np.float32)
    labels = [str(n // 10) for n in range(50)]
    rows[1] = rows[0]  # equal vectors are two proteins
    found = Annotator(rows, labels)
    assert (found.left_out != np.arange(50)).all() and found.left_out[0] == 1
    assert found.right.mean() > 0.9 and found.share_right(0.5) >= found.right.mean() - 0.05
    place, similarity, sure = found.annotate(centres)
    assert [labels[p] for p in place] == list("01234") and (sure > 0.7).all() and (similarity > 0.8).all()
    with pytest.raises(InputError, match="19 labelled proteins; 20 are needed"):
        Annotator(rows[:19], labels[:19])

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioseq.homologs.database import GAP, LETTERS, OTHER
from bioseq.homologs.hits import Hits, encode, no_hits
from bioseq.homologs.matrix import BACKGROUND, BLOSUM62, conditional, evolved
from bioseq.homologs.profile import (
    MAX_SEQUENCES,
    ProfileParameters,
    composition,
    default_parameters,
    load_profile,
    profile,
    sequence_weights,
)


def hits_of(query: str, rows: list[str]) -> Hits:
    aligned = np.array([[GAP if a == "-" else encode(a)[0] for a in r] for r in rows], dtype=np.uint8)
    own = encode(query)
    both = (aligned < OTHER) & (own < OTHER)
    identity = (both & (aligned == own)).sum(1) / np.maximum(both.sum(1), 1)
    zeros = np.zeros(len(rows))
    ids = tuple(str(i) for i in range(len(rows)))
    return Hits(query, ids, np.arange(len(rows)), zeros, zeros, identity, zeros, aligned)


def slow_weights(aligned: np.ndarray) -> np.ndarray:
    out = []
    for one in aligned:
        known = one < OTHER
        near = sum(((other == one) & known).sum() >= 0.8 * known.sum() - 1e-9 for other in aligned)
        out.append(1 / near)
    return np.array(out)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 150), st.integers(0, 10_000))
def test_weights_equal_the_definition(count: int, length: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 22, length)
    aligned = np.where(draw.random((count, length)) < 0.85, base, draw.integers(0, 22, (count, length)))
    aligned = aligned.astype(np.uint8)
    assert sequence_weights(aligned) == pytest.approx(slow_weights(aligned))


def test_copies_count_as_one_sequence() -> None:
    row = "MKTAYIAKQRQISFVKSHFS"
    one = profile(hits_of(row, [row]))
    many = profile(hits_of(row, [row] * 9))
    assert many.neff == pytest.approx(1) and many.n_homologs == 9
    assert many.log_probs == pytest.approx(one.log_probs)
    assert many.depth == pytest.approx(one.depth)


def test_rows_are_probabilities_and_follow_the_evidence() -> None:
    query = "MKTAYIAKQR"
    rows = ["MKTAWIAKQR", "MRSAWLGKHR", "MKTGWIVKQK", "LKTAWVAEQR"]
    found = profile(hits_of(query, rows))
    assert found.probs.sum(1) == pytest.approx(np.ones(10), abs=1e-5)
    few = profile(hits_of(query, rows[:1]))
    w = LETTERS.index("W")
    assert found.probs[4, w] > few.probs[4, w] > profile(no_hits(query)).probs[4, w]
    assert found.probs[4].argmax() == w


def test_a_place_does_not_see_its_own_residue() -> None:
    rows = ["MKTAWIAKQR", "MRSAWLGKHR"]
    one = hits_of("MKTAYIAKQR", rows)
    hidden = Hits("MKTAXIAKQR", *(getattr(one, n) for n in Hits.__slots__[1:]))
    assert profile(hidden).log_probs[4] == pytest.approx(profile(one).log_probs[4], abs=1e-6)


def test_without_homologs_the_composition_speaks() -> None:
    found = profile(no_hits("AAAAAAAAAAAAXAAAAAAAAAAAA"))
    assert found.n_homologs == 0 and found.neff == 0 and (found.depth == 0).all()
    assert found.probs[12, 0] > 2 * BACKGROUND[0]
    nothing = profile(no_hits("XXXX"))
    assert nothing.probs == pytest.approx(np.tile(BACKGROUND, (4, 1)), abs=1e-6)


def test_local_composition_is_the_sum_of_the_definition() -> None:
    query = "MKTAYIAKQRXISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEK" * 4
    whole, local = composition(query, 12.0)
    codes = encode(query)
    expected = np.zeros_like(local)
    for i in range(len(query)):
        for j in range(max(0, i - 96), min(len(query), i + 97)):
            if i != j and codes[j] < OTHER:
                expected[i, codes[j]] += np.exp(-abs(i - j) / 12)
    assert local == pytest.approx(expected, abs=1e-9)
    assert (whole.sum(1) == (codes < OTHER).sum() - (codes < OTHER)).all()


def test_a_deep_alignment_is_bounded() -> None:
    query = "MKTAYIAKQR"
    draw = np.random.default_rng(0)
    rows = ["".join(draw.choice(list(LETTERS), 10)) for _ in range(MAX_SEQUENCES + 500)]
    found = profile(hits_of(query, rows))
    assert found.n_homologs == MAX_SEQUENCES + 500 and found.neff <= MAX_SEQUENCES


def test_the_matrix_is_blosum62_and_reversible() -> None:
    from Bio.Align import substitution_matrices

    given_ = substitution_matrices.load("BLOSUM62")
    assert all(given_[a][b] == BLOSUM62[i, j] for i, a in enumerate(LETTERS) for j, b in enumerate(LETTERS))
    p = conditional()
    assert p.sum(1) == pytest.approx(np.ones(20))
    assert BACKGROUND[:, None] * p == pytest.approx((BACKGROUND[:, None] * p).T)
    steps = evolved((1.0, 2.0))
    assert steps[0] == pytest.approx(p, abs=2e-6) and steps[1] == pytest.approx(p @ p, abs=1e-4)


def test_a_profile_is_stored_small_and_read_back(tmp_path: Path) -> None:
    found = profile(hits_of("MKTAYIAKQR", ["MKTAWIAKQR", "MRSAWLGKHR"]))
    found.save(tmp_path / "p.npz")
    again = load_profile(tmp_path / "p.npz")
    assert again.query == found.query and again.n_homologs == 2 and again.neff == found.neff
    assert again.log_probs == pytest.approx(found.log_probs, abs=5e-3)


def test_strengths_round_trip() -> None:
    shipped = default_parameters()
    assert ProfileParameters.from_json(shipped.to_json()) == shipped

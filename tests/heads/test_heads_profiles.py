"""Profile blocks: what they say with and without homologs, in one head and in parts."""

from __future__ import annotations

import numpy as np
import pytest

from bioseq.errors import BundleError
from bioseq.heads.profiles import (
    POOLED_WIDTH,
    check_reference,
    pooled_profile,
)
from bioseq.heads.relatives import Links, Relatives, joined
from bioseq.homologs.hits import encode, no_hits
from bioseq.homologs.profile import profile

QUERY = "MKTAYIAKQRQISFVKSHFSRQ"


def hits(*rows: str):
    """Hits of QUERY, aligned from its first residue."""
    aligned = np.full((len(rows), len(QUERY)), 21, np.uint8)
    for n, row in enumerate(rows):
        aligned[n, : len(row)] = encode(row)
    one = no_hits(QUERY)
    ones = np.ones(len(rows))
    return type(one)(
        QUERY, tuple("abc"[: len(rows)]), np.arange(len(rows)), 100 * ones, ones, 0.5 * ones, ones, aligned
    )


def test_a_column_without_homologs_says_nothing_and_one_with_them_names_their_residue():
    block = profile(hits("MKWAYIAKQR")).columns()
    assert block.shape == (len(QUERY), 21) and block.dtype == np.float32
    assert not block[10:].any()
    assert block[2, :20].argmax() == encode("W")[0] and block[2, 20] > 0
    assert not profile(no_hits(QUERY)).columns().any()


def test_the_pooled_block_is_the_sequences_own_composition_without_homologs():
    alone, told = pooled_profile(profile(no_hits(QUERY))), pooled_profile(profile(hits("WWWWWWWWWW")))
    assert alone.shape == (POOLED_WIDTH,)
    own = np.bincount(encode(QUERY), minlength=20)[:20] / len(QUERY)
    assert alone[:20] == pytest.approx(own, abs=1e-6) and alone[-4] == 0 and alone[-2] == 0
    tryptophan = encode("W")[0]
    assert told[tryptophan] > 0.1 > alone[tryptophan]
    assert told[-4] == pytest.approx(np.log10(2)) and told[-2] == pytest.approx(10 / len(QUERY))


def test_relatives_of_parts_join_to_those_of_the_whole():
    def links(owner, keys):
        ones = np.ones(len(keys))
        return Links(max(owner) + 1, np.array(owner), np.array(keys), ones, ones, ones)

    a = Relatives(links([0, 0], [3, 4]), None, [np.zeros((2, 21))])
    b = Relatives(links([0, 1], [5, 6]), None, [np.ones((3, 21)), np.ones((1, 21))])
    both = joined([a, b])
    assert both.links.count == 3 and both.links.owner.tolist() == [0, 0, 1, 2]
    assert [len(p) for p in both.profiles] == [2, 3, 1] and both.labels is None
    back = both.take(np.array([2, 0]))
    assert back.links.keys.tolist() == [6, 3, 4] and [len(p) for p in back.profiles] == [1, 2]


def test_a_head_of_another_reference_set_is_refused():
    with pytest.raises(BundleError, match="reference set 0000"):
        check_reference("h", "0" * 64)

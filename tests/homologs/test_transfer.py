from __future__ import annotations

import numpy as np
import pytest

from bioseq.homologs.hits import NOWHERE, Hits, no_hits
from bioseq.homologs.reference import build_reference
from bioseq.homologs.search import search
from bioseq.homologs.transfer import nearest, transfer, transfer_residues, without
from bioseq.sequences.fasta import Record

QUERY = "MKTAYIAKQR"


def made(keys, bits, identity, places) -> Hits:
    n = len(keys)
    return Hits(
        QUERY,
        tuple(f"p{k}" for k in keys),
        np.array(keys, np.int64),
        np.array(bits, float),
        np.full(n, 1e-5),
        np.array(identity, float),
        np.full(n, 0.9),
        np.zeros((n, len(QUERY)), np.uint8),
        np.array(places, np.uint16).reshape(n, len(QUERY)),
    )


def test_values_are_the_stated_formula() -> None:
    hits = made([0, 2], [40.0, 20.0], [0.5, 0.3], [[NOWHERE] * 10] * 2)
    labels = np.array([[1.0, np.nan], [0.0, 0.0], [0.0, 1.0]])
    prior = np.array([0.2, 0.1])
    values, evidence = transfer([hits, no_hits(QUERY)], labels, prior)
    assert values[0] == pytest.approx([(1600 + 200) / 3000, (400 + 100) / 1400])
    assert values[1] == pytest.approx(prior)
    assert evidence == pytest.approx([2000 / 3000, 0.0])


def test_a_rows_own_label_and_its_copies_stay_out() -> None:
    hits = made([3, 1, 2], [90.0, 80.0, 30.0], [1.0, 0.97, 0.4], [[NOWHERE] * 10] * 3)
    left = without(hits, 3, above_identity=0.95)
    assert left.ids == ("p2",)
    assert nearest(left).identity == 0.4
    assert nearest(no_hits(QUERY)) is None


def test_residue_labels_follow_the_alignment() -> None:
    places = [NOWHERE] * 10
    places[2:6] = [0, 1, 3, 4]  # the hit has a residue more between columns 3 and 4
    hits = made([1], [50.0], [0.6], [places])
    states = [np.zeros(5, int), np.array([0, 1, 2, 1, -1])]
    prior = np.array([0.5, 0.3, 0.2])
    (values,), (evidence,) = transfer_residues([hits], states, prior)
    share = 1000 / 3500
    assert values[2] == pytest.approx(share * prior + [1 - share, 0, 0])
    assert values[4] == pytest.approx(share * prior + [0, 1 - share, 0])
    for column in (0, 5, 9):  # not aligned, or aligned to an unknown label
        assert values[column] == pytest.approx(prior) and evidence[column] == pytest.approx(0)
    assert values.sum(1) == pytest.approx(np.ones(10))


def test_places_of_a_real_search_name_the_aligned_residues(tmp_path, data) -> None:
    from bioseq.sequences.fasta import read_fasta

    records = [r for r in read_fasta(data / "proteins_30_1000.fasta") if len(r.sequence) < 400][:20]
    # each protein with five residues cut out of its middle, and a tag before it
    changed = [Record(r.id, "MHHHHHH" + r.sequence[:20] + r.sequence[25:], "") for r in records]
    reference = build_reference(changed, tmp_path / "ref")
    found = search([r.sequence for r in records], reference, places=True, quiet=True)
    letters = "ACDEFGHIKLMNPQRSTVWYX-"
    aligned = 0
    for record, hits in zip(records, found, strict=True):
        assert record.id in hits.ids
        for row, at, key in zip(hits.aligned, hits.places, hits.keys, strict=True):
            target = changed[int(key)].sequence
            for code, place in zip(row.tolist(), at.tolist(), strict=True):
                assert (place == NOWHERE) == (letters[code] == "-")
                if place != NOWHERE and letters[code] != "X":
                    assert target[place] == letters[code]
                    aligned += 1
    assert aligned > 1000
    plain = search([r.sequence for r in records], reference, quiet=True)
    assert all(p.places is None and p.ids == f.ids for p, f in zip(plain, found, strict=True))

"""Nearest vectors: exact against a plain sort, the index against the exact answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bioseq.errors import SpecError, VectorStoreError
from bioseq.vectors import search as searching
from bioseq.vectors.search import build_index, index_path, measure_recall, search
from bioseq.vectors.settings import VectorSettings
from bioseq.vectors.store import VectorStore, sequence_key

D = 16


def fill(path: Path, rows: np.ndarray, first: int = 0) -> VectorStore:
    store = VectorStore(path, VectorSettings(weights_hash="sha256:a", width=D))
    store.add([sequence_key(str(i)) for i in range(first, first + len(rows))], list(rows))
    return store


def draw(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)


def test_exact_search_equals_a_plain_sort_over_several_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "BLOCK", 7)
    monkeypatch.setattr(searching, "QUERIES", 3)
    rows, queries = draw(50), draw(8, seed=1)
    found = search(fill(tmp_path, rows), queries, k=9)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    true = unit(queries) @ unit(rows).T
    np.testing.assert_array_equal(found.places, np.argsort(-true, axis=1, kind="stable")[:, :9])
    np.testing.assert_allclose(found.similarity, -np.sort(-true, axis=1)[:, :9], rtol=1e-5)
    assert found.exact


def test_equal_vectors_are_ordered_by_place_and_k_may_exceed_the_store(tmp_path: Path) -> None:
    found = search(fill(tmp_path, np.ones((4, D), np.float32)), np.ones((1, D)), k=10)
    assert found.places.tolist() == [[0, 1, 2, 3]]


def test_an_empty_store_and_no_queries_give_nothing(tmp_path: Path) -> None:
    store = fill(tmp_path, draw(0))
    assert search(store, draw(2), k=3).places.shape == (2, 0)
    assert search(store, draw(0), k=3).places.shape[0] == 0


@pytest.mark.parametrize(
    ("queries", "k", "match"),
    [
        (np.ones((1, D + 1)), 3, "16"),
        (np.ones(D), 3, "is needed"),
        (np.full((1, D), np.nan), 3, "not finite"),
        (np.ones((1, D)), 0, "below 1"),
    ],
)
def test_bad_queries_are_refused(tmp_path: Path, queries: np.ndarray, k: int, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        search(fill(tmp_path, draw(3)), queries, k=k)


def test_a_search_by_an_index_that_is_not_there_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(VectorStoreError, match="vectors index"):
        search(fill(tmp_path, draw(3)), draw(1), exact=False)


def test_the_index_finds_nearly_all_and_what_was_added_later(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    rows = draw(3000)
    store = fill(tmp_path, rows)
    assert build_index(store, threads=1) == 3000
    assert measure_recall(store, draw(50, seed=2), k=10) > 0.9
    late = draw(5, seed=3)
    fill(tmp_path, late, first=3000)
    found = search(store, late, k=3, exact=False)
    assert found.places[:, 0].tolist() == list(range(3000, 3005)) and not found.exact
    assert build_index(store, threads=1) == 3005
    assert search(store, late[:1], k=3, exact=False).places[0, 0] == 3000


def test_a_damaged_index_is_refused_and_the_exact_search_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    store = fill(tmp_path, draw(30))
    index_path(store).write_bytes(b"no index")
    with pytest.raises(VectorStoreError, match="build the index again"):
        search(store, draw(1), exact=False)
    assert search(store, draw(1)).exact

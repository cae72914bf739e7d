"""The nearest vectors of a store by cosine similarity: exact, or by an index of neighbours (usearch, HNSW).

The index is a file that can be made again from the store. Vectors that were added after it was built are searched
exactly, so an answer never leaves out a new protein.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.errors import MissingExtraError, SpecError, VectorStoreError
from bioseq.output import atomic_file
from bioseq.vectors.store import VectorStore

EXACT_UP_TO = 1_000_000
BLOCK = 16384  # rows of the store that are compared at a time
QUERIES = 1024  # queries that are compared at a time
_EXPANSION = 128  # candidates that the index keeps while it searches, at least


@dataclass(frozen=True, slots=True)
class Neighbours:
    """`places` int64 [Q, k] in the store and their `similarity` float32 [Q, k], best first; fewer than k vectors
    give fewer columns. `exact` says how they were found."""

    places: np.ndarray
    similarity: np.ndarray
    exact: bool


def search(
    store: VectorStore, queries: np.ndarray, k: int = 10, *, exact: bool | None = None, threads: int = 0
) -> Neighbours:
    """The k nearest of each query, float [Q, D]. By default exact up to `EXACT_UP_TO` vectors, and beyond where no
    index was built. Equal similarities are ordered by place."""
    queries = np.asarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != store.settings.width:
        raise SpecError(
            f"the shape is {queries.shape}; [Q, {store.settings.width}] is needed.", field="queries"
        )
    if not np.isfinite(queries).all():
        raise SpecError("a query holds values that are not finite.", field="queries")
    if k < 1:
        raise SpecError(f"{k} is below 1.", field="k")
    rows = store.matrix()
    if exact is None:
        exact = len(rows) <= EXACT_UP_TO or not index_path(store).is_file()
    unit = unit_rows(queries)
    best: list[Neighbours] = []
    for at in range(0, len(unit), QUERIES):
        some = unit[at : at + QUERIES]
        best.append(search_rows(rows, some, k) if exact else _approximate(store, rows, some, k, threads))
    if not best:
        return Neighbours(np.empty((0, 0), np.int64), np.empty((0, 0), np.float32), exact)
    return Neighbours(
        np.concatenate([b.places for b in best]), np.concatenate([b.similarity for b in best]), exact
    )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; zero stays zero."""
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def search_rows(rows: np.ndarray, unit: np.ndarray, k: int, first: int = 0) -> Neighbours:
    """The exact k nearest of unit vectors among `rows` from `first` on."""
    places = np.empty((len(unit), 0), np.int64)
    similarity = np.empty((len(unit), 0), np.float32)
    for at in range(first, len(rows), BLOCK):
        block = unit @ unit_rows(rows[at : at + BLOCK]).T
        keep = min(k, block.shape[1])
        if keep < block.shape[1]:
            columns = np.argpartition(-block, keep - 1, axis=1)[:, :keep]
        else:
            columns = np.broadcast_to(np.arange(keep), block.shape)
        places, similarity = _merge(
            k, places, similarity, columns + at, np.take_along_axis(block, columns, axis=1)
        )
    return Neighbours(places, similarity, True)


def _merge(k: int, *pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    places, similarity = np.concatenate(pairs[::2], axis=1), np.concatenate(pairs[1::2], axis=1)
    order = np.lexsort((places, -similarity), axis=1)[:, :k]
    return np.take_along_axis(places, order, axis=1), np.take_along_axis(similarity, order, axis=1)


def index_path(store: VectorStore) -> Path:
    return store.path / "neighbours.usearch"


def _usearch() -> Any:
    try:
        from usearch import index
    except ImportError:
        raise MissingExtraError("usearch", "vectors") from None
    return index


def _open_index(store: VectorStore, *, view: bool) -> Any:
    path = index_path(store)
    if not path.is_file():
        raise VectorStoreError(
            f"{store.path} has no index.",
            code="vectors.no_index",
            hint="Build it with: bioseq vectors index STORE",
        )
    try:
        found = _usearch().Index.restore(str(path), view=view)
    except (RuntimeError, ValueError, OSError) as error:
        raise VectorStoreError(
            f"{path}: {error}.", hint="Delete the file and build the index again."
        ) from None
    if found is None or found.ndim != store.settings.width or len(found) > len(store):
        raise VectorStoreError(
            f"{path} is not an index of this store.", hint="Delete the file and build the index again."
        )
    return found


def build_index(store: VectorStore, *, threads: int = 0, progress: Any = None) -> int:
    """Make the index, or add to it what the store has gained; the number of vectors in it. `threads` 0 is all cores.
    The new file takes the place of the old one when it is whole."""
    rows = store.matrix()
    if index_path(store).is_file():
        index = _open_index(store, view=False)
    else:
        index = _usearch().Index(ndim=store.settings.width, metric="cos", dtype="f16")
    threads = threads or len(os.sched_getaffinity(0))
    for at in range(len(index), len(rows), BLOCK):
        block = unit_rows(rows[at : at + BLOCK])
        index.add(np.arange(at, at + len(block), dtype=np.uint64), block, threads=threads)
        if progress is not None:
            progress.add(len(block))
    with atomic_file(index_path(store), force=True) as temporary:
        index.save(str(temporary))
    return len(index)


def _approximate(store: VectorStore, rows: np.ndarray, unit: np.ndarray, k: int, threads: int) -> Neighbours:
    """By the index, and exactly among the vectors behind it. Similarities are computed again from the rows, as the
    index holds them in half precision."""
    index = _open_index(store, view=True)
    index.expansion_search = max(_EXPANSION, 2 * k)
    indexed = len(index)
    keep = min(k, indexed)
    if not keep:
        return search_rows(rows, unit, k)
    found = index.search(unit, keep, threads=threads or len(os.sched_getaffinity(0)))
    counts = getattr(found, "counts", len(found.keys))  # one query has no counts
    if np.min(counts) < keep:  # parts of the graph cannot be reached
        return search_rows(rows, unit, k)
    places = np.asarray(found.keys, dtype=np.int64).reshape(len(unit), keep)
    vectors = unit_rows(rows[places.reshape(-1)]).reshape(*places.shape, -1)
    similarity = np.einsum("qkd,qd->qk", vectors, unit)
    late = search_rows(rows, unit, k, first=indexed)
    return Neighbours(*_merge(k, places, similarity, late.places, late.similarity), False)


def measure_recall(store: VectorStore, queries: np.ndarray, k: int = 10) -> float:
    """Share of the exact k nearest that the index finds."""
    near, true = search(store, queries, k, exact=False), search(store, queries, k, exact=True)
    same = [len(np.intersect1d(a, b)) for a, b in zip(near.places, true.places, strict=True)]
    return float(np.sum(same) / max(true.places.size, 1))

"""Search in vector stores: seconds, exact and by the index, and the index's recall, at several sizes.

    python benchmarks/vectors.py --sizes 10000,1000000

The vectors are drawn, as no set of 10^6 embeddings is shipped: families of some ten members around centres whose
spectrum falls as that of mean embeddings does (variance 1 / rank). Queries are new members of the families. Each
timed answer is checked: the nearest of a stored vector is itself, and exact answers equal a plain product on a part.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import host, versions, write_result

from bioseq.vectors.search import build_index, index_path, search
from bioseq.vectors.settings import VectorSettings
from bioseq.vectors.store import VectorStore

WIDTH, CHUNK, K = 320, 10_000, 10
SPREAD = 1 / np.sqrt(np.arange(1, WIDTH + 1))


@functools.lru_cache(1)
def centres_of(n_families: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n_families, WIDTH)).astype(np.float32) * SPREAD


def draw(n: int, n_families: int, seed: int) -> np.ndarray:
    centres = centres_of(n_families)
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(n, WIDTH)).astype(np.float32) * (0.5 * SPREAD)
    return (centres[rng.integers(n_families, size=n)] + noise).astype(np.float32)


def measure(size: int, n_queries: int, threads: int, folder: Path) -> dict[str, Any]:
    store = VectorStore(folder, VectorSettings(weights_hash="drawn", width=WIDTH))
    families, start = max(size // 10, 1), time.perf_counter()
    drawing = 0.0
    for at in range(0, size, CHUNK):
        before = time.perf_counter()
        rows = draw(min(CHUNK, size - at), families, 1 + at)
        drawing += time.perf_counter() - before
        store.add([hashlib.sha256(f"{at + i}".encode()).digest() for i in range(len(rows))], list(rows))
    found: dict[str, Any] = {
        "vectors": size,
        "add_seconds": time.perf_counter() - start - drawing,
        "store_bytes": sum(f.stat().st_size for f in folder.iterdir()),
    }
    queries = draw(n_queries, families, 999_999_937)
    for name, some in (("one", queries[:1]), ("batch", queries)):
        found[f"exact_{name}_seconds"], exact = timed(store, some, True, threads)
    rows = store.matrix()
    part = np.sort(np.random.default_rng(1).choice(size, 2000, replace=False))
    plain = (
        queries
        @ rows[part].T
        / (np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows[part], axis=1))
    )
    assert (exact.similarity[:, -1:] >= np.sort(plain, axis=1)[:, -K:][:, :1] - 1e-4).all()
    start = time.perf_counter()
    build_index(store, threads=threads)
    found |= {"index_seconds": time.perf_counter() - start, "index_bytes": index_path(store).stat().st_size}
    for name, some in (("one", queries[:1]), ("batch", queries)):
        found[f"index_{name}_seconds"], near = timed(store, some, False, threads)
    same = [len(np.intersect1d(a, b)) for a, b in zip(near.places, exact.places, strict=True)]
    found["recall_at_10"] = sum(same) / exact.places.size
    own = search(store, np.asarray(rows[part[:100]]), 1, exact=True)
    assert (own.places[:, 0] == part[:100]).all()
    return found


def timed(store: VectorStore, queries: np.ndarray, exact: bool, threads: int) -> tuple[float, Any]:
    """The median of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        answer = search(store, queries, K, exact=exact, threads=threads)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[1], answer


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", default="10000,1000000")
    p.add_argument("--queries", type=int, default=200)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", help="default: benchmarks/results/DATE-vectors.json")
    args = p.parse_args()
    sizes = []
    for size in map(int, args.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            sizes.append(measure(size, args.queries, args.threads, Path(folder)))
        print(sizes[-1], flush=True)
    result = {"width": WIDTH, "queries": args.queries, "threads": args.threads, "k": K, "sizes": sizes}
    print(write_result("vectors", result | {"host": host(), "versions": versions()}, args.out))


if __name__ == "__main__":
    main()

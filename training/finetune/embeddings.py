"""Embeddings of a table through the vector store of the cache folder, so that none is computed twice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bioseq.backbones.pooling import EmbedOptions
from bioseq.errors import OutputError, VectorStoreError
from bioseq.inference.vectors import embed_stored, open_cache, settings_of
from bioseq.progress import Progress

if TYPE_CHECKING:
    from bioseq.inference.predictor import Predictor
    from bioseq.vectors.store import VectorStore

CHUNK = 512
LARGEST = 2 << 30  # bytes of a table's embeddings that are still worth keeping


def cache_folder(given: str | None = None) -> Path:
    """The folder given, else $BIOSEQ_CACHE, else ~/.cache/bioseq."""
    return Path(given or os.environ.get("BIOSEQ_CACHE") or Path.home() / ".cache" / "bioseq")


def _store(
    predictor: Predictor, ask: EmbedOptions, sequences: Sequence[str], dtype: str, cache: str | None
) -> VectorStore | None:
    """The cache's store, or None where nothing is to be kept."""
    numbers = predictor.config.d_model * (sum(map(len, sequences)) if ask.per_residue else len(sequences))
    if not predictor.weights_hash or numbers * np.dtype(dtype).itemsize > LARGEST:
        return None
    try:
        return open_cache(cache_folder(cache), settings_of(predictor, ask, "window", stored=dtype))
    except (OutputError, VectorStoreError):
        return None  # a cache is a convenience


def embed_cached(
    predictor: Predictor,
    sequences: Sequence[str],
    *,
    ask: EmbedOptions | None = None,
    cache: str | None = None,
    label: str = "embedding",
    progress: bool = True,
) -> tuple[list[np.ndarray], bool]:
    """(embeddings in order, whether they all came from the cache). Pooled ones are float32 [D]; per residue they
    are float16 [L, D], which halves memory and costs less than the head's own noise. Long sequences are
    windowed. A cache that cannot be used is passed over. What a kill left out is computed again; a chunk is
    kept whole or not at all."""
    ask = ask or EmbedOptions()
    dtype = "float16" if ask.per_residue else "float32"
    store = _store(predictor, ask, sequences, dtype, cache)
    rows: list[np.ndarray] = []
    computed = 0
    with Progress(len(sequences), label, unit="sequences", enabled=progress) as bar:
        for at in range(0, len(sequences), CHUNK):
            queries = [
                predictor.prepare(s, embed=ask, long_sequences="window", index=at + i)
                for i, s in enumerate(sequences[at : at + CHUNK])
            ]
            if store is not None:
                try:
                    some, new = embed_stored(predictor, store, queries)
                    rows, computed = rows + some, computed + new
                    bar.add(len(queries))
                    continue
                except (OutputError, VectorStoreError):
                    store = None
            for result in predictor.run(queries):
                assert result.embedding is not None
                rows.append(result.embedding.astype(dtype))
            computed += len(queries)
            bar.add(len(queries))
    return rows, bool(rows) and not computed

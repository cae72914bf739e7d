"""Embeddings through a store: what it holds is read, the rest is computed and added, so nothing is embedded twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bioseq.backbones.pooling import EmbedOptions
from bioseq.errors import VectorStoreError
from bioseq.homologs.reading import READING
from bioseq.inference.predictor import LongSequences, Predictor
from bioseq.inference.query import Query
from bioseq.vectors.settings import VectorSettings
from bioseq.vectors.store import VectorStore, sequence_key


def settings_of(
    predictor: Predictor, options: EmbedOptions, long_sequences: LongSequences, *, stored: str = "float32"
) -> VectorSettings:
    """What the vectors of this predictor depend on. Raises `VectorStoreError` for weights without a hash."""
    if not predictor.weights_hash:
        raise VectorStoreError(
            "the model's weights have no hash.", hint="Load it from a bundle or the registry."
        )
    homologs = ""
    if predictor.reader is not None:
        homologs = f"{predictor.reader.reference.hash} {READING.hash}"
    elif predictor.config.reads_homologs:
        homologs = "none"
    return VectorSettings(
        weights_hash=predictor.weights_hash,
        width=predictor.config.d_model * (1 if options.per_residue else len(options.layers)),
        pooling=options.pooling,
        layers=tuple(layer % (predictor.config.n_layers + 1) for layer in options.layers),
        per_residue=options.per_residue,
        long_sequences=long_sequences,
        max_residues=predictor.max_residues,
        dtype=predictor.dtype,
        device=predictor.device.type,
        stored=stored,
        homologs=homologs,
    )


def embed_stored(
    predictor: Predictor, store: VectorStore, queries: Sequence[Query], names: Sequence[str] | None = None
) -> tuple[list[np.ndarray], int]:
    """(vectors in the order of `queries`, how many were computed). The queries must have been prepared with the
    store's own options. What is new is committed before this returns, all or none."""
    keys = [sequence_key(predictor.alphabet.decode(query.ids)) for query in queries]
    found = dict(zip(keys, store.get(keys), strict=True))
    missing = {key: query for key, query in zip(keys, queries) if found[key] is None}
    dtype = np.dtype(store.settings.stored)
    for key, result in zip(missing, predictor.run(list(missing.values())), strict=True):
        assert result.embedding is not None
        vector = result.embedding.astype(dtype)
        found[key] = vector if store.settings.per_residue else vector.reshape(-1)
    if missing or names is not None:
        store.add(keys, [found[key] for key in keys], names)  # type: ignore[misc]
    return [found[key] for key in keys], len(missing)  # type: ignore[misc]


def open_cache(folder: Path, settings: VectorSettings) -> VectorStore:
    """The store of these settings under a cache folder, which has one for each."""
    return VectorStore(folder / "vectors" / settings.hash, settings)

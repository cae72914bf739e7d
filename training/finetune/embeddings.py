"""Embeddings of a table, computed once: kept in a cache folder under the hash of what they depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.backbones.pooling import EmbedOptions
from bioseq.errors import OutputError
from bioseq.output import atomic_file
from bioseq.progress import Progress

if TYPE_CHECKING:
    from bioseq.inference.predictor import Predictor

CHUNK = 512
LARGEST = 2 << 30  # bytes of embeddings that are still worth a file


def cache_folder(given: str | None = None) -> Path:
    """The folder given, else $BIOSEQ_CACHE, else ~/.cache/bioseq."""
    return Path(given or os.environ.get("BIOSEQ_CACHE") or Path.home() / ".cache" / "bioseq")


def _key(predictor: Predictor, sequences: Sequence[str], ask: EmbedOptions, kept: str) -> str:
    digest = hashlib.sha256()
    settings: tuple[Any, ...] = (
        predictor.weights_hash,
        predictor.dtype,
        predictor.device.type,
        ask,
        kept,
        predictor.max_residues,
    )
    if predictor.config.reads_homologs and predictor.reader is None:
        settings += ("without homologs",)
    digest.update(repr(settings).encode())
    for s in sequences:
        digest.update(s.encode() + b"\n")
    return digest.hexdigest()


def embed_cached(
    predictor: Predictor,
    sequences: Sequence[str],
    *,
    ask: EmbedOptions | None = None,
    cache: str | None = None,
    label: str = "embedding",
    progress: bool = True,
) -> tuple[list[np.ndarray], bool]:
    """(embeddings in order, whether they came from the cache). Pooled ones are float32 [D]; per residue they
    are float16 [L, D], which halves memory and costs less than the head's own noise. Long sequences are
    windowed. An unwritable cache is passed over."""
    ask = ask or EmbedOptions()
    kept = np.float16 if ask.per_residue else np.float32
    file = cache_folder(cache) / f"{_key(predictor, sequences, ask, kept.__name__)}.safetensors"
    if predictor.weights_hash and file.is_file():
        return _read(file, sequences, ask), True
    rows: list[np.ndarray] = []
    with Progress(len(sequences), label, unit="sequences", enabled=progress) as bar:
        for at in range(0, len(sequences), CHUNK):
            chunk = sequences[at : at + CHUNK]
            queries = [
                predictor.prepare(s, embed=ask, long_sequences="window", index=at + i)
                for i, s in enumerate(chunk)
            ]
            for result in predictor.run(queries):
                assert result.embedding is not None
                rows.append(result.embedding.astype(kept))
            bar.add(len(chunk))
    if predictor.weights_hash and sum(r.nbytes for r in rows) <= LARGEST:
        _write(file, rows)
    return rows, False


def _write(file: Path, rows: list[np.ndarray]) -> None:
    from safetensors.numpy import save_file

    flat = np.concatenate([r.reshape(-1) for r in rows]) if rows else np.zeros(0, np.float32)
    shapes = np.array([r.shape for r in rows], dtype=np.int64)
    try:
        with atomic_file(file, force=True) as temporary:
            save_file({"values": flat, "shapes": shapes}, temporary)
    except OutputError:
        return  # a cache is a convenience


def _read(file: Path, sequences: Sequence[str], ask: EmbedOptions) -> list[np.ndarray]:
    from safetensors.numpy import load_file

    data = load_file(file)
    shapes = data["shapes"].tolist()
    ends = np.cumsum([int(np.prod(s)) for s in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(data["values"], ends[:-1]), shapes)]

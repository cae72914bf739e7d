"""Embeddings of a screening run through a vector store, so that nothing is embedded twice.

A vector that was computed in another batch differs in its last bits, and a run's bytes must not depend on how often it
was killed. So a run reads those vectors alone that the store held when the run began (their number is in the run's
manifest), whatever it and others add meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bioseq.errors import SpecError
from bioseq.vectors.store import VectorStore, sequence_key
from serving.screening.folder import RunFolder

if TYPE_CHECKING:
    from bioseq.inference.predictor import LongSequences, Predictor
    from bioseq.inference.query import Query, Result


def rows_of(vectors: str, output: Path) -> int:
    """How many vectors of the store a run reads: as its manifest says, else those that are there."""
    folder = RunFolder(output)
    told = folder.manifest().get("vectors") if folder.manifest_path.is_file() else None
    if told is not None and told["store"] == vectors:
        return int(told["rows"])
    return len(VectorStore(vectors)) if Path(vectors).is_dir() and any(Path(vectors).iterdir()) else 0


class Stored:
    """Raises `VectorStoreError` where the store holds other vectors, and `SpecError` where no head would read them."""

    def __init__(self, predictor: Predictor, path: str, rows: int, long_sequences: LongSequences):
        from bioseq.backbones.pooling import EmbedOptions
        from bioseq.inference.vectors import settings_of

        self.predictor, self.rows = predictor, rows
        bare = {n: h for n, h in predictor.heads.items() if h.route(n) is None}
        other = [n for n, h in bare.items() if h.embed_options != EmbedOptions()]
        if other or not bare:
            name = other[0] if other else next(iter(predictor.heads))
            raise SpecError(
                f"the head {name} reads more than mean embeddings of the last layer, so a store would save nothing.",
                field="vectors", hint="Leave --vectors out.",
            )  # fmt: skip
        self.store = VectorStore(path, settings_of(predictor, EmbedOptions(), long_sequences))

    def run(self, queries: Sequence[Query]) -> list[Result]:
        """`Predictor.run` of queries that ask for the embedding. What is new is committed before it returns."""
        keys = [sequence_key(self.predictor.alphabet.decode(q.ids)) for q in queries]
        for query, vector in zip(queries, self.store.get(keys, before=self.rows), strict=True):
            query.known = vector
        results = self.predictor.run(queries)
        self.store.add(keys, [r.embedding for r in results])  # type: ignore[misc]
        return results

"""Results of sequences, where an error costs only the sequence that causes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bioseq.errors import (
    ArtefactError,
    BioseqError,
    MissingExtraError,
    OutputError,
    ResourceError,
    SearchError,
    SequenceError,
    SpecError,
    VectorStoreError,
)


@dataclass(slots=True)
class Screened:
    """Of one sequence: `cells` of all heads, or `error` ("code: message"). `embedding` float32 [D] if asked."""

    cells: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    note: str | None = None
    embedding: np.ndarray | None = None


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | ResourceError):
        return True
    text = str(error)
    return (
        type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def isolate(
    compute: Callable[[list[int]], list[Screened]],
    places: list[int],
    search: Callable[[], None] | None = None,
) -> dict[int, Screened]:
    """Results by place; an error costs only the sequence that causes it, found by halving.

    Out of memory halves the batch, down to a sequence that does not fit alone. What concerns the whole run (a
    model file, the disk, a vector store, a setting) is raised. A search that fails for one sequence alone is the sequence's fault
    unless `search`, which searches for another one, raises too.
    """
    try:
        return dict(zip(places, compute(places), strict=True))
    except (ArtefactError, MissingExtraError, OutputError, SpecError, VectorStoreError, OSError):
        raise
    except Exception as error:
        if len(places) == 1:
            if isinstance(error, SearchError):
                if search is None:
                    raise
                search()
            if out_of_memory(error):
                text = "resource.insufficient: not enough memory for this record alone."
            elif isinstance(error, BioseqError):
                text = f"{error.code}: {error.bare if isinstance(error, SequenceError) else error.message}"
            else:
                # Only the kind: the text of a foreign exception may hold residues
                text = f"internal: {type(error).__name__} in the engine."
            return {places[0]: Screened(error=text)}
    # Outside of `except`, so that the failed batch's tensors are free while the halves run
    half = len(places) // 2
    return isolate(compute, places[:half], search) | isolate(compute, places[half:], search)

"""What travels between the ingress and an engine replica: plain frozen data, numpy arrays, no exceptions.

Errors come back as values, because a replica's raised exception would be logged with its text by machinery
that is not ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bioseq import errors
from bioseq.errors import BioseqError, SequenceError, ServiceError

if TYPE_CHECKING:
    from bioseq.heads.relatives import Relatives
    from bioseq.inference.evidence import Found, Homologs

Kind = Literal["embed", "predict", "logits", "score", "scan"]


@dataclass(frozen=True, slots=True)
class Ask:
    """A slice of a request for one exact backbone `model` ("NAME@V") and exact `heads`.

    `offset` is the place of the first sequence in the whole request, for error messages. `options` hold what
    is particular to the kind. `admitted`: the request's first slice was accepted, so this one must be. `reference` is
    where homologs are searched before an engine is asked, or `alignment` the text that has those of the one sequence,
    which gives `found`, one a sequence; `reads`: the
    backbone reads them itself; `searching` are the heads
    that read homologs, which gives `told` for each of them, one a sequence. Engines never search. `residues` are those of
    each sequence that are computed. `caller` is the key's id: callers share an engine fairly.
    """

    kind: Kind
    model: str
    sequences: tuple[str, ...] = field(repr=False)
    heads: tuple[str, ...] = ()
    long_sequences: str = "error"
    offset: int = 0
    admitted: bool = False
    timeout_s: float = 600.0
    caller: str = ""
    reference: str | None = None
    found: tuple[Found, ...] = field(default=(), repr=False)
    alignment: str | None = field(default=None, repr=False)
    reads: bool = False
    searching: tuple[str, ...] = ()
    told: dict[str, tuple[Relatives, ...]] = field(default_factory=dict, repr=False)
    residues: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Fault:
    """An error as data."""

    kind: str
    message: str
    code: str
    hint: str | None = None
    index: int | None = None
    position: int | None = None
    status: int | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: BaseException, *, offset: int = 0) -> Fault:
        if isinstance(error, SequenceError):
            index = None if error.index is None else error.index + offset
            return cls(
                type(error).__name__, error.bare, error.code, error.hint, index=index, position=error.position
            )
        if isinstance(error, ServiceError):
            return cls(
                "ServiceError", error.message, error.code, error.hint,
                status=error.status, retry_after=error.retry_after,
            )  # fmt: skip
        if isinstance(error, BioseqError):
            return cls(type(error).__name__, error.message, error.code, error.hint)
        return cls("ServiceError", f"internal error ({type(error).__name__}).", "internal", status=500)

    def error(self) -> BioseqError:
        """The exception again."""
        kind: Any = getattr(errors, self.kind, BioseqError)
        if issubclass(kind, SequenceError):
            return kind(self.message, index=self.index, position=self.position, hint=self.hint)
        if issubclass(kind, ServiceError):
            return ServiceError(
                self.message, status=self.status, code=self.code, retry_after=self.retry_after, hint=self.hint
            )
        made = kind(self.message, hint=self.hint)
        made.code = self.code
        return made


@dataclass(frozen=True, slots=True)
class Reply:
    """What a slice gives. `arrays`: embeddings (one [n, D] or [n, layers, D] array, or a list of [L, D]),
    logits, or scan matrices; `homologs` what stood behind each, where they were asked for; `predictions` a list of dicts by head; `scores` floats. `engine_s`: seconds in
    the replica."""

    fault: Fault | None = None
    arrays: np.ndarray | list[np.ndarray] | None = None
    predictions: list[dict[str, Any]] | None = None
    scores: list[float] | None = None
    homologs: tuple[Homologs, ...] | None = None
    notes: tuple[tuple[str, ...], ...] = ()
    engine_s: float = 0.0

"""What both clients share: packing sequences into requests, reading answers, turning problems into errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq import errors as kinds
from bioseq.errors import BioseqError, InputError, SequenceError, ServiceError, SpecError

if TYPE_CHECKING:
    import httpx

    from bioseq.fasta import Record

PACK_RESIDUES = 50_000  # a request is no larger than this, for steady progress and cheap repetition


@dataclass(frozen=True, slots=True)
class Pack:
    """Some sequences of the input, and the place of the first."""

    first: int
    sequences: list[str]
    ids: list[str | None]

    def without(self, places: Sequence[int]) -> Pack:
        kept = [i for i in range(len(self.sequences)) if i not in set(places)]
        return Pack(self.first, [self.sequences[i] for i in kept], [self.ids[i] for i in kept])


@dataclass(slots=True)
class Answer:
    """A pack's table; `refused` are the places in the pack of sequences that are not in it."""

    table: Any
    count: int
    refused: list[int]

    def spread(self, rows: list[Any]) -> list[Any]:
        """The rows with None where a sequence was refused."""
        if not self.refused:
            return rows
        rest = iter(rows)
        return [None if i in set(self.refused) else next(rest) for i in range(self.count)]


def text_of(sequence: str | Record) -> str:
    return sequence if isinstance(sequence, str) else sequence.sequence


def packs(seqs: Iterable[str | Record], limits: dict[str, Any]) -> Iterator[Pack]:
    """The input cut by the server's limits, in order; it is read as packs are asked for."""
    if isinstance(seqs, str):
        raise SpecError("give a list of sequences, not one string.", field="seqs")
    most = min(PACK_RESIDUES, limits["max_body_bytes"] // 2, limits["max_request_tokens"] // 2)
    first, size = 0, 0
    sequences: list[str] = []
    ids: list[str | None] = []
    for seq in seqs:
        text = text_of(seq)
        if sequences and (len(sequences) >= limits["max_items"] or size + len(text) + 2 > most):
            yield Pack(first, sequences, ids)
            first, size, sequences, ids = first + len(sequences), 0, [], []
        sequences.append(text)
        ids.append(None if isinstance(seq, str) else seq.id)
        size += len(text) + 2
    if sequences:
        yield Pack(first, sequences, ids)


def place_of(error: SequenceError, pack: Pack, refused: list[int]) -> int:
    """The place in the pack of the sequence at fault, where those in `refused` were not sent. Raises `error`
    itself if it names no sequence."""
    left = [i for i in range(len(pack.sequences)) if i not in set(refused)]
    if error.index is None or not 0 <= error.index < len(left):
        raise error
    return left[error.index]


def named(error: SequenceError, pack: Pack, place: int) -> SequenceError:
    """The error with its place in the whole input, and the record's id if there is one."""
    return error.at(index=pack.first + place, record=pack.ids[place])


def check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "report"):
        raise SpecError(f"{on_error!r} is not one of raise, report.", field="on_error")


def embed_options(
    pooling: str, layers: Sequence[int], per_residue: bool, long_sequences: str
) -> dict[str, Any]:
    return {
        "pooling": pooling,
        "layers": [int(layer) for layer in layers],
        "per_residue": per_residue,
        "long_sequences": long_sequences,
    }


def predict_options(heads: Sequence[str] | str, long_sequences: str) -> dict[str, Any]:
    if isinstance(heads, str):
        heads = [h for h in heads.split(",") if h]
    return {"heads": list(heads), "long_sequences": long_sequences}


def vectors(table: Any, column: str, layers: int, ragged: bool) -> list[np.ndarray]:
    """Rows of an Arrow table in the predictor's shapes, float32."""
    rows: list[np.ndarray] = []
    for chunk in [] if table is None else table[column].chunks:
        if ragged:
            width = chunk.type.value_type.list_size
            flat = chunk.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
            offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
            parts = [flat[a:b] for a, b in zip(offsets, offsets[1:])]
            if layers > 1:
                parts = [p.reshape(len(p), layers, -1).swapaxes(0, 1) for p in parts]
        else:
            width = chunk.type.list_size
            flat = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
            parts = list(flat.reshape(len(flat), layers, -1) if layers > 1 else flat)
        rows += parts
    return rows


def predictions(table: Any, heads: Sequence[str]) -> list[dict[str, Any]]:
    """Predictions by head; struct members that a task does not have are absent, as in the local predictor."""
    if table is None:
        return []
    columns = [table[name].to_pylist() for name in heads]
    return [dict(zip(heads, row)) for row in zip(*columns)]


def stack(rows: list[np.ndarray]) -> np.ndarray:
    return np.stack(rows) if rows else np.empty((0, 0), dtype=np.float32)


_KINDS: dict[str, type[BioseqError]] = {
    "sequence.illegal_residue": kinds.IllegalResidueError,
    "sequence.too_long": kinds.SequenceTooLongError,
    "mutation.invalid": kinds.MutationError,
    "model.not_found": kinds.NotFoundError,
    "head.not_found": kinds.NotFoundError,
    "version.not_found": kinds.NotFoundError,
}


def error_of(response: httpx.Response) -> BioseqError:
    """The exception that a problem document stands for."""
    status = response.status_code
    try:
        body = response.json()
        code, detail = str(body["code"]), str(body["detail"])
    except (ValueError, KeyError, TypeError):
        body, code, detail = {}, "service.error", f"the server answered {status}."
    retry = response.headers.get("retry-after", "")
    kind = _KINDS.get(code)
    if kind is not None and issubclass(kind, SequenceError):
        # The text names the server's index; ours is put before it instead.
        bare = (
            detail.split(": ", 1)[1]
            if detail.startswith(("sequence ", "index ")) and ": " in detail
            else detail
        )
        return kind(bare, index=body.get("index"), position=body.get("position"))
    if kind is not None:
        made = kind(detail)
        made.code = code
        return made
    if body.get("index") is not None:
        return SequenceError(detail, index=body["index"])
    if status == 422:
        first = (body.get("errors") or [{}])[0]
        found = re.fullmatch(r"sequences\.(\d+)", str(first.get("field")))
        if found:
            return SequenceError(str(first.get("message")), index=int(found[1]))
        field = body.get("field")
        return SpecError(detail.removeprefix(f"{field}: "), field=field) if field else InputError(detail)
    return ServiceError(
        detail, status=status, code=code, retry_after=float(retry) if retry.isdigit() else None
    )

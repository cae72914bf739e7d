"""What both clients share: packing sequences into requests, reading answers, turning problems into errors."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq import errors as kinds
from bioseq.errors import BioseqError, InputError, MissingExtraError, SequenceError, ServiceError, SpecError

if TYPE_CHECKING:
    import httpx

    from bioseq.sequences.fasta import Record

ARROW = "application/vnd.apache.arrow.stream"
RETRIED = (429, 500, 502, 503, 504)
PARALLEL = 4  # requests in flight
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


def predict_options(heads: Sequence[str] | str, nearest: int, long_sequences: str) -> dict[str, Any]:
    if isinstance(heads, str):
        heads = [h for h in heads.split(",") if h]
    return {"heads": list(heads), "nearest": nearest, "long_sequences": long_sequences}


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


@dataclass(slots=True)
class Call:
    """One request: what to send, and how to read the answer."""

    path: str
    body: dict[str, Any]
    arrow: bool = True
    method: str = "POST"


@dataclass
class Base:
    """Settings, limits, retries, and what each method asks: all but the sending."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    model: str = "default"
    timeout: float = 600.0
    retries: int = 8
    transport: Any = None

    def __post_init__(self) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise MissingExtraError("httpx", "client") from None
        self._httpx = httpx
        self.url = self.url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise SpecError(f"{self.url!r} is no http or https URL.", field="url")
        self.errors: list[SequenceError] = []
        self._limits: dict[str, Any] | None = None

    def _headers(self, call: Call) -> dict[str, str]:
        headers = {"Accept": ARROW if call.arrow else "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def _pause(self, attempt: int, error: ServiceError) -> float | None:
        """Seconds before the next try, or None to give up."""
        if attempt >= self.retries or (error.status is not None and error.status not in RETRIED):
            return None
        if error.status == 500 and attempt >= 1:
            return None  # an internal error that repeats is no accident
        grown = min(30.0, 0.25 * 2**attempt) * (0.5 + random.random() / 2)
        return max(grown, error.retry_after or 0.0)

    def _broken(self, error: Exception) -> ServiceError:
        return ServiceError(
            f"{self.url} cannot be reached or broke off ({type(error).__name__}).",
            code="service.unreachable",
            hint="Check the URL and that `bioseq serve` runs there.",
        )

    def _read(self, response: httpx.Response, call: Call) -> Any:
        if response.status_code >= 400:
            raise error_of(response)
        if not call.arrow:
            return response.json() if response.content else None
        import pyarrow as pa

        try:
            return pa.ipc.open_stream(io.BytesIO(response.content)).read_all()
        except pa.ArrowInvalid as error:
            raise self._broken(error) from None

    # What each method asks and how its answer is read: shared by both clients.

    def _embed_call(self, pack: Pack, options: dict[str, Any]) -> Call:
        return Call("/v1/embed", {"sequences": pack.sequences, "model": self.model, **options})

    def _logits_call(self, pack: Pack, options: dict[str, Any]) -> Call:
        return Call("/v1/logits", {"sequences": pack.sequences, "model": self.model, **options})

    def _predict_call(self, pack: Pack, options: dict[str, Any]) -> Call:
        return Call("/v1/predict", {"sequences": pack.sequences, "model": self.model, **options})

    def _score_call(
        self, wild_type: str | Record, mutants: Sequence[str], strategy: str, options: dict[str, Any]
    ) -> Call:
        body = {"sequence": text_of(wild_type), "mutants": [str(m) for m in mutants], "strategy": strategy}
        return Call("/v1/score", {**body, "model": self.model, **options})

    def _scan_call(self, sequence: str | Record, strategy: str, options: dict[str, Any]) -> Call:
        body = {"sequence": text_of(sequence), "strategy": strategy}
        return Call("/v1/scan", {**body, "model": self.model, **options})

"""What a service answers: JSON, Arrow tables with every row that was asked for, problem documents as exceptions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq import errors as kinds
from bioseq.errors import BioseqError, InputError, SequenceError, ServiceError, SpecError

if TYPE_CHECKING:
    import httpx

ARROW = "application/vnd.apache.arrow.stream"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


def cut_off(what: str) -> ServiceError:
    """An answer that is not whole; it is asked for again."""
    return ServiceError(f"the answer broke off: {what}.", code="service.incomplete")


def json_of(content: bytes | str) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError:
        raise cut_off("it is not whole JSON") from None


def table_of(content: bytes, rows: int | None = None) -> Any:
    """An Arrow stream as a table. pyarrow takes a stream that ends between two record batches for a whole one, so
    the end mark is needed, all `rows`, and in order by their `index` where there is one."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(content).read_all()
    except pa.ArrowInvalid:
        raise cut_off("it is not a whole Arrow stream") from None
    if rows is not None and len(table) != rows:
        raise cut_off(f"{len(table)} of {rows} rows came")
    if not content.endswith(_END):
        raise cut_off(f"the Arrow stream has no end after {len(table)} rows")
    if "index" in table.column_names and table["index"].to_pylist() != list(range(len(table))):
        raise cut_off("its rows are not in the order of what was asked")
    return table


def vectors(table: Any, column: str, *, layers: int = 1, ragged: bool = False) -> list[np.ndarray]:
    """Rows of an Arrow table in the predictor's shapes, float32."""
    rows: list[np.ndarray] = []
    for chunk in table[column].chunks:
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
    return [dict(zip(heads, row)) for row in zip(*(table[name].to_pylist() for name in heads))]


def by_sequence(table: Any, rows: list[Any], count: int) -> list[list[dict[str, Any]]]:
    """Predictions of translated proteins, those of each of `count` coding sequences together, with their place."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for place, row in zip(table["coding"].to_pylist(), rows, strict=True):
        found[place.pop("sequence")].append({**place, "predictions": row})
    return found


def stack(rows: list[Any]) -> np.ndarray:
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
        bare = re.sub(r"\A(?:sequence|index) .*?: ", "", detail)
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

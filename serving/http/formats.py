"""Answers as bytes, piece by piece: JSON, Arrow stream, npz. A piece is made from each slice's reply as it
comes, so that a large answer never lies in memory whole.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import orjson

from serving.engine.asks import Reply
from serving.problems import Problem

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
NPZ = "application/x-npz"


def choose(accept: str | None, offered: Sequence[str] = (JSON, ARROW, NPZ)) -> str:
    """The media type to answer in, by the Accept header (RFC 9110, 12.5.1). Raises `Problem` 406."""
    if not accept or accept.strip() in ("*/*", JSON):
        return offered[0]
    best, best_q, best_rank = None, 0.0, -1
    ranges: list[tuple[str, float]] = []
    for part in accept.split(","):
        name, *params = [p.strip() for p in part.split(";")]
        q = 1.0
        for param in params:
            if param.lower().startswith("q="):
                try:
                    q = float(param[2:])
                except ValueError:
                    q = 0.0
        ranges.append((name.lower(), q))
    for place, media in enumerate(offered):
        kind = media.split("/")[0] + "/*"
        matches = [(n == media, n == kind, q) for n, q in ranges if n in (media, kind, "*/*")]
        if not matches:
            continue
        exact, _, q = max(matches)  # the most specific range decides
        if q > best_q or (q == best_q and q > 0 and exact and best_rank != 1):
            best, best_q, best_rank = place, q, int(exact)
    if best is None:
        raise Problem(
            406,
            "response.not_acceptable",
            f"this route answers in {', '.join(offered)}.",
            offered=list(offered),
        )
    return offered[best]


class Writer(Protocol):
    """`begin` once, `rows` for each slice in order, `end` once."""

    media: str

    def begin(self) -> bytes: ...
    def rows(self, reply: Reply, first: int) -> bytes: ...
    def end(self, usage: dict[str, int]) -> bytes: ...


def dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


class JsonRows:
    """`{head..., "data": [...], "usage": {...}}`. Floats are the shortest text of their float32."""

    media = JSON

    def __init__(self, head: dict[str, Any], item: Any):
        self.head, self.item = head, item
        self._empty = True

    def begin(self) -> bytes:
        return dumps(self.head)[:-1] + b',"data":['

    def rows(self, reply: Reply, first: int) -> bytes:
        items = [self.item(reply, i, first + i) for i in range(len(reply.notes))]
        data = dumps(items)[1:-1]
        if not self._empty:
            data = b"," + data
        self._empty = False
        return data

    def end(self, usage: dict[str, int]) -> bytes:
        return b'],"usage":' + dumps(usage) + b"}"


class Whole:
    """An answer that is made at once, by `make(reply, usage)`."""

    def __init__(self, media: str, make: Callable[[Reply, dict[str, int]], bytes]):
        self.media, self._make = media, make

    def begin(self) -> bytes:
        return b""

    def rows(self, reply: Reply, first: int) -> bytes:
        self._reply = reply
        return b""

    def end(self, usage: dict[str, int]) -> bytes:
        return self._make(self._reply, usage)


def vector_item(name: str, dtype: str) -> Any:
    """Makes `{"index", name: numbers, "notes"}`."""

    def item(reply: Reply, i: int, index: int) -> dict[str, Any]:
        assert reply.arrays is not None
        return {"index": index, name: _contiguous(reply.arrays[i], dtype), "notes": reply.notes[i]}

    return item


def _contiguous(array: np.ndarray, dtype: str) -> np.ndarray:
    """float16 is rounded as asked and written as its float32, which orjson can print."""
    if dtype == "float16":
        array = array.astype(np.float16).astype(np.float32)
    return np.ascontiguousarray(array, dtype=np.float32)


def residues_first(array: np.ndarray) -> np.ndarray:
    """[layers, L, D] -> [L, layers, D]; [L, D] as it is."""
    return array if array.ndim == 2 else np.swapaxes(array, 0, 1)


class ArrowRows:
    """A record batch for each slice. Columns `index`, `NAME` (fixed_size_list, or a list of them where items
    are ragged), `notes`. `width` values a vector: layers times D."""

    media = ARROW

    def __init__(self, name: str, width: int, dtype: str, ragged: bool, meta: dict[str, str]):
        import pyarrow as pa

        self.pa, self.width, self.ragged, self.dtype = pa, width, ragged, dtype
        vector = pa.list_(pa.float16() if dtype == "float16" else pa.float32(), width)
        self.schema = pa.schema(
            [
                ("index", pa.int64()),
                (name, pa.list_(vector) if ragged else vector),
                ("notes", pa.list_(pa.string())),
            ],
            metadata={"bioseq." + k: v for k, v in meta.items()},
        )
        self._sink = io.BytesIO()
        self._stream = pa.ipc.new_stream(self._sink, self.schema)

    def _take(self) -> bytes:
        data = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return data

    def begin(self) -> bytes:
        return self._take()

    def rows(self, reply: Reply, first: int) -> bytes:
        pa, arrays = self.pa, reply.arrays
        assert arrays is not None
        if self.ragged:
            parts = [residues_first(a) for a in arrays]
            offsets = np.zeros(len(parts) + 1, dtype=np.int32)
            np.cumsum([len(p) for p in parts], out=offsets[1:])
            flat = np.concatenate([p.reshape(-1) for p in parts])
        else:
            flat = np.asarray(arrays).reshape(-1)
        values = pa.array(flat.astype(self.dtype, copy=False))
        vectors = pa.FixedSizeListArray.from_arrays(values, self.width)
        if self.ragged:
            vectors = pa.ListArray.from_arrays(pa.array(offsets), vectors)
        index = pa.array(np.arange(first, first + len(reply.notes)))
        notes = pa.array([list(n) for n in reply.notes], type=pa.list_(pa.string()))
        self._stream.write_batch(pa.record_batch([index, vectors, notes], schema=self.schema))
        return self._take()

    def end(self, usage: dict[str, int]) -> bytes:
        self._stream.close()
        return self._take()


class TableRows:
    """A record batch for each slice, of plain columns made by `columns(reply, first)` to one schema."""

    media = ARROW

    def __init__(self, columns: Any, meta: dict[str, str]):
        self.columns, self.meta = columns, meta
        self._sink = io.BytesIO()
        self._stream: Any = None

    def begin(self) -> bytes:
        return b""

    def rows(self, reply: Reply, first: int) -> bytes:
        import pyarrow as pa

        arrays = self.columns(reply, first)
        if self._stream is None:
            schema = pa.schema(
                [(k, a.type) for k, a in arrays.items()],
                metadata={"bioseq." + k: v for k, v in self.meta.items()},
            )
            self._stream = pa.ipc.new_stream(self._sink, schema)
            self._schema = schema
        self._stream.write_batch(pa.record_batch(list(arrays.values()), schema=self._schema))
        return self._take()

    def _take(self) -> bytes:
        data = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return data

    def end(self, usage: dict[str, int]) -> bytes:
        if self._stream is not None:
            self._stream.close()
        return self._take()


class _Pipe(io.RawIOBase):
    """What zipfile writes to: bytes are taken off as they come."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data


class NpzRows:
    """numpy's npz: `NAME` [N, ...], or where items are ragged all residues together [sum L, ...] with
    `lengths` [N]; `meta` is JSON text. The shape is known before the first row, so rows stream."""

    media = NPZ

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: str, ragged: bool, lengths: list[int], meta: dict
    ):
        self._pipe = _Pipe()
        self._zip = zipfile.ZipFile(self._pipe, "w", zipfile.ZIP_STORED)
        self.name, self.shape, self.dtype = name, shape, dtype
        self.ragged, self.lengths, self.meta = ragged, lengths, meta
        self._entry: Any = None
        self._notes: list[list[str]] = []

    def begin(self) -> bytes:
        self._entry = self._zip.open(f"{self.name}.npy", "w", force_zip64=True)
        head = {
            "descr": np.dtype(self.dtype).newbyteorder("<").str,
            "fortran_order": False,
            "shape": self.shape,
        }
        np.lib.format.write_array_header_1_0(self._entry, head)
        return self._pipe.take()

    def rows(self, reply: Reply, first: int) -> bytes:
        assert reply.arrays is not None
        for array in reply.arrays:
            rows = residues_first(array) if self.ragged else array
            self._entry.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())
        self._notes += [list(n) for n in reply.notes]
        return self._pipe.take()

    def end(self, usage: dict[str, int]) -> bytes:
        self._entry.close()
        if self.ragged:
            self._add("lengths", np.array(self.lengths, dtype=np.int64))
        told = {**self.meta, "usage": usage, "notes": self._notes}
        self._add("meta", np.array(json.dumps(told)))
        self._zip.close()
        return self._pipe.take()

    def _add(self, name: str, array: np.ndarray) -> None:
        with self._zip.open(f"{name}.npy", "w") as entry:
            np.save(entry, array, allow_pickle=False)


def base64_floats(vector: np.ndarray) -> str:
    """Base64 of little-endian float32, as OpenAI's clients expect."""
    import base64

    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()

"""A service that answers from memory, for clients without a network: vectors that tell which sequence they are of."""

from __future__ import annotations

import io
import json
import threading
from typing import Any

import httpx
import pyarrow as pa

URL = "http://bioseq.test"
LIMITS = {"max_items": 4, "max_body_bytes": 1 << 20, "max_request_tokens": 1 << 16, "max_variants": 3}
D = 2


def vector_of(sequence: str) -> list[float]:
    return [float(len(sequence)), float(ord(sequence[0]))]


def embeddings(sequences: list[str]) -> pa.RecordBatch:
    vectors = pa.array([vector_of(s) for s in sequences], type=pa.list_(pa.float32(), D))
    return pa.record_batch({"index": pa.array(range(len(sequences))), "embedding": vectors})


def stream_of(batch: pa.RecordBatch, *, slices: int = 1, keep: int | None = None, end: bool = True) -> bytes:
    """An Arrow stream of the batch in `slices`; `keep` of them, and without the end mark, is a stream cut off."""
    sink = io.BytesIO()
    writer = pa.ipc.new_stream(sink, batch.schema)
    step = -(-batch.num_rows // slices) or 1
    cuts = [batch.slice(at, step) for at in range(0, batch.num_rows, step)]
    for cut in cuts[:keep]:
        writer.write_batch(cut)
    if end:
        writer.close()
    return sink.getvalue()


def problem(status: int, code: str, detail: str, **more: Any) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "detail": detail, **more}, headers={"Retry-After": "0"})


class StandIn(httpx.MockTransport):
    """`requests` and `bodies` are what came. `troubles` are answered first, before anything but limits: a status,
    an exception to raise, or a function of the request."""

    def __init__(self, troubles: Any = ()):
        self.requests: list[httpx.Request] = []
        self.bodies: list[Any] = []
        self.troubles, self._lock = list(troubles), threading.Lock()
        super().__init__(self.answer)

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/limits":
            return httpx.Response(200, json=LIMITS)
        with self._lock:
            self.requests.append(request)
            self.bodies.append(
                json.loads(request.content) if request.content[:1] == b"{" else request.content
            )
            trouble = self.troubles.pop(0) if self.troubles else None
        if isinstance(trouble, Exception):
            raise trouble
        if callable(trouble):
            return trouble(request)
        if trouble is not None:
            return httpx.Response(trouble, headers={"Retry-After": "0"}, text="no")
        return getattr(self, request.url.path.rsplit("/", 1)[-1])(json.loads(request.content))

    def embed(self, body: dict[str, Any]) -> httpx.Response:
        for index, sequence in enumerate(body["sequences"]):
            if "1" in sequence:
                detail = f"sequence {index}: illegal residue at position {sequence.index('1') + 1}."
                return problem(422, "sequence.illegal_residue", detail, index=index, position=1)
        return httpx.Response(200, content=stream_of(embeddings(body["sequences"])))

    def score(self, body: dict[str, Any]) -> httpx.Response:
        scores = [float(mutant[1:-1]) for mutant in body["mutants"]]
        return httpx.Response(200, content=stream_of(pa.record_batch({"score": pa.array(scores)})))

    def scan(self, body: dict[str, Any]) -> httpx.Response:
        rows = pa.array([[0.0] * 20] * len(body["sequence"]), type=pa.list_(pa.float32(), 20))
        return httpx.Response(200, content=stream_of(pa.record_batch({"scores": rows})))

    def predict(self, body: dict[str, Any]) -> httpx.Response:
        rows = [{"value": float(len(s))} for s in body["sequences"]]
        columns = {"index": pa.array(range(len(rows)))} | {head: pa.array(rows) for head in body["heads"]}
        return httpx.Response(200, content=stream_of(pa.record_batch(columns)))

    def logits(self, body: dict[str, Any]) -> httpx.Response:
        kind = pa.list_(pa.list_(pa.float32(), D))
        rows = pa.array([[[1.0, 2.0]] * len(s) for s in body["sequences"]], type=kind)
        return httpx.Response(200, content=stream_of(pa.record_batch({"logits": rows})))

    def estimate(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(200, json={"items": 1})

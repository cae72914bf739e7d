"""A remote bioseq with the local predictor's interface.

    remote = bioseq.connect("http://127.0.0.1:8000", api_key=...)
    remote.embed(seqs)          # the same methods, the same shapes, the same numbers as `bioseq.load(...)`

Sequences may come as a list or an iterator of strings or `Record`s. They are packed into requests by the
server's own limits, answers come back in input order, and 429, 5xx and broken connections are tried again with
growing pauses, keeping to the server's Retry-After. A sequence that the server refuses raises its error, with
its index in the whole input; with `on_error="report"` the others are answered, its place holds None, and the
error is in `client.errors`. Numbers travel as Arrow.

What it cannot do: choose device or arithmetic (they are the server's).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.client.asynchronous import AsyncClient
from bioseq.client.jobs import JobsMixin
from bioseq.client.remote import (
    PARALLEL,
    Answer,
    Base,
    Call,
    Pack,
    check_on_error,
    embed_options,
    named,
    packs,
    place_of,
    predict_options,
    predictions,
    stack,
    vectors,
)
from bioseq.errors import SequenceError, ServiceError

if TYPE_CHECKING:
    from bioseq.sequences.fasta import Record

__all__ = ["AsyncClient", "Client", "connect"]


def connect(
    url: str,
    api_key: str | None = None,
    *,
    model: str = "default",
    timeout: float = 600.0,
    retries: int = 8,
    transport: Any = None,
) -> Client:
    """A client of the service at `url`. `retries` is how often a request is tried again, `timeout` seconds
    bound one try. Nothing is sent before the first call. Raises `MissingExtraError` without httpx."""
    return Client(url, api_key, model=model, timeout=timeout, retries=retries, transport=transport)


class Client(JobsMixin, Base):
    """Synchronous; safe to use from several threads. A context manager; closing it is optional.

    Raises `SequenceError` subclasses, `MutationError`, `NotFoundError` and `SpecError` as the local predictor
    does, and `ServiceError` for what only a service can answer (401, 403, 429 and 5xx after all retries).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._http = self._httpx.Client(base_url=self.url, timeout=self.timeout, transport=self.transport)
        self._lock = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def limits(self) -> dict[str, Any]:
        """What one request may hold; asked once."""
        with self._lock:
            if self._limits is None:
                self._limits = self._send(Call("/v1/limits", {}, arrow=False, method="GET"))
        return self._limits

    def models(self) -> list[dict[str, Any]]:
        """All backbones and heads of the server."""
        return self._send(Call("/v1/models", {}, arrow=False, method="GET"))["data"]

    def embed(
        self,
        seqs: Iterable[str | Record],
        *,
        pooling: str = "mean",
        layers: Sequence[int] = (-1,),
        per_residue: bool = False,
        long_sequences: str = "error",
        on_error: str = "raise",
        progress: bool = False,
    ) -> Any:
        """As `Predictor.embed`: float32 [N, D], [N, layers, D], or per residue a list of [L, D] or
        [layers, L, D]. With `on_error="report"` a list, with None for what was refused."""
        options = embed_options(pooling, layers, per_residue, long_sequences)
        parts = self._all(seqs, self._embed_call, options, on_error, progress)
        rows = [
            row for a in parts for row in a.spread(vectors(a.table, "embedding", len(layers), per_residue))
        ]
        return rows if per_residue or on_error == "report" else stack(rows)

    def logits(
        self,
        seqs: Iterable[str | Record],
        *,
        long_sequences: str = "error",
        on_error: str = "raise",
        progress: bool = False,
    ) -> list[np.ndarray]:
        """As `Predictor.logits`: a list of float32 [L, V]."""
        parts = self._all(seqs, self._logits_call, {"long_sequences": long_sequences}, on_error, progress)
        return [row for a in parts for row in a.spread(vectors(a.table, "logits", 1, True))]

    def predict(
        self,
        seqs: Iterable[str | Record],
        heads: Sequence[str],
        *,
        nearest: int = 0,
        long_sequences: str = "error",
        on_error: str = "raise",
        progress: bool = False,
    ) -> list[dict[str, dict[str, Any]]]:
        """As `Predictor.predict`: one dict a sequence, keyed by head."""
        options = predict_options(heads, nearest, long_sequences)
        parts = self._all(seqs, self._predict_call, options, on_error, progress)
        return [row for a in parts for row in a.spread(predictions(a.table, options["heads"]))]

    def score(
        self,
        wild_type: str | Record,
        mutants: Sequence[str],
        *,
        strategy: str = "masked-marginals",
        **options: Any,
    ) -> list[float]:
        """As `Predictor.score`."""
        options.pop("progress", None)
        limit, scores = self.limits()["max_variants"], []
        for at in range(0, len(mutants), limit):
            table = self._send(self._score_call(wild_type, mutants[at : at + limit], strategy, options))
            scores += table["score"].to_pylist()
        return scores

    def scan(
        self, sequence: str | Record, *, strategy: str = "masked-marginals", **options: Any
    ) -> np.ndarray:
        """As `Predictor.scan`: float32 [L, 20]."""
        options.pop("progress", None)
        return stack(vectors(self._send(self._scan_call(sequence, strategy, options)), "scores", 1, False))

    # -- sending -------------------------------------------------------------------------------------------

    def _send(self, call: Call) -> Any:
        """One request, tried again as often as is allowed."""
        attempt = 0
        while True:
            try:
                return self._try(call)
            except ServiceError as error:
                pause = self._pause(attempt, error)
                if pause is None:
                    raise
            attempt += 1
            time.sleep(pause)

    def _try(self, call: Call) -> Any:
        try:
            response = self._http.request(
                call.method,
                call.path,
                json=call.body if call.method == "POST" else None,
                headers=self._headers(call),
            )
        except self._httpx.TransportError as error:
            raise self._broken(error) from None
        return self._read(response, call)

    def _all(
        self, seqs: Iterable[str | Record], make: Any, options: dict[str, Any], on_error: str, progress: bool
    ) -> Iterator[Answer]:
        """Answers of all packs in order, `PARALLEL` of them in flight; the input is read as it is needed."""
        from bioseq.progress import Progress

        check_on_error(on_error)
        self.errors = []
        total = len(seqs) if isinstance(seqs, Sequence) else 0
        limits = self.limits()
        with (
            ThreadPoolExecutor(PARALLEL) as pool,
            Progress(total or 1, "remote", unit="sequences", enabled=progress and bool(total)) as bar,
        ):
            running: list[tuple[Pack, Future[Answer]]] = []
            try:
                for pack in packs(seqs, limits):
                    running.append((pack, pool.submit(self._one, pack, make, options, on_error)))
                    if len(running) > PARALLEL:
                        yield running[0][1].result()
                        bar.add(len(running.pop(0)[0].sequences))
                while running:
                    yield running[0][1].result()
                    bar.add(len(running.pop(0)[0].sequences))
            finally:
                for _, future in running:
                    future.cancel()

    def _one(self, pack: Pack, make: Any, options: dict[str, Any], on_error: str) -> Answer:
        """A pack's answer; under "report" a refused sequence is taken out and the rest asked for again."""
        out: list[int] = []
        left = pack
        while True:
            try:
                table = self._send(make(left, options)) if left.sequences else None
                return Answer(table, len(pack.sequences), out)
            except SequenceError as error:
                place = place_of(error, pack, out)
                if on_error == "raise":
                    raise named(error, pack, place) from None
                with self._lock:
                    self.errors.append(named(error, pack, place))
                out.append(place)
                left = pack.without(out)

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

import asyncio
import io
import random
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.client_jobs import JobsMixin
from bioseq.errors import MissingExtraError, SequenceError, ServiceError, SpecError
from bioseq.remote import (
    Answer,
    Pack,
    check_on_error,
    embed_options,
    error_of,
    named,
    packs,
    place_of,
    predict_options,
    predictions,
    stack,
    text_of,
    vectors,
)

if TYPE_CHECKING:
    import httpx

    from bioseq.fasta import Record

ARROW = "application/vnd.apache.arrow.stream"
RETRIED = (429, 500, 502, 503, 504)
PARALLEL = 4  # requests in flight


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


@dataclass(slots=True)
class _Call:
    """One request: what to send, and how to read the answer."""

    path: str
    body: dict[str, Any]
    arrow: bool = True
    method: str = "POST"


@dataclass
class _Base:
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

    def _headers(self, call: _Call) -> dict[str, str]:
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

    def _read(self, response: httpx.Response, call: _Call) -> Any:
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

    def _embed_call(self, pack: Pack, options: dict[str, Any]) -> _Call:
        return _Call("/v1/embed", {"sequences": pack.sequences, "model": self.model, **options})

    def _logits_call(self, pack: Pack, options: dict[str, Any]) -> _Call:
        return _Call("/v1/logits", {"sequences": pack.sequences, "model": self.model, **options})

    def _predict_call(self, pack: Pack, options: dict[str, Any]) -> _Call:
        return _Call("/v1/predict", {"sequences": pack.sequences, "model": self.model, **options})

    def _score_call(
        self, wild_type: str | Record, mutants: Sequence[str], strategy: str, options: dict[str, Any]
    ) -> _Call:
        body = {"sequence": text_of(wild_type), "mutants": [str(m) for m in mutants], "strategy": strategy}
        return _Call("/v1/score", {**body, "model": self.model, **options})

    def _scan_call(self, sequence: str | Record, strategy: str, options: dict[str, Any]) -> _Call:
        body = {"sequence": text_of(sequence), "strategy": strategy}
        return _Call("/v1/scan", {**body, "model": self.model, **options})


class Client(JobsMixin, _Base):
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
                self._limits = self._send(_Call("/v1/limits", {}, arrow=False, method="GET"))
        return self._limits

    def models(self) -> list[dict[str, Any]]:
        """All backbones and heads of the server."""
        return self._send(_Call("/v1/models", {}, arrow=False, method="GET"))["data"]

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
        long_sequences: str = "error",
        on_error: str = "raise",
        progress: bool = False,
    ) -> list[dict[str, dict[str, Any]]]:
        """As `Predictor.predict`: one dict a sequence, keyed by head."""
        options = predict_options(heads, long_sequences)
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

    def _send(self, call: _Call) -> Any:
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

    def _try(self, call: _Call) -> Any:
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


class AsyncClient(_Base):
    """The same for asyncio: `async with AsyncClient(url) as remote: await remote.embed(seqs)`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._http = self._httpx.AsyncClient(
            base_url=self.url, timeout=self.timeout, transport=self.transport
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def limits(self) -> dict[str, Any]:
        """What one request may hold; asked once."""
        if self._limits is None:
            self._limits = await self._send(_Call("/v1/limits", {}, arrow=False, method="GET"))
        return self._limits

    async def models(self) -> list[dict[str, Any]]:
        """All backbones and heads of the server."""
        return (await self._send(_Call("/v1/models", {}, arrow=False, method="GET")))["data"]

    async def embed(
        self,
        seqs: Iterable[str | Record],
        *,
        pooling: str = "mean",
        layers: Sequence[int] = (-1,),
        per_residue: bool = False,
        long_sequences: str = "error",
        on_error: str = "raise",
    ) -> Any:
        """As `Client.embed`."""
        options = embed_options(pooling, layers, per_residue, long_sequences)
        rows: list[Any] = []
        async for a in self._all(seqs, self._embed_call, options, on_error):
            rows += a.spread(vectors(a.table, "embedding", len(layers), per_residue))
        return rows if per_residue or on_error == "report" else stack(rows)

    async def logits(
        self, seqs: Iterable[str | Record], *, long_sequences: str = "error", on_error: str = "raise"
    ) -> list[np.ndarray]:
        """As `Client.logits`."""
        rows: list[Any] = []
        async for a in self._all(seqs, self._logits_call, {"long_sequences": long_sequences}, on_error):
            rows += a.spread(vectors(a.table, "logits", 1, True))
        return rows

    async def predict(
        self,
        seqs: Iterable[str | Record],
        heads: Sequence[str],
        *,
        long_sequences: str = "error",
        on_error: str = "raise",
    ) -> list[dict[str, dict[str, Any]]]:
        """As `Client.predict`."""
        options = predict_options(heads, long_sequences)
        rows: list[Any] = []
        async for a in self._all(seqs, self._predict_call, options, on_error):
            rows += a.spread(predictions(a.table, options["heads"]))
        return rows

    async def score(
        self,
        wild_type: str | Record,
        mutants: Sequence[str],
        *,
        strategy: str = "masked-marginals",
        **options: Any,
    ) -> list[float]:
        """As `Client.score`."""
        limit, scores = (await self.limits())["max_variants"], []
        for at in range(0, len(mutants), limit):
            call = self._score_call(wild_type, mutants[at : at + limit], strategy, options)
            scores += (await self._send(call))["score"].to_pylist()
        return scores

    async def scan(
        self, sequence: str | Record, *, strategy: str = "masked-marginals", **options: Any
    ) -> np.ndarray:
        """As `Client.scan`."""
        table = await self._send(self._scan_call(sequence, strategy, options))
        return stack(vectors(table, "scores", 1, False))

    async def _send(self, call: _Call) -> Any:
        attempt = 0
        while True:
            try:
                return await self._try(call)
            except ServiceError as error:
                pause = self._pause(attempt, error)
                if pause is None:
                    raise
            attempt += 1
            await asyncio.sleep(pause)

    async def _try(self, call: _Call) -> Any:
        try:
            response = await self._http.request(
                call.method,
                call.path,
                json=call.body if call.method == "POST" else None,
                headers=self._headers(call),
            )
        except self._httpx.TransportError as error:
            raise self._broken(error) from None
        return self._read(response, call)

    async def _all(
        self, seqs: Iterable[str | Record], make: Any, options: dict[str, Any], on_error: str
    ) -> AsyncIterator[Answer]:
        check_on_error(on_error)
        self.errors = []
        running: list[asyncio.Task] = []
        try:
            for pack in packs(seqs, await self.limits()):
                running.append(asyncio.create_task(self._one(pack, make, options, on_error)))
                if len(running) > PARALLEL:
                    yield await running.pop(0)
            while running:
                yield await running.pop(0)
        finally:
            for task in running:
                task.cancel()

    async def _one(self, pack: Pack, make: Any, options: dict[str, Any], on_error: str) -> Answer:
        out: list[int] = []
        left = pack
        while True:
            try:
                table = await self._send(make(left, options)) if left.sequences else None
                return Answer(table, len(pack.sequences), out)
            except SequenceError as error:
                place = place_of(error, pack, out)
                if on_error == "raise":
                    raise named(error, pack, place) from None
                self.errors.append(named(error, pack, place))
                out.append(place)
                left = pack.without(out)

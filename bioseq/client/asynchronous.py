"""The client for asyncio; see `bioseq.client.sync`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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


class AsyncClient(Base):
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
            self._limits = await self._send(Call("/v1/limits", {}, arrow=False, method="GET"))
        return self._limits

    async def models(self) -> list[dict[str, Any]]:
        """All backbones and heads of the server."""
        return (await self._send(Call("/v1/models", {}, arrow=False, method="GET")))["data"]

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
        nearest: int = 0,
        long_sequences: str = "error",
        on_error: str = "raise",
    ) -> list[dict[str, dict[str, Any]]]:
        """As `Client.predict`."""
        options = predict_options(heads, nearest, long_sequences)
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

    async def _send(self, call: Call) -> Any:
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

    async def _try(self, call: Call) -> Any:
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

"""POST /v1/search: the nearest vectors of a store to sequences or vectors.

Sequences are embedded by the engines, with the options of the store, and cost tokens as in /v1/embed. Searches run one
at a time beside the requests, in a thread of the ingress.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from bioseq.errors import SpecError, VectorStoreError
from bioseq.homologs.reading import READING
from bioseq.vectors.search import EXACT_UP_TO, Neighbours, index_path, search
from bioseq.vectors.settings import VectorSettings
from bioseq.vectors.store import VectorStore
from serving.database.keys import KeyInfo
from serving.engine.asks import Ask, Reply
from serving.http.answering import Order, answer, charge, embedding_bytes
from serving.http.auth import require
from serving.http.checks import Checked
from serving.http.formats import JSON, Whole, dumps
from serving.http.routes.body import Route
from serving.http.schemas.common import problems
from serving.http.schemas.search import SearchRequest, SearchResponse, StoreInfo, StoreList
from serving.http.service import Service, service_of
from serving.http.targets import Target, find
from serving.problems import Problem, too_many_items

router = APIRouter(prefix="/v1", tags=["vectors"], route_class=Route)
WAITING = 32  # searches that wait for the one that runs


@router.post(
    "/search",
    response_model=SearchResponse,
    responses=problems(400, 401, 403, 404, 408, 413, 422, 429, 503),
)
async def nearest(request: Request, body: SearchRequest, key: KeyInfo = require("predict")) -> Response:
    """The k nearest vectors of a store by cosine similarity."""
    service = service_of(request)
    if (body.sequences is None) == (body.vectors is None):
        raise SpecError("give sequences or vectors.", field="sequences")
    folder = service.settings.stores.get(body.store)
    if folder is None:
        raise Problem(404, "vectors.not_found", "this server has no such vector store.")
    store = await asyncio.to_thread(_open, folder)
    exact, size = _way(store, body, service)
    if service.extras.setdefault("searching", 0) >= WAITING:
        raise Problem(
            429, "overloaded", "too many searches are waiting. Try again in a moment.", retry_after=2
        )
    service.extras["searching"] += 1
    notes: list[tuple[str, ...]]
    try:
        if body.vectors is not None:
            target = await find(service, body.model)
            queries, notes, tokens = _given(store, body.vectors), [() for _ in body.vectors], 0
            await charge(request, key, target, len(queries), 0)
            name = target.model.exact
        else:
            order = _Queries(body, store.settings)
            embedded = await answer(request, key, order)
            if isinstance(embedded, StreamingResponse):
                async for _ in embedded.body_iterator:
                    pass
            queries, notes, tokens = np.stack(order.rows), order.notes, order.tokens
            name = embedded.headers["X-Model"]
        lock = service.extras.setdefault("search lock", asyncio.Lock())
        async with lock:
            found, names = await asyncio.to_thread(_search, store, queries, body.k, exact)
    finally:
        service.extras["searching"] -= 1
    data = [
        {
            "index": i,
            "hits": [
                {"ids": list(ids), "similarity": float(value)}
                for ids, value in zip(names[i], found.similarity[i], strict=True)
            ],
            "notes": list(notes[i]),
        }
        for i in range(len(queries))
    ]
    told = {"model": name, "store": body.store, "vectors": size, "exact": found.exact, "data": data}
    usage = {"items": len(queries), "tokens": tokens}
    return Response(dumps({**told, "usage": usage}), media_type=JSON, headers={"X-Model": name})


@router.get("/stores", responses=problems(401, 403))
async def stores(request: Request, key: KeyInfo = require("read")) -> StoreList:
    """The vector stores of this server that can be searched. One that cannot be read now is left out."""
    folders = service_of(request).settings.stores
    found = [await asyncio.to_thread(_told, name, folder) for name, folder in sorted(folders.items())]
    return StoreList(data=[one for one in found if one is not None])


def _told(name: str, folder: str) -> StoreInfo | None:
    try:
        store = VectorStore(folder)
    except VectorStoreError:
        return None
    if store.settings.per_residue:
        return None
    indexed = index_path(store).is_file()
    return StoreInfo(
        store=name, vectors=len(store), indexed=indexed, weights_hash=store.settings.weights_hash
    )


def _open(folder: str) -> VectorStore:
    try:
        return VectorStore(folder)
    except VectorStoreError:
        raise Problem(
            503, "vectors.unavailable", "the vector store cannot be read.", retry_after=30
        ) from None


def _way(store: VectorStore, body: SearchRequest, service: Service) -> tuple[bool, int]:
    """(exact, vectors in the store). Raises `Problem` 413 for too many queries."""
    size, indexed = len(store), index_path(store).is_file()
    if store.settings.per_residue:
        raise Problem(422, "vectors.invalid", "this store holds vectors of residues, which are not searched.")
    if body.exact is False and not indexed:
        raise Problem(422, "vectors.no_index", "this store has no index. Leave out exact.")
    exact = body.exact if body.exact is not None else size <= EXACT_UP_TO or not indexed
    count, limit = len(body.sequences or body.vectors or ()), service.settings.max_items
    if count > limit:
        raise too_many_items(count, limit, "sequences" if body.sequences else "vectors")
    limit = service.settings.max_comparisons
    if exact and count * size > limit:
        raise Problem(
            413, "request.too_large",
            f"{count} queries among {size} vectors are {count * size} comparisons; the limit is {limit}. "
            "Send fewer queries.",
            given=count * size, limit=limit,
        )  # fmt: skip
    return exact, size


def _given(store: VectorStore, vectors: list[list[float]]) -> np.ndarray:
    width = store.settings.width
    for i, vector in enumerate(vectors):
        if len(vector) != width:
            raise SpecError(
                f"vector {i} has {len(vector)} numbers; this store's have {width}.", field="vectors"
            )
    with np.errstate(over="ignore"):
        queries = np.array(vectors, dtype=np.float32)
        lengths = np.linalg.norm(queries, axis=1)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise SpecError("a vector is zero, or too large for float32.", field="vectors")
    return queries


def _search(
    store: VectorStore, queries: np.ndarray, k: int, exact: bool
) -> tuple[Neighbours, list[list[tuple[str, ...]]]]:
    found = search(store, queries, k, exact=exact)
    return found, [store.names(places) for places in found.places]


class _Queries(Order):
    """Embeds sequences as the store's were. What comes is kept in `rows` and `notes` and not sent."""

    def __init__(self, body: SearchRequest, settings: VectorSettings):
        reads = "none" if settings.homologs == "none" else "auto"
        super().__init__(
            model=body.model, sequences=body.sequences or (), long_sequences=settings.long_sequences,
            homologs=reads,
        )  # fmt: skip
        self.settings = settings
        self.rows: list[np.ndarray] = []
        self.notes: list[tuple[str, ...]] = []
        self.tokens = 0

    def check(self, target: Target, service: Service) -> None:
        super().check(target, service)
        s, homologs = self.settings, ""
        if target.reads_homologs:
            reference = target.manifest.extra["homologs"]["reference"]
            homologs = "none" if self.homologs == "none" else f"{reference} {READING.hash}"
        ours = (target.manifest.weights_hash, target.shape.max_residues, service.settings.dtype, homologs)
        if ours != (s.weights_hash, s.max_residues, s.dtype, s.homologs):
            raise Problem(
                422, "vectors.other_settings",
                f"the store was not made by {target.model.exact} as this server runs it. Name the store's model, or "
                "send vectors.",
            )  # fmt: skip

    def ask(self, target: Target) -> Ask:
        s = self.settings
        options = {"pooling": s.pooling, "layers": s.layers, "per_residue": False}
        return Ask(
            "embed",
            target.model.exact,
            tuple(self.sequences),
            long_sequences=s.long_sequences,
            options=options,
        )

    def answer_bytes(self, target: Target) -> tuple[int, int]:
        return embedding_bytes(target, len(self.settings.layers), False)

    def writer(self, target: Target, cost: Checked) -> Any:
        return _Kept(self)


class _Kept(Whole):
    def __init__(self, order: _Queries):
        super().__init__(JSON, lambda reply, usage: b"")
        self.order = order

    def rows(self, reply: Reply, first: int) -> bytes:
        assert reply.arrays is not None
        self.order.rows += [np.asarray(a, np.float32).reshape(-1) for a in reply.arrays]
        self.order.notes += [tuple(n) for n in reply.notes]
        return b""

    def end(self, usage: dict[str, int]) -> bytes:
        self.order.tokens = usage["tokens"]
        return b""

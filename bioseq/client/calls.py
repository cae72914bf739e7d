"""What can be asked of a service, each call once: its request, its pages by the server's limits, its answer.

Sequences may come as a list or an iterator of strings or `Record`s. A sequence that the server refuses raises its
error, with its index in the whole input; with `on_error="report"` the others are answered, its place holds None,
and the error is in the client's `errors`. Numbers travel as Arrow. `homologs` and `alignment` (a file here) are as
in `Predictor`; reference sets are named, and are the server's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bioseq.client.answers import ARROW, by_sequence, cut_off, predictions, stack, table_of
from bioseq.client.answers import vectors as vectors_of
from bioseq.client.exchange import Call, Connection, ask
from bioseq.errors import SequenceError, SpecError
from bioseq.progress import Progress

if TYPE_CHECKING:
    from bioseq.sequences.fasta import Record

PACK_RESIDUES = 50_000  # a request is not larger than this, for steady progress and cheap repetition
Pack = list[tuple[int, str, str | None]]  # place in the input, sequence, id


async def limits(at: Connection) -> dict[str, Any]:
    """What one request may hold; asked once."""
    if not at._limits:
        at._limits = await ask(at, Call("GET", "/v1/limits"))
    return at._limits


async def models(at: Connection) -> list[dict[str, Any]]:
    """All backbones and heads of the server."""
    found: list[dict[str, Any]] = []
    query: dict[str, str] = {}
    while True:
        page: dict[str, Any] = await ask(at, Call("GET", "/v1/models", query=query))
        found += page["data"]
        if not page.get("has_more"):
            return found
        query = {"after": found[-1]["id"]}


async def estimate(at: Connection, kind: str, *, homologs: str = "auto", **fields: Any) -> dict[str, Any]:
    """Tokens, seconds and bytes of an embed, predict, score, scan or screen, by the fields of `POST /v1/estimate`."""
    return await ask(at, Call("POST", "/v1/estimate", _body(at, homologs, None, kind=kind, **fields)))


async def embed(
    at: Connection,
    seqs: Iterable[str | Record],
    *,
    pooling: str = "mean",
    layers: Sequence[int] = (-1,),
    per_residue: bool = False,
    long_sequences: str = "error",
    homologs: str = "auto",
    alignment: str | Path | None = None,
    on_error: str = "raise",
    progress: bool = False,
) -> Any:
    """As `Predictor.embed`: float32 [N, D], [N, layers, D], or per residue a list of [L, D] or [layers, L, D]. With
    `on_error="report"` a list, with None for what was refused."""
    layers = [int(layer) for layer in layers]
    body = _body(
        at, homologs, alignment,
        pooling=pooling, layers=layers, per_residue=per_residue, long_sequences=long_sequences,
    )  # fmt: skip
    read = partial(vectors_of, column="embedding", layers=len(layers), ragged=per_residue)
    rows = await _all(at, seqs, "/v1/embed", body, read, on_error, progress)
    return rows if per_residue or on_error == "report" else stack(rows)


async def logits(
    at: Connection,
    seqs: Iterable[str | Record],
    *,
    long_sequences: str = "error",
    homologs: str = "auto",
    alignment: str | Path | None = None,
    on_error: str = "raise",
    progress: bool = False,
) -> list[np.ndarray]:
    """As `Predictor.logits`: a list of float32 [L, V]."""
    body = _body(at, homologs, alignment, long_sequences=long_sequences)
    read = partial(vectors_of, column="logits", ragged=True)
    return await _all(at, seqs, "/v1/logits", body, read, on_error, progress)


async def predict(
    at: Connection,
    seqs: Iterable[str | Record],
    heads: Sequence[str],
    *,
    nearest: int = 0,
    translate: str = "none",
    genetic_code: int = 1,
    long_sequences: str = "error",
    homologs: str = "auto",
    alignment: str | Path | None = None,
    on_error: str = "raise",
    progress: bool = False,
) -> list[Any]:
    """As `Predictor.predict`: one dict a sequence, keyed by head. With `translate` "one" or "six" the sequences are coding
    ones, and each gives a list of its proteins: `{"strand", "first_base", "last_base", "residues", "predictions"}`."""
    heads = [h for h in heads.split(",") if h] if isinstance(heads, str) else list(heads)
    coding = {} if translate == "none" else {"translate": translate, "genetic_code": genetic_code}
    body = _body(
        at, homologs, alignment, heads=heads, nearest=nearest, long_sequences=long_sequences, **coding
    )
    read = partial(predictions, heads=heads)
    return await _all(at, seqs, "/v1/predict", body, read, on_error, progress, coding=bool(coding))


async def score(
    at: Connection,
    wild_type: str | Record,
    mutants: Sequence[Any],
    *,
    strategy: str = "masked-marginals",
    long_sequences: str = "error",
    homologs: str = "auto",
    alignment: str | Path | None = None,
    progress: bool = False,
) -> list[float]:
    """As `Predictor.score`."""
    most = (await limits(at))["max_variants"]
    names = [str(m) for m in mutants]
    body = _body(
        at, homologs, alignment,
        sequence=_text(wild_type), strategy=strategy, long_sequences=long_sequences,
    )  # fmt: skip

    async def page(some: list[str]) -> list[float]:
        table = await _table(at, "/v1/score", {**body, "mutants": some}, len(some))
        return table["score"].to_pylist()

    pages = (partial(page, names[first : first + most]) for first in range(0, len(names), most))
    return await _joined(at, pages, len(names), progress)


async def scan(
    at: Connection,
    sequence: str | Record,
    *,
    strategy: str = "masked-marginals",
    long_sequences: str = "error",
    homologs: str = "auto",
    alignment: str | Path | None = None,
    progress: bool = False,
) -> np.ndarray:
    """As `Predictor.scan`: float32 [L, 20]. One request, so `progress` shows nothing."""
    body = _body(
        at, homologs, alignment,
        sequence=_text(sequence), strategy=strategy, long_sequences=long_sequences,
    )  # fmt: skip
    return stack(vectors_of(await _table(at, "/v1/scan", body, None), "scores"))


async def search(
    at: Connection,
    store: str,
    seqs: Sequence[str | Record] | None = None,
    *,
    vectors: Any = None,
    k: int = 10,
    exact: bool | None = None,
    progress: bool = False,
) -> list[list[dict[str, Any]]]:
    """The k nearest in a vector store of the server, best first: `{"ids", "similarity"}` of each. Give sequences, or
    `vectors` [N, D]; `exact` is by the store's size unless said."""
    if (seqs is None) == (vectors is None) or isinstance(seqs, str):
        raise SpecError("give a list of sequences, or vectors.", field="seqs")
    body = {"model": at.model, "store": store, "k": k, "exact": exact}
    most = await limits(at)
    if vectors is not None:
        rows = np.asarray(vectors, np.float32).tolist()
        packs = [rows[i : i + 1000] for i in range(0, len(rows), 1000)]
    else:
        packs = [[text for _, text, _ in pack] for pack in _packs(seqs or [], most)]
    field, first = "sequences" if vectors is None else "vectors", 0
    asks = []

    async def page(first: int, some: list[Any]) -> list[list[dict[str, Any]]]:
        try:
            found: dict[str, Any] = await ask(at, Call("POST", "/v1/search", {**body, field: some}))
        except SequenceError as error:
            raise error.at(index=first + (error.index or 0)) from None
        if len(found["data"]) != len(some):
            raise cut_off(f"{len(found['data'])} of {len(some)} rows came")
        return [item["hits"] for item in found["data"]]

    for some in packs:
        asks.append(partial(page, first, some))
        first += len(some)
    return await _joined(at, iter(asks), first, progress)


async def stores(at: Connection) -> list[dict[str, Any]]:
    """The server's vector stores: `store`, `vectors`, `indexed`, `weights_hash` of each."""
    return (await ask(at, Call("GET", "/v1/stores")))["data"]


async def homologs(
    at: Connection, sequence: str | Record, *, homologs: str = "auto", most: int = 50
) -> dict[str, Any]:
    """The best homologs of one protein in a reference set of the server: `source`, `number` found, `query`, and in `data` of
    each `id`, `identity`, `coverage`, `e_value`, `bits` and `aligned`, its residues on the protein's columns."""
    body = {"sequence": _text(sequence), "homologs": homologs, "most": most}
    return await ask(at, Call("POST", "/v1/homologs", body))


# ------------------------------------------------------------------------------------------------------ requests


def _text(sequence: str | Record) -> str:
    return sequence if isinstance(sequence, str) else sequence.sequence


def _body(at: Connection, homologs: str, alignment: str | Path | None, **fields: Any) -> dict[str, Any]:
    """`homologs` and the text of an `alignment` are sent only where they are asked for: services before them refuse
    these fields. Raises `SpecError`, and `AlignmentError` for a file that cannot be read."""
    if not isinstance(homologs, str):
        raise SpecError(
            f"{type(homologs).__name__} was given. A service takes auto, none, default or the name of a reference set.",
            field="homologs",
        )
    if homologs != "auto":
        fields["homologs"] = homologs
    if alignment is not None:
        from bioseq.homologs.alignment import alignment_bytes

        fields["alignment"] = alignment_bytes(alignment).decode("utf-8", "replace")
    return {"model": at.model, **fields}


async def _table(at: Connection, path: str, body: dict[str, Any], rows: int | None) -> Any:
    return await ask(at, Call("POST", path, body, headers={"Accept": ARROW}), partial(table_of, rows=rows))


async def _joined(at: Connection, asks: Iterator[Any], total: int, progress: bool) -> list[Any]:
    """The rows of several requests, in order."""
    rows: list[Any] = []
    with Progress(total or 1, "remote", unit="items", enabled=progress and bool(total)) as bar:
        async with contextlib.aclosing(at.driver.several(asks)) as answers:
            async for some in answers:
                rows += some
                bar.add(len(some))
    return rows


def _packs(seqs: Iterable[str | Record], most: dict[str, Any]) -> Iterator[Pack]:
    """The input cut by the server's limits, in order; it is read as packs are asked for."""
    if isinstance(seqs, str):
        raise SpecError("give a list of sequences, not one string.", field="seqs")
    room = min(PACK_RESIDUES, most["max_body_bytes"] // 2, most["max_request_tokens"] // 2)
    pack, size = Pack(), 0
    for place, seq in enumerate(seqs):
        text = _text(seq)
        if pack and (len(pack) >= most["max_items"] or size + len(text) + 2 > room):
            yield pack
            pack, size = Pack(), 0
        pack.append((place, text, None if isinstance(seq, str) else seq.id))
        size += len(text) + 2
    if pack:
        yield pack


async def _all(
    at: Connection,
    seqs: Iterable[str | Record],
    path: str,
    body: dict[str, Any],
    read: Callable[[Any], list[Any]],
    on_error: str,
    progress: bool,
    coding: bool = False,
) -> list[Any]:
    """The rows of all sequences, packed into requests; of `coding` ones a list each. Under "report" a refused sequence is
    taken out of its pack and the rest is asked for again."""
    if on_error not in ("raise", "report"):
        raise SpecError(f"{on_error!r} is not one of raise, report.", field="on_error")
    errors = at.errors = list[SequenceError]()

    async def one(pack: Pack) -> list[Any]:
        left, rows = pack, list[Any]()
        while left:
            try:
                texts = [text for _, text, _ in left]
                asked = {**body, "sequences": texts}
                table = await _table(at, path, asked, None if coding else len(texts))
                rows = by_sequence(table, read(table), len(texts)) if coding else read(table)
                break
            except SequenceError as error:
                if error.index is None or not 0 <= error.index < len(left):
                    raise
                place, _, record = left[error.index]
                named = error.at(index=place, record=record)
                if on_error == "raise":
                    raise named from None
                errors.append(named)
                left = left[: error.index] + left[error.index + 1 :]
        found = {place: row for (place, _, _), row in zip(left, rows, strict=True)}
        return [found.get(place) for place, _, _ in pack]

    most = await limits(at)
    if coding:  # six proteins of a sequence, and together twice as many residues as it has bases
        most = {**most, "max_items": max(1, most["max_items"] // 6)}
        most["max_request_tokens"] //= 4
    asks = (partial(one, pack) for pack in _packs(seqs, most))
    return await _joined(at, asks, len(seqs) if isinstance(seqs, Sequence) else 0, progress)

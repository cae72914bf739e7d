"""Both clients over a stand-in service: requests, pages, order, tries, refusals."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import threading
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from client_service import URL, StandIn, problem, stream_of, vector_of

import bioseq
from bioseq.client import AsyncClient, Client
from bioseq.errors import AlignmentError, IllegalResidueError, SequenceError, ServiceError, SpecError

SEQS = ["MK", "ACD", "GGGG", "WWWWW", "MKTAY", "L", "YV", "HHH", "T" * 9, "CAT"]


def test_the_two_clients_have_the_same_methods():
    def names(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert names(Client) == names(AsyncClient) > {"embed", "score", "submit", "follow", "result", "estimate"}


def test_packs_by_the_limits_and_keeps_order(ask):
    service = StandIn()
    np.testing.assert_array_equal(ask(service, "embed", iter(SEQS)), [vector_of(s) for s in SEQS])
    assert sorted(len(b["sequences"]) for b in service.bodies) == [2, 4, 4]
    assert all(b["model"] == "default" and b["pooling"] == "mean" for b in service.bodies)
    assert ask(service, "embed", []).shape[0] == 0


def test_each_call_reads_its_answer(ask):
    service = StandIn()
    assert ask(service, "score", "MKT", [f"A{i}G" for i in range(1, 9)]) == list(range(1, 9))
    assert sorted(len(b["mutants"]) for b in service.bodies) == [2, 3, 3]
    assert ask(service, "predict", ["MKT", "L"], "fold,size") == [
        {"fold": {"value": n}, "size": {"value": n}} for n in (3.0, 1.0)
    ]
    assert [row.shape for row in ask(service, "logits", ["MKT", "L"])] == [(3, 2), (1, 2)]
    assert ask(service, "estimate", "embed", lengths=[3, 4]) == {"items": 1}
    assert service.bodies[-1] == {"model": "default", "kind": "embed", "lengths": [3, 4]}


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("embed", (["MK"],)),
    ("logits", (["MK"],)),
    ("predict", (["MK"], ["fold"])),
    ("score", ("MK", ["M1A"])),
    ("scan", ("MK",)),
    ("estimate", ("score",)),
]


@pytest.mark.parametrize(("method", "args"), CALLS)
def test_homologs_travel_only_where_asked_for(ask, method, args):
    service = StandIn()
    for homologs in ("auto", "none", "default", "uniref"):
        ask(service, method, *args, homologs=homologs)
    assert [b.get("homologs") for b in service.bodies] == [None, "none", "default", "uniref"]
    with pytest.raises(SpecError, match="homologs"):
        ask(service, method, *args, homologs=["uniref"])


@pytest.mark.parametrize(("method", "args"), CALLS[:-1])
def test_the_text_of_an_alignment_travels(ask, tmp_path, method, args):
    service, file = StandIn(), tmp_path / "mine.a3m.gz"
    file.write_bytes(gzip.compress(b">q\nMK\n>a\nMR\n"))
    ask(service, method, *args, alignment=file)
    assert service.bodies[-1]["alignment"] == ">q\nMK\n>a\nMR\n" and "homologs" not in service.bodies[-1]
    with pytest.raises(AlignmentError, match="cannot be read"):
        ask(service, method, *args, alignment=tmp_path / "nowhere.a3m")


def test_what_passes_is_hidden(ask, pauses):
    broken = [kind("x") for kind in (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadTimeout)]
    troubles = [429, 503, *broken, 502, 500]
    np.testing.assert_array_equal(ask(StandIn(troubles), "embed", ["MK"]), [vector_of("MK")])
    assert len(pauses) == len(troubles) and pauses == sorted(pauses)


@pytest.mark.parametrize(
    ("trouble", "pauses_asked"),
    [(503, 3), (500, 1), (400, 0), (401, 0), (307, 0), (httpx.ConnectError("x"), 3)],
)
def test_what_stays_is_raised(ask, pauses, trouble, pauses_asked):
    with pytest.raises(ServiceError) as caught:
        ask(StandIn([trouble] * 9), "models", client={"retries": 3})
    assert len(pauses) == pauses_asked
    assert caught.value.status == (trouble if isinstance(trouble, int) else None)


def test_the_servers_wish_is_kept(ask, pauses):
    def later(request: httpx.Request) -> httpx.Response:
        return httpx.Response(429, headers={"Retry-After": "40"}, json={"code": "overloaded", "detail": "no"})

    ask(StandIn([later]), "embed", ["MK"])
    assert pauses == [40.0]


def test_text_that_is_not_json_is_an_error(ask):
    page = lambda request: httpx.Response(200, text='{"data": [')  # noqa: E731
    with pytest.raises(ServiceError, match="broke off"):
        ask(StandIn([page]), "models", client={"retries": 0})


def test_refused_sequences(ask):
    seqs = [*SEQS[:5], "A1", SEQS[6], "1", "Y1"]
    with pytest.raises(IllegalResidueError, match="sequence 5: illegal residue") as caught:
        ask(StandIn(), "embed", seqs)
    assert caught.value.index == 5
    with pytest.raises(IllegalResidueError, match="record 'x'"):
        ask(StandIn(), "embed", [bioseq.Record("x", "A1")])
    got = ask(StandIn(), "embed", iter(seqs), on_error="report")
    assert [i for i, row in enumerate(got) if row is None] == [5, 7, 8]
    for row, seq in zip(got, seqs, strict=True):
        assert row is None or list(row) == vector_of(seq)
    assert ask(StandIn(), "embed", ["1"] * 5, on_error="report") == [None] * 5
    with pytest.raises(SpecError, match="on_error"):
        ask(StandIn(), "embed", seqs, on_error="skip")
    with pytest.raises(SpecError, match="not one string"):
        ask(StandIn(), "embed", "MKT")


def test_a_refusal_that_names_no_place_is_raised(ask):
    odd = [lambda request, i=i: problem(422, "sequence.too_long", "too long.", index=i) for i in (None, 7)]
    for trouble in odd:
        with pytest.raises(SequenceError, match="too long"):
            ask(StandIn([trouble]), "embed", ["MK"], on_error="report")


def test_errors_are_at_the_client():
    with bioseq.connect(URL, transport=StandIn()) as remote:
        remote.embed(["MK", "A1"], on_error="report")
        assert [e.index for e in remote.errors] == [1]
        remote.embed(["MK"])
        assert remote.errors == []


class Meeting(httpx.MockTransport):
    """Answers only when four requests are there, and counts the most that were there at once."""

    def __init__(self) -> None:
        self.here = self.most = 0
        self.lock, self.four = threading.Lock(), threading.Barrier(4, timeout=30)
        self.event: Any = None
        self.service = StandIn()
        super().__init__(self.service.answer)

    def count(self, change: int) -> None:
        with self.lock:
            self.here += change
            self.most = max(self.most, self.here)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.count(1)
            self.four.wait()
            self.count(-1)
        return super().handle_request(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.event = self.event or asyncio.Barrier(4)
            self.count(1)
            await asyncio.wait_for(self.event.wait(), 30)
            self.count(-1)
        return await super().handle_async_request(request)


def test_four_requests_are_in_flight(ask):
    service = Meeting()
    seqs = ["M" * n for n in range(1, 33)]  # eight packs
    np.testing.assert_array_equal(ask(service, "embed", seqs), [vector_of(s) for s in seqs])
    assert service.most == 4


def test_nothing_runs_on_after_a_cancelled_call():
    class Slow(httpx.MockTransport):
        cancelled = 0

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.method == "POST":
                try:
                    await asyncio.Event().wait()
                finally:
                    Slow.cancelled += 1
            return await super().handle_async_request(request)

    async def main() -> None:
        async with AsyncClient(URL, transport=Slow(StandIn().answer)) as remote:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(remote.embed(["MK"] * 100), 0.2)
            assert Slow.cancelled == 4
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_the_key_travels_and_is_not_shown(ask):
    service = StandIn()
    ask(service, "embed", ["MK"], client={"api_key": "bsk_secret"})
    assert service.requests[0].headers["Authorization"] == "Bearer bsk_secret"
    assert "secret" not in repr(bioseq.connect(URL, "bsk_secret"))
    with pytest.raises(SpecError, match="url"):
        bioseq.connect("ftp://x")


def test_layers_and_residues_in_the_predictors_shapes(ask):
    kind = pa.list_(pa.list_(pa.float32(), 4))
    ragged = pa.array([[[1, 2, 3, 4], [5, 6, 7, 8]], [[9, 10, 11, 12]]], type=kind)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=stream_of(pa.record_batch({"embedding": ragged}), slices=2))

    first, second = ask(StandIn([answer]), "embed", ["MK", "L"], layers=(0, -1), per_residue=True)
    np.testing.assert_array_equal(first, [[[1, 2], [5, 6]], [[3, 4], [7, 8]]])  # [layers, L, D]
    np.testing.assert_array_equal(second, [[[9, 10]], [[11, 12]]])


def test_the_room_is_light_and_says_what_is_missing():
    code = """
import sys
sys.modules["httpx"] = None
import bioseq.client
assert not {"numpy", "torch", "pyarrow", "bioseq.client.sync"} & set(sys.modules)
from bioseq.client import AsyncClient
import bioseq.errors
try:
    AsyncClient("http://x")
except bioseq.errors.MissingExtraError as error:
    print(error)
assert not {"torch", "pyarrow"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "bioseq[client]" in done.stdout, done.stderr

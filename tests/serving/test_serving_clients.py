"""Every way in gives the same numbers: HTTP JSON, HTTP Arrow, the OpenAI client, our clients, the predictor."""

from __future__ import annotations

import asyncio
import threading

import httpx
import numpy as np
import pytest
from serving_helpers import CANARY, SEQS, TASKS, same

import bioseq
from bioseq.client.sync import AsyncClient
from bioseq.errors import (
    IllegalResidueError,
    MutationError,
    NotFoundError,
    SequenceError,
    SequenceTooLongError,
    ServiceError,
    SpecError,
)


@pytest.fixture
def predictor(registry):
    return bioseq.load("default", threads=1, registry=registry)


def relative(got, want) -> float:
    pairs = list(zip(got, want, strict=True))
    assert all(np.shape(g) == np.shape(w) for g, w in pairs)
    return max(np.linalg.norm(np.subtract(g, w, dtype=np.float64)) / np.linalg.norm(w) for g, w in pairs)


def test_all_ways_are_equal(live, predictor):
    import pyarrow as pa
    from openai import OpenAI

    want = predictor.embed(SEQS)
    with live() as service:
        with httpx.Client(base_url=service.url) as http:
            answer = http.post("/v1/embed", json={"sequences": SEQS}).json()
            by_json = [d["embedding"] for d in answer["data"]]
            arrow = {"Accept": "application/vnd.apache.arrow.stream"}
            content = http.post("/v1/embed", json={"sequences": SEQS}, headers=arrow).content
            by_arrow = pa.ipc.open_stream(content).read_all()["embedding"].to_pylist()
        openai = OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0)
        by_default = openai.embeddings.create(model="default", input=SEQS)
        by_float = openai.embeddings.create(model="default", input=SEQS, encoding_format="float")
        with bioseq.connect(service.url) as remote:
            by_client = remote.embed(SEQS)

        async def ask():
            async with AsyncClient(service.url) as remote:
                return await remote.embed(iter(SEQS))

        by_async = asyncio.run(ask())
        for got in (
            by_json,
            by_arrow,
            [d.embedding for d in by_default.data],
            [d.embedding for d in by_float.data],
            by_client,
            by_async,
        ):
            assert relative(got, want) <= 1e-5
        assert by_default.usage.total_tokens == sum(len(s.strip("*")) + 2 for s in SEQS)
        assert by_client.dtype == np.float32 and by_client.shape == want.shape
        one = openai.embeddings.create(model="default", input=SEQS[0])
        assert relative([one.data[0].embedding], want[:1]) <= 1e-5
        assert next(m.id for m in openai.models.list()).count("@") == 1


def test_openai_client_sees_openai_errors(live):
    import openai

    with live() as service:
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.NotFoundError) as missing:
            client.embeddings.create(model="nope", input="MKT")
        assert missing.value.code == "model.not_found"
        with pytest.raises(openai.UnprocessableEntityError) as illegal:
            client.embeddings.create(model="default", input=["MKT", CANARY + "1"])
        assert illegal.value.code == "sequence.illegal_residue"
        assert illegal.value.param == "input[1]"
        assert CANARY not in str(illegal.value)


def test_client_methods_match_the_predictor(live, predictor):
    long = SEQS[0] * 40
    with live() as service, bioseq.connect(service.url) as remote:
        for options in (
            {"pooling": "max"},
            {"layers": (0, -1)},
            {"per_residue": True},
            {"per_residue": True, "layers": (1, 2)},
        ):
            assert relative(remote.embed(SEQS, **options), predictor.embed(SEQS, **options)) <= 1e-5
        windowed = remote.embed([long], long_sequences="window")
        assert relative(windowed, predictor.embed([long], long_sequences="window")) <= 1e-5
        assert relative(remote.logits(SEQS), predictor.logits(SEQS)) <= 1e-5
        assert relative([remote.scan(SEQS[1])], [predictor.scan(SEQS[1], homologs="none")]) <= 1e-4
        mutants = ["A1G", "WT", "C2D:W19Y"]
        np.testing.assert_allclose(
            remote.score(SEQS[1], mutants),
            predictor.score(SEQS[1], mutants, homologs="none"),
            rtol=1e-4,
            atol=1e-5,
        )
        got, want = remote.predict(SEQS, list(TASKS)), predictor.predict(SEQS, list(TASKS))
        for g, w in zip(got, want, strict=True):
            assert list(g) == list(w)
            for head in TASKS:
                same(g[head], w[head])
        got, want = (p.predict(SEQS, list(TASKS), nearest=2) for p in (remote, predictor))
        same(got, want)
        assert all(len(g[head]["nearest"]) == 2 for g in got for head in TASKS)
        by_json = httpx.post(
            f"{service.url}/v1/predict", json={"sequences": SEQS, "heads": ["fold"], "nearest": 2}
        )
        same([d["predictions"]["fold"] for d in by_json.json()["data"]], [w["fold"] for w in want])
        assert {m["name"] for m in remote.models()} == {"tiny", *TASKS}
        records = [bioseq.Record("a", SEQS[0]), bioseq.Record("b", SEQS[1])]
        assert relative(remote.embed(records), predictor.embed(SEQS[:2])) <= 1e-5
        assert remote.embed([]).shape[0] == 0


def test_command_line_on_a_server(live, predictor, tmp_path, capsys):
    """`predict --server`: the predictor's rows, a bad record left out and named by its id, or nothing written."""
    import json

    from bioseq.commands.predict import main

    fasta = tmp_path / "p.fasta"
    fasta.write_text(f">a\n{SEQS[0]}\n>bad\nMK1T\n>c\n{SEQS[1]}\n")
    out = tmp_path / "p.jsonl"
    with live() as service:
        common = [str(fasta), "--heads", "stability,soluble", "--nearest", "1", "--server", service.url]
        assert main([*common, "-o", str(out), "--on-error", "skip"]) == 0
        assert "1 records left out" in capsys.readouterr().err
        with pytest.raises(IllegalResidueError):
            main([*common, "-o", str(tmp_path / "none.csv")])
        assert not (tmp_path / "none.csv").exists()
        with pytest.raises(NotFoundError):
            main([*common, "--model", "nope", "-o", str(tmp_path / "none.csv")])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r.pop("id"), r["head"]) for r in rows] == [
        (i, h) for i in "ac" for h in ("stability", "soluble")
    ]
    want = predictor.predict(SEQS[:2], ["stability", "soluble"], nearest=1)
    same(rows, [w[h] for w in want for h in ("stability", "soluble")])


def test_packs_by_the_limits_and_keeps_order(live, predictor):
    seqs = [SEQS[i % 4] for i in range(23)]
    with live(max_items=5) as service:
        with bioseq.connect(service.url) as remote:
            assert relative(remote.embed(s for s in seqs), predictor.embed(seqs)) <= 1e-5
            assert len(remote.predict(iter(seqs), ["fold"])) == 23
        log = service.app.settings.log_file
    with open(log) as lines:
        items = [line for line in lines if '"/v1/embed"' in line]
    assert len(items) == 5


def test_errors_are_the_local_ones(live):
    with live() as service, bioseq.connect(service.url, retries=0) as remote:
        seqs = ["MKT"] * 7 + [CANARY + "1"] + ["MKT"]
        with pytest.raises(IllegalResidueError) as caught:
            remote.embed(seqs)
        assert (caught.value.index, caught.value.position) == (7, len(CANARY) + 1)
        assert CANARY not in str(caught.value)
        with pytest.raises(IllegalResidueError, match="'x9'"):
            remote.embed([bioseq.Record("x9", "MK1")])
        with pytest.raises(SequenceTooLongError):
            remote.logits(["M" * 1023])
        with pytest.raises(SequenceError) as caught:
            remote.embed(["MKT", ""])
        assert caught.value.index == 1
        with pytest.raises(NotFoundError) as missing:
            remote.predict(["MKT"], ["nope"])
        assert missing.value.code == "head.not_found"
        with pytest.raises(MutationError):
            remote.score("MKT", ["A1G"])
        with pytest.raises(SpecError):
            remote.embed(["MKT"], layers=(77,))
        with pytest.raises(SpecError):
            remote.embed("MKT")
    with pytest.raises(ServiceError, match="cannot be reached"):
        bioseq.connect("http://127.0.0.1:9", retries=0).embed(["MKT"])


def test_one_bad_item_is_isolated_and_reported(live, predictor):
    seqs = [SEQS[0], "MK1", SEQS[1], "", "M" * 2000, SEQS[3], "MK-T"]
    good = [0, 2, 5]
    with live(max_items=3) as service:
        with bioseq.connect(service.url) as remote:
            rows = remote.embed(iter(seqs), on_error="report")
            assert [i for i, row in enumerate(rows) if row is not None] == good
            assert relative([rows[i] for i in good], predictor.embed([seqs[i] for i in good])) <= 1e-5
            assert sorted(e.index for e in remote.errors) == [1, 3, 4, 6]
            rows = remote.predict(seqs, ["fold"], on_error="report")
            assert [i for i, row in enumerate(rows) if row is not None] == good

        async def ask():
            async with AsyncClient(service.url) as remote:
                return await remote.embed(seqs, on_error="report"), sorted(e.index for e in remote.errors)

        rows, errors = asyncio.run(ask())
        assert [i for i, row in enumerate(rows) if row is not None] == good and errors == [1, 3, 4, 6]


class Flaky(httpx.BaseTransport):
    """Breaks in every way that it knows, then passes requests on."""

    def __init__(self, troubles):
        self.inner, self.troubles, self.lock = httpx.HTTPTransport(), list(troubles), threading.Lock()

    def handle_request(self, request):
        with self.lock:
            trouble = self.troubles.pop(0) if self.troubles and request.method == "POST" else None
        if isinstance(trouble, Exception):
            raise trouble
        if trouble is not None:
            return httpx.Response(trouble, headers={"Retry-After": "0"}, text="no")
        return self.inner.handle_request(request)


def test_retries_hide_what_passes(live, predictor, monkeypatch):
    pauses = []
    monkeypatch.setattr("bioseq.client.drivers.time.sleep", pauses.append)
    troubles = [429, 503, httpx.ConnectError("x"), httpx.RemoteProtocolError("x"), 502, 429]
    with live(max_items=2) as service:
        remote = bioseq.connect(service.url, transport=Flaky(troubles))
        assert relative(remote.embed(SEQS), predictor.embed(SEQS)) <= 1e-5
        assert len(pauses) == len(troubles)
        remote = bioseq.connect(service.url, transport=Flaky([503] * 50), retries=3)
        pauses.clear()
        with pytest.raises(ServiceError) as caught:
            remote.embed(["MKT"])
        assert caught.value.status == 503 and len(pauses) == 3
        assert pauses == sorted(pauses)


def test_key_travels(live, settings):
    from serving.database.base import Database
    from serving.database.keys import Keys

    database = Database(settings().database)
    database.upgrade()
    _, text = Keys(database).create("alice")
    with live() as service:
        with pytest.raises(ServiceError) as caught:
            bioseq.connect(service.url).embed(["MKT"])
        assert caught.value.status == 401 and caught.value.code == "auth.unauthenticated"
        assert bioseq.connect(service.url, api_key=text).embed(["MKT"]).shape == (1, 64)
        assert text not in repr(bioseq.connect(service.url, api_key=text))

"""`POST /v1/search`: what it finds, what it costs, what it refuses, and both clients."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from serving_helpers import SEQS

import bioseq
from bioseq.backbones.pooling import EmbedOptions
from bioseq.client import AsyncClient
from bioseq.errors import IllegalResidueError, ServiceError, SpecError
from bioseq.inference.vectors import embed_stored, settings_of
from bioseq.vectors.settings import VectorSettings
from bioseq.vectors.store import VectorStore, sequence_key


@pytest.fixture
def proteins(registry, tmp_path):
    """A store of SEQS by the default model."""
    model = bioseq.load("default", threads=1, registry=registry)
    options = EmbedOptions("mean", (-1,))
    store = VectorStore(tmp_path / "proteins", settings_of(model, options, "window"))
    queries = [model.prepare(s, embed=options, long_sequences="window") for s in SEQS]
    embed_stored(model, store, queries, [f"p{i}" for i in range(len(SEQS))])
    return store


def test_sequences_and_vectors_find_the_same(serve, proteins):
    async def go():
        async with serve(vector_stores=[str(proteins.path)], chunk_tokens=50) as http:
            body = {"store": "proteins", "sequences": SEQS, "k": 3}
            answer = (await http.post("/v1/search", json=body)).json()
            assert [item["hits"][0]["ids"] for item in answer["data"]] == [
                [f"p{i}"] for i in range(len(SEQS))
            ]
            assert all(item["hits"][0]["similarity"] == pytest.approx(1, abs=1e-5) for item in answer["data"])
            assert all(len(item["hits"]) == 3 for item in answer["data"])
            assert answer["exact"] and answer["vectors"] == len(SEQS) and answer["model"] == "tiny@1"
            embedded = (await http.post("/v1/embed", json={"sequences": SEQS})).json()
            assert answer["usage"] == embedded["usage"]
            vectors = [d["embedding"] for d in embedded["data"]]
            by_vector = (
                await http.post("/v1/search", json={"store": "proteins", "vectors": vectors, "k": 3})
            ).json()
            assert by_vector["usage"] == {"items": len(SEQS), "tokens": 0}
            for one, other in zip(answer["data"], by_vector["data"], strict=True):
                assert [h["ids"] for h in one["hits"]] == [h["ids"] for h in other["hits"]]
            assert answer["data"][2]["notes"] and not answer["data"][0]["notes"]  # a final * is dropped

    asyncio.run(go())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"store": "others", "sequences": ["MK"]}, 404, "vectors.not_found"),
        ({"store": "../proteins", "sequences": ["MK"]}, 422, "request.invalid"),
        ({"store": "proteins"}, 422, "request.invalid"),
        ({"store": "proteins", "sequences": ["MK"], "vectors": [[1.0]]}, 422, "request.invalid"),
        ({"store": "proteins", "vectors": [[1.0]]}, 422, "request.invalid"),
        ({"store": "proteins", "vectors": [[0.0] * 64]}, 422, "request.invalid"),
        ({"store": "proteins", "vectors": [[1e300] * 64]}, 422, "request.invalid"),
        ({"store": "proteins", "sequences": ["MK", "M1K"]}, 422, "sequence.illegal_residue"),
        ({"store": "proteins", "sequences": ["MK"], "exact": False}, 422, "vectors.no_index"),
        ({"store": "proteins", "sequences": ["MK"], "k": 1001}, 422, "request.invalid"),
        ({"store": "proteins", "sequences": ["MK"] * 4}, 413, "request.too_large"),
        ({"store": "foreign", "sequences": ["MK"]}, 422, "vectors.other_settings"),
    ],
)
def test_refusals(serve, proteins, tmp_path, body, status, code):
    foreign = VectorStore(tmp_path / "foreign", VectorSettings(weights_hash="sha256:a", width=64))
    foreign.add([sequence_key("A")], [np.ones(64, np.float32)], ["a"])

    async def go():
        stores = [str(proteins.path), str(foreign.path)]
        async with serve(vector_stores=stores, max_comparisons=12) as http:
            answer = await http.post("/v1/search", json=body)
            assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text

    asyncio.run(go())


def test_tokens_are_charged_and_the_scope_is_needed(serve, proteins, settings):
    from serving.database.base import Database
    from serving.database.keys import Keys

    database = Database(settings().database)
    database.upgrade()
    keys = Keys(database)
    poor = keys.create("poor", scopes=["read", "predict"], tokens_per_minute=60)[1]
    reader = keys.create("reader", scopes=["read"])[1]

    async def go():
        async with serve(vector_stores=[str(proteins.path)]) as http:
            body = {"store": "proteins", "sequences": SEQS[:1]}
            tell = {"Authorization": f"Bearer {reader}"}
            assert (await http.post("/v1/search", json=body, headers=tell)).status_code == 403
            tell = {"Authorization": f"Bearer {poor}"}
            first = await http.post("/v1/search", json=body, headers=tell)
            assert first.status_code == 200, first.text
            again = await http.post("/v1/search", json=body, headers=tell)
            assert (again.status_code, again.json()["code"]) == (429, "quota.exceeded")

    asyncio.run(go())


def test_both_clients_search(live, proteins):
    with live(vector_stores=[str(proteins.path)]) as service:
        remote = bioseq.connect(service.url, retries=0)
        found = remote.search("proteins", SEQS, k=2)
        assert [hits[0]["ids"] for hits in found] == [[f"p{i}"] for i in range(len(SEQS))]
        vectors = remote.embed(SEQS)
        assert [h[0]["ids"] for h in remote.search("proteins", vectors=vectors, k=1)] == [
            hits[0]["ids"] for hits in found
        ]
        with pytest.raises(ServiceError, match="no such vector store"):
            remote.search("others", SEQS)
        with pytest.raises(IllegalResidueError, match="1"):
            remote.search("proteins", ["MK", "M1"])
        with pytest.raises(SpecError):
            remote.search("proteins", "MK")

        async def go():
            async with AsyncClient(service.url) as other:
                return await other.search("proteins", SEQS, k=2)

        assert asyncio.run(go()) == found


def test_stores_are_listed(serve, proteins, tmp_path):
    async def go():
        async with serve(vector_stores=[str(proteins.path), str(tmp_path / "removed")]) as http:
            told = (await http.get("/v1/stores")).json()["data"]
            assert [(s["store"], s["vectors"], s["indexed"]) for s in told] == [
                ("proteins", len(SEQS), False)
            ]
            assert told[0]["weights_hash"] == proteins.settings.weights_hash
        async with serve() as http:
            assert (await http.get("/v1/stores")).json() == {"data": []}

    asyncio.run(go())

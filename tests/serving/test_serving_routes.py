"""The routes answer what the predictor says, in every format; names and versions mean what they say."""

from __future__ import annotations

import asyncio
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from serving_helpers import SEQS, TASKS, make_head, same

import bioseq
from bioseq.bundles.bundle import open_bundle

ARROW, NPZ = {"Accept": "application/vnd.apache.arrow.stream"}, {"Accept": "application/x-npz"}


@pytest.fixture
def predictor(registry):
    return bioseq.load("default", threads=1, registry=registry)


def table(response) -> pa.Table:
    assert response.status_code == 200, response.text
    return pa.ipc.open_stream(response.content).read_all()


def npz(response) -> dict:
    assert response.status_code == 200, response.text
    return dict(np.load(io.BytesIO(response.content), allow_pickle=False))


def close(got, want):
    """The plan's relative error, the worst over the sequences."""
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, dtype=np.float64), np.asarray(w, dtype=np.float64)
        assert g.shape == w.shape
        assert np.linalg.norm(g - w) <= 1e-5 * np.linalg.norm(w)


@pytest.mark.parametrize(
    "options",
    [{}, {"pooling": "max"}, {"pooling": "cls", "layers": [0, -1]}, {"per_residue": True}, {"per_residue": True, "layers": [1, 2]}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("chunk_tokens", [16_384, 40], ids=["whole", "sliced"])
def test_embed_in_every_format(serve, predictor, options, chunk_tokens):
    want = list(predictor.embed(SEQS, **options))
    if options.get("per_residue"):
        want = [w if w.ndim == 2 else w.swapaxes(0, 1) for w in want]

    async def go():
        async with serve(chunk_tokens=chunk_tokens) as http:
            body = {"sequences": SEQS, **options}
            answer = (await http.post("/v1/embed", json=body)).json()
            assert answer["model"] == "tiny@1"
            assert [d["index"] for d in answer["data"]] == [0, 1, 2, 3]
            assert answer["usage"] == {"items": 4, "tokens": sum(len(s.strip("*")) + 2 for s in SEQS)}
            assert answer["data"][2]["notes"] == ["stop codon '*' at the end dropped"]
            close([d["embedding"] for d in answer["data"]], want)

            arrow = table(await http.post("/v1/embed", json=body, headers=ARROW))
            assert arrow["index"].to_pylist() == [0, 1, 2, 3]
            assert arrow["notes"].to_pylist()[2] == answer["data"][2]["notes"]
            close(
                [np.asarray(v).reshape(w.shape) for v, w in zip(arrow["embedding"].to_pylist(), want)], want
            )

            arrays = npz(await http.post("/v1/embed", json=body, headers=NPZ))
            rows = arrays["embeddings"]
            if options.get("per_residue"):
                rows = np.split(rows, np.cumsum(arrays["lengths"])[:-1])
            close(rows, want)
            assert json.loads(str(arrays["meta"]))["usage"]["items"] == 4

    asyncio.run(go())


def test_float16_is_the_answers_type(serve, predictor):
    want = predictor.embed(SEQS).astype(np.float16)

    async def go():
        async with serve() as http:
            body = {"sequences": SEQS, "dtype": "float16"}
            got = table(await http.post("/v1/embed", json=body, headers=ARROW))["embedding"]
            assert got.type.value_type == pa.float16()
            rows = np.array(got.to_pylist(), dtype=np.float32)
            np.testing.assert_allclose(rows, want.astype(np.float32), rtol=2e-3, atol=1e-3)
            rows = np.array(
                [d["embedding"] for d in (await http.post("/v1/embed", json=body)).json()["data"]]
            )
            np.testing.assert_allclose(rows, want.astype(np.float32), rtol=2e-3, atol=1e-3)

    asyncio.run(go())


def test_logits(serve, predictor):
    seqs = [*SEQS, "MK<mask>AY"]
    want = predictor.logits(seqs)

    async def go():
        async with serve(chunk_tokens=50) as http:
            answer = (await http.post("/v1/logits", json={"sequences": seqs})).json()
            close([d["logits"] for d in answer["data"]], want)
            assert answer["tokens"] == list(predictor.alphabet.tokens)
            arrow = table(await http.post("/v1/logits", json={"sequences": seqs}, headers=ARROW))
            close(arrow["logits"].to_pylist(), want)

    asyncio.run(go())


def test_long_sequences(serve, predictor):
    long = SEQS[0] * 40
    body = {"sequences": [SEQS[1], long]}

    async def go():
        async with serve() as http:
            for policy in ("window", "truncate"):
                answer = (await http.post("/v1/embed", json={**body, "long_sequences": policy})).json()
                want = predictor.embed(body["sequences"], long_sequences=policy)
                close([d["embedding"] for d in answer["data"]], want)
                assert not answer["data"][0]["notes"]
                assert str(len(long)) in answer["data"][1]["notes"][0]

    asyncio.run(go())


def test_predictions_of_all_tasks_in_one_request(serve, predictor):
    heads = list(TASKS)
    want = predictor.predict(SEQS, heads)

    async def go():
        async with serve(chunk_tokens=50) as http:
            body = {"sequences": SEQS, "heads": heads}
            answer = (await http.post("/v1/predict", json=body)).json()
            assert answer["heads"] == {name: f"{name}@1" for name in heads}
            arrow = table(await http.post("/v1/predict", json=body, headers=ARROW))
            for i, expected in enumerate(want):
                for name in heads:
                    for got in (answer["data"][i]["predictions"][name], arrow[name].to_pylist()[i]):
                        same(got, expected[name])
                        assert set(got) == set(expected[name])

    asyncio.run(go())


@pytest.mark.parametrize("strategy", ["masked-marginals", "wt-marginals", "pseudo-log-likelihood"])
def test_scores_and_scans(serve, predictor, strategy):
    wild, mutants = SEQS[1], ["A1G", "WT", "C2D:W19Y"]
    want = predictor.score(wild, mutants, strategy=strategy, homologs="none")
    table_want = None if strategy[0] == "p" else predictor.scan(wild, strategy=strategy, homologs="none")

    async def go():
        async with serve() as http:
            body = {"sequence": wild, "mutants": mutants, "strategy": strategy}
            answer = (await http.post("/v1/score", json=body)).json()
            np.testing.assert_allclose(answer["scores"], want, rtol=1e-4, atol=1e-5)
            arrow = table(await http.post("/v1/score", json=body, headers=ARROW))
            assert arrow["mutant"].to_pylist() == mutants
            np.testing.assert_allclose(arrow["score"].to_numpy(), want, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(
                npz(await http.post("/v1/score", json=body, headers=NPZ))["scores"],
                want,
                rtol=1e-4,
                atol=1e-5,
            )
            if table_want is None:
                return
            body = {"sequence": wild, "strategy": strategy}
            answer = (await http.post("/v1/scan", json=body)).json()
            assert answer["letters"] == "ACDEFGHIKLMNPQRSTVWY"
            np.testing.assert_allclose(answer["scores"], table_want, rtol=1e-4, atol=1e-5)
            arrow = table(await http.post("/v1/scan", json=body, headers=ARROW))
            np.testing.assert_allclose(arrow["scores"].to_pylist(), table_want, rtol=1e-4, atol=1e-5)
            rows = npz(await http.post("/v1/scan", json=body, headers=NPZ))["scores"]
            np.testing.assert_allclose(rows, table_want, rtol=1e-4, atol=1e-5)

    asyncio.run(go())


def test_registry_changes_take_effect_without_a_failed_request(serve, registry, bundles, tmp_path):
    """A head is replaced and removed, an alias moved, while requests go on."""
    base = open_bundle(bundles["tiny"])
    body = {"sequences": SEQS[:2], "heads": ["stability"]}

    async def go():
        async with serve() as http:
            seen, bad, stop = set(), [], asyncio.Event()

            async def ask():
                while not stop.is_set():
                    r = await http.post("/v1/predict", json=body)
                    if r.status_code != 200:
                        bad.append(r.text)
                    else:
                        seen.add(r.json()["heads"]["stability"])

            async def until(version: str):
                async with asyncio.timeout(30):
                    while version not in seen:
                        await asyncio.sleep(0.02)

            task = asyncio.create_task(ask())
            try:
                await until("stability@1")
                folder = make_head(tmp_path / "second", base, "stability", seed=11)
                await asyncio.to_thread(registry.register, folder)
                await until("stability@2")
                await asyncio.to_thread(registry.remove, "stability@1")
                await asyncio.sleep(0.5)
                pinned = {**body, "heads": ["stability@1"]}
                assert (await http.post("/v1/predict", json=pinned)).status_code == 404
                await asyncio.to_thread(registry.alias, "dg", "stability@2")
                r = await http.post("/v1/predict", json={**body, "heads": ["dg", "stability@2"]})
                assert r.json()["heads"] == {"dg": "stability@2", "stability@2": "stability@2"}
                first = r.json()["data"][0]["predictions"]
                assert first["dg"] == first["stability@2"]
            finally:
                stop.set()
                await task
            assert not bad

    asyncio.run(go())


def test_several_backbones_by_name(serve, registry, tmp_path, predictor):
    from serving_helpers import make_backbone

    registry.register(make_backbone(tmp_path / "other", seed=99, name="other"))
    other = bioseq.load("other", threads=1, registry=registry)

    async def go():
        async with serve(max_models=1) as http:
            for name, model in (
                ("other", other),
                ("tiny@1", predictor),
                ("default", predictor),
                ("other@1", other),
            ):
                r = await http.post("/v1/embed", json={"sequences": SEQS, "model": name})
                close([d["embedding"] for d in r.json()["data"]], model.embed(SEQS))
            assert list(http.app.service.link.host.status()["models"]) == ["other@1"]
            r = await http.post("/v1/predict", json={"sequences": SEQS, "heads": ["fold"], "model": "other"})
            assert (r.status_code, r.json()["code"]) == (404, "head.not_found")

    asyncio.run(go())


def test_models_and_operations(serve, registry):
    async def go():
        async with serve() as http:
            listed = (await http.get("/v1/models")).json()["data"]
            assert {m["id"] for m in listed} == {"tiny@1", *(f"{t}@1" for t in TASKS)}
            shown = (await http.get("/v1/models/default")).json()
            assert shown["id"] == "tiny@1" and shown["architecture"]["n_layers"] == 2
            assert (await http.get("/v1/models/fold")).json()["evidence"] == {"beats_baseline": True}
            card = await http.get("/v1/models/fold/card")
            assert card.text.startswith("# fold") and card.headers["content-type"].startswith("text/markdown")
            limits = (await http.get("/v1/limits")).json()
            assert limits["max_items"] == 10_000 and limits["max_residues"] == 1022
            assert (await http.get("/health/live")).json() == {"status": "live"}
            assert (await http.get("/health/ready")).json()["status"] == "ready"
            await http.post("/v1/predict", json={"sequences": SEQS, "heads": ["fold"]})
            text = (await http.get("/metrics")).text
            assert 'bioseq_requests_total{process="ingress",route="/v1/predict",status="200"} 1.0' in text
            assert 'bioseq_head_items_total{process="ingress",head="fold"} 4.0' in text
            assert 'bioseq_engine_tokens_total{process="engine",model="tiny"}' in text
            assert "bioseq_engine_batch_fill_bucket" in text
            page = await http.get("/docs")
            assert page.status_code == 200 and "http://" not in page.text and "https://" not in page.text
            r = await http.get("/health/live", headers={"X-Request-ID": "abc-1"})
            assert r.headers["X-Request-ID"] == "abc-1"
            r = await http.get("/health/live", headers={"X-Request-ID": "bad id\x7f"})
            assert r.headers["X-Request-ID"] != "bad id\x7f"

    asyncio.run(go())


def test_estimate(serve, predictor):
    async def go():
        async with serve() as http:

            async def ask(**body):
                r = await http.post("/v1/estimate", json=body)
                assert r.status_code == 200, r.text
                return r.json()

            exact = await ask(sequences=SEQS)
            usage = (await http.post("/v1/embed", json={"sequences": SEQS})).json()["usage"]
            assert exact["tokens"] == usage["tokens"] and exact["items"] == usage["items"]
            assert exact["response_bytes"] == 4 * 64 * len(SEQS)
            assert exact["seconds"] > 0
            scan = await ask(kind="scan", lengths=[20])
            assert scan["tokens"] == 20 * 22
            body = {"sequence": SEQS[1]}
            assert (await http.post("/v1/scan", json=body)).json()["usage"]["tokens"] == scan["tokens"]
            screen = await ask(kind="screen", records=1_000_000, mean_length=350, heads=["fold"])
            assert screen["tokens"] == 352_000_000 and not screen["fits_one_request"]
            expected = predictor.config.flops_per_token(350) * 352_000_000
            assert screen["flops"] == pytest.approx(expected, rel=0.01)
            r = await http.post("/v1/estimate", json={"lengths": [3], "records": 2})
            assert r.status_code == 422

    asyncio.run(go())


def test_models_come_in_pages(serve):
    async def go():
        async with serve() as http:
            everything = (await http.get("/v1/models")).json()
            ids = [m["id"] for m in everything["data"]]
            assert len(ids) > 3 and not everything["has_more"]
            seen, query = [], {"limit": 2}
            while True:
                page = (await http.get("/v1/models", params=query)).json()
                assert len(page["data"]) <= 2
                seen += [m["id"] for m in page["data"]]
                if not page["has_more"]:
                    break
                query["after"] = seen[-1]
            assert seen == ids
            backbones = (await http.get("/v1/models", params={"kind": "backbone"})).json()["data"]
            assert [m["id"] for m in backbones] == ["tiny@1"]
            for bad in ({"limit": 0}, {"limit": 5000}, {"after": "gone@1"}, {"kind": "x"}):
                assert (await http.get("/v1/models", params=bad)).status_code == 422

    asyncio.run(go())

"""Homologs by HTTP: found apart from the engines, together for requests that wait, and told with every answer."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading

import numpy as np
import pytest
import torch
from serving_helpers import SEQS, D, same

from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.bundles.bundle import open_bundle, write_bundle
from bioseq.errors import OutputError, SearchError, ServiceError
from bioseq.homologs.reference import build_reference
from bioseq.homologs.search import search
from bioseq.inference.loading import load
from bioseq.inference.reading import HomologReader
from bioseq.sequences.fasta import Record
from serving.engine.asks import Ask
from serving.engine.searches import Reference, SearchAsk, Searches, Wanted

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
WILD = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDF"


def relative(got, want) -> float:
    pairs = [
        (np.asarray(g, dtype=np.float64).ravel(), np.asarray(w, dtype=np.float64).ravel())
        for g, w in zip(got, want)
    ]
    return max(float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in pairs)


def relatives(sequence: str, count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(a if draw.random() < 0.75 else draw.choice(LETTERS) for a in sequence) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    draw = random.Random(5)
    others = ["".join(draw.choice(LETTERS) for _ in range(90)) for _ in range(60)]
    found = [Record(f"r{i}", s) for i, s in enumerate([*relatives(WILD, 12, 1), *others])]
    return build_reference(found, tmp_path_factory.mktemp("sets") / "family", licence="CC0")


@pytest.fixture
def with_family(serve, reference):
    given = {"homologs": "family", "reference_sets": [str(reference.folder)], "search_threads": 1}
    return lambda **more: serve(**given | more)


def test_scores_and_scans_are_the_predictors_own(with_family, registry, reference):
    """auto is the server's reference set, and the homologs' number, effective number and weight are told."""
    model, mutants = load("tiny@1", registry=registry, threads=1), ["K2A", "WT", "T3S:A4V"]

    async def go():
        async with with_family() as http:
            for path, extra in (("/v1/score", {"mutants": mutants}), ("/v1/scan", {})):
                body = {"sequence": WILD, **extra}
                auto = (await http.post(path, json=body)).json()
                none = (await http.post(path, json=body | {"homologs": "none"})).json()
                assert none["homologs"] is None and auto["homologs"]["source"] == "family"
                assert auto["homologs"]["number"] >= 8 and 1 < auto["homologs"]["effective"] <= 13
                assert 0 <= auto["homologs"]["weight"] <= 1
                for got, homologs in ((auto, reference.folder), (none, "none")):
                    want = (
                        model.score(WILD, mutants, homologs=homologs)
                        if extra
                        else model.scan(WILD, homologs=homologs)
                    )
                    assert relative([np.array(got["scores"])], [np.asarray(want)]) <= 1e-4
                assert auto["scores"] != none["scores"]
            assert len(auto["depth"]) == len(auto["weights"]) == len(WILD)
            cost = (await http.post("/v1/estimate", json={"kind": "scan", "sequences": [WILD]})).json()
            assert cost["search_seconds"] > 0
            cost = (await http.post("/v1/estimate", json={"kind": "embed", "sequences": [WILD]})).json()
            assert cost["search_seconds"] is None
            named = (await http.post("/v1/scan", json={"sequence": WILD, "homologs": "family"})).json()
            assert named["scores"] == auto["scores"]
            arrow = await http.post(
                "/v1/scan", json={"sequence": WILD}, headers={"Accept": "application/vnd.apache.arrow.stream"}
            )
            assert arrow.status_code == 200

    asyncio.run(go())


def test_logits_beside_homologs(with_family, registry, reference):
    masked = WILD[:10] + "<mask>" + WILD[11:]
    want = load("tiny@1", registry=registry, threads=1).logits([masked, SEQS[1]], homologs=reference.folder)

    async def go():
        async with with_family(chunk_tokens=16) as http:
            body = {"sequences": [masked, SEQS[1]], "homologs": "family"}
            got = (await http.post("/v1/logits", json=body)).json()["data"]
            assert relative([np.array(g["logits"]) for g in got], want) <= 1e-4
            assert got[0]["homologs"]["number"] >= 8 and got[1]["homologs"]["number"] == 0
            plain = (await http.post("/v1/logits", json={"sequences": [masked]})).json()["data"]
            assert plain[0].get("homologs") is None
            for path, extra in (("/v1/logits", {"sequences": [WILD]}), ("/v1/scan", {"sequence": WILD})):
                mine = {**extra, "alignment": f">q\n{WILD}\n>a\n{relatives(WILD, 1, 3)[0]}\n"}
                r = (await http.post(path, json=mine)).json()
                found = r["homologs"] if path == "/v1/scan" else r["data"][0]["homologs"]
                assert (found["number"], found["source"]) == (1, "the alignment") and 0 <= found[
                    "weight"
                ] <= 1

    asyncio.run(go())


@pytest.mark.parametrize("homologs", ["elsewhere", "default@1", "../family", "/etc", ""])
def test_reference_sets_are_named_and_never_paths(with_family, homologs):
    async def go():
        async with with_family() as http:
            r = await http.post("/v1/scan", json={"sequence": WILD, "homologs": homologs})
            assert r.status_code == (404 if homologs == "elsewhere" else 422), r.text
            for path, extra in (("/v1/embed", {}), ("/v1/predict", {"heads": ["stability"]})):
                r = await http.post(path, json={"sequences": [WILD], "homologs": "family", **extra})
                assert r.status_code == 422, "neither searches"

    asyncio.run(go())


def test_a_server_without_searches_says_so(serve):
    async def go():
        async with serve() as http:
            assert (await http.post("/v1/scan", json={"sequence": WILD})).json()["homologs"] is None
            r = await http.post("/v1/scan", json={"sequence": WILD, "homologs": "default"})
            assert (r.status_code, r.json()["code"]) == (404, "homologs.not_found")

    asyncio.run(go())


@pytest.mark.parametrize("fault", ["missing", "failing", "removed", "full"])
def test_a_search_that_fails_is_503_and_the_rest_goes_on(
    with_family, reference, tmp_path, monkeypatch, fault
):
    """Its reason, no sequence, nothing lost: the next request without homologs is answered."""
    from bioseq.homologs import door, mmseqs

    folder = tmp_path / "family"
    shutil.copytree(reference.folder, folder)
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))
    if fault == "missing":
        monkeypatch.setattr(mmseqs, "find_mmseqs", lambda: None)
    elif fault == "failing":
        program = tmp_path / "mmseqs"
        program.write_text(
            f"#!/bin/sh\n[ \"$1\" = version ] && echo 1 && exit 0\necho 'no memory for {WILD}'\nexit 3\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(mmseqs, "find_mmseqs", lambda: str(program))
    elif fault == "full":

        def full(*_, **__):
            raise OutputError("mmseqs search could not write: No space left on device.")

        monkeypatch.setattr(door, "search", full)

    async def go():
        async with with_family(reference_sets=[str(folder)]) as http:
            if fault == "removed":
                shutil.rmtree(folder)
                shutil.rmtree(tmp_path / "home")
            for _ in range(2):
                r = await http.post("/v1/scan", json={"sequence": WILD[:-1]})
                assert r.status_code == 503 and r.json()["code"] != "internal", r.text
                assert "retry-after" in r.headers and "homologs" in r.json()["detail"]
                assert WILD[5:20] not in r.text
            r = await http.post("/v1/scan", json={"sequence": WILD, "homologs": "none"})
            assert r.status_code == 200

    asyncio.run(go())
    assert WILD[5:20] not in (tmp_path / "access.jsonl").read_text()


@pytest.fixture
def reading_heads(registry, bundles, reference, tmp_path, monkeypatch):
    """Two heads that search: `kin`, labels of its training rows, and `shape`, per residue, with the profile too."""
    from bioseq.homologs import reference as references

    monkeypatch.setattr(references, "SHIPPED", reference.folder)
    rows = [Record(f"t{i}", s) for i, s in enumerate(relatives(WILD, 6, 2))]
    rng = np.random.default_rng(0)

    def draw(*shape):
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    profile_width, copied = 21, 3 + 21
    for name, task, classes, blocks, width in (
        ("kin", "multilabel", ["a", "b"], ["embedding", "homology"], D + 2 + 2),
        ("shape", "per_residue", ["H", "E", "C"], ["homology", "profile"], 21 + profile_width + copied),
    ):
        folder = build_reference(rows, tmp_path / f"{name}-rows", name=name).folder
        out = len(classes)
        tensors = {
            "features.mean": draw(width) * 0.1, "features.scale": torch.ones(width), "ood.mean": draw(D) * 0.1,
            "ood.project": draw(D, 8) * 0.2, "ood.grid": torch.linspace(0, 3, 101),
            "homologs.labels": torch.zeros(0, 1),
        }  # fmt: skip
        if task == "per_residue":
            tensors |= {"conv.0.weight": draw(out, width, 3) * 0.2, "conv.0.bias": draw(out)}
            tensors["homologs.states"] = torch.from_numpy(
                rng.integers(0, 3, sum(len(r.sequence) for r in rows))
            ).to(torch.int8)
        else:
            tensors |= {"layers.0.weight": draw(1, width, out) * 0.3, "layers.0.bias": draw(1, 1, out)}
            tensors["homologs.labels"] = torch.from_numpy(rng.integers(0, 2, (len(rows), out))).float()
        bundle = write_bundle(
            tmp_path / name,
            manifest_fields={
                "kind": "head", "name": name, "alphabet": "protein", "task": task, "labels": classes, "seed": 1,
                "base_hash": open_bundle(bundles["tiny"]).manifest.content_hash, "per_residue": task == "per_residue",
                "extra": {"head": {
                    "method": "frozen", "blocks": blocks, "classes": classes, "homologs": "search",
                    "reference": reference.hash,
                }},
            },
            tensors=tensors,
            calibration={"temperature": 1.0} if task == "per_residue" else {"platt": [[1.0, 0.0]] * 2, "thresholds": [0.5] * 2},
            card=f"# {name}", evidence={},
            extra_files={f"homologs/{f.name}": f for f in sorted(folder.iterdir())},
        )  # fmt: skip
        registry.register(bundle.path)
    return ["kin", "shape"]


def test_heads_that_read_homologs_are_searched_for_apart_from_the_engines(
    reading_heads, serve, registry, monkeypatch, tmp_path
):
    """As the library predicts, with no search in an engine's thread, and without a search where none is needed."""
    from bioseq.heads import homology, profiles

    sequences = [WILD, SEQS[1], WILD[:-3] + "J<mask>*", "X" * 30]
    model = load("tiny@1", registry=registry, threads=1)
    want = model.predict(sequences, [*reading_heads, "soluble"])
    assert want[0]["kin"]["homologs"]["number"] == 6 and want[0]["kin"]["nearest"]
    a3m = tmp_path / "mine.a3m"
    a3m.write_text("".join(f">{i}\n{s}\n" for i, s in enumerate([WILD, *relatives(WILD, 2, 3)])))
    (aligned,) = model.predict([WILD], reading_heads, alignment=a3m)
    assert aligned["shape"]["probabilities"] != want[0]["shape"]["probabilities"]
    threads: list[threading.Thread] = []
    for room, name in ((homology, "search"), (profiles, "find_profiles")):
        real = getattr(room, name)
        monkeypatch.setattr(
            room, name, lambda *a, real=real, **o: threads.append(threading.current_thread()) or real(*a, **o)
        )
    monkeypatch.setattr("bioseq.heads.searching.find_profiles", profiles.find_profiles)

    async def go():
        async with serve(chunk_tokens=180) as http:
            body = {"sequences": sequences, "heads": [*reading_heads, "soluble"]}
            got = await http.post("/v1/predict", json=body)
            assert got.status_code == 200, got.text
            for item, expected in zip(got.json()["data"], want, strict=True):
                same(item["predictions"], expected)
            searching = http.app.service.searches.engine._threads
            assert threads and all(t in searching for t in threads)
            threads.clear()
            await http.post("/v1/predict", json=body | {"heads": ["soluble"]})
            assert not threads
            cost = {"kind": "predict", "sequences": [WILD], "heads": ["kin"]}
            assert (await http.post("/v1/estimate", json=cost)).json()["search_seconds"] > 0
            one = {"sequences": [WILD], "heads": reading_heads, "alignment": a3m.read_text()}
            mine = (await http.post("/v1/predict", json=one)).json()["data"][0]["predictions"]
            same(mine, aligned)
            assert (await http.post("/v1/predict", json=one | {"heads": ["kin"]})).status_code == 422
            long = {"sequences": [WILD * 20], "heads": reading_heads, "long_sequences": "truncate"}
            cut = (await http.post("/v1/predict", json=long)).json()["data"][0]["predictions"]
            same(cut, model.predict([WILD * 20], reading_heads, long_sequences="truncate")[0])
            # an engine that is asked without them says so, and does not search
            ask = Ask("predict", "tiny@1", (WILD,), heads=("kin@1",), options={"nearest": 0})
            threads.clear()
            reply = await http.app.service.link.answer(ask)
            assert reply.fault.code == "homologs.missing" and not threads

    asyncio.run(go())


def test_a_backbone_that_reads_homologs_is_given_those_of_its_own_set(
    with_family, registry, reference, tmp_path, monkeypatch
):
    config = ModelConfig("reading", 1, 16, 2, 32, max_residues=80, reads_homologs=True)
    encoder = PackedEncoder(config)
    encoder.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    extra = {"homologs": {"reference": reference.hash, "name": "family"}}
    folder = tmp_path / "reading"
    save_backbone(folder, encoder, name="reading", card="# reading", evidence={}, extra=extra)
    registry.register(folder)
    model, long = load("reading@1", registry=registry, threads=1, homologs=reference), WILD * 2
    body = {"model": "reading", "sequences": [WILD[:70], SEQS[1], long], "long_sequences": "truncate"}
    want = [model.embed(body["sequences"], long_sequences="truncate", homologs=h) for h in ("auto", "none")]
    logits = model.logits(body["sequences"], long_sequences="truncate")
    scan = model.scan(WILD[:70])
    told = model.run([model.prepare(WILD[:70])])[0].homologs
    a3m = tmp_path / "mine.a3m"
    family = [s[:70] for s in relatives(WILD, 2, 3)]
    a3m.write_text("".join(f">{i}\n{s}\n" for i, s in enumerate([WILD[:70], *family, WILD[:70]])))
    aligned = model.embed([WILD[:70]], alignment=a3m)[0]
    monkeypatch.setattr(HomologReader, "read", None)  # what an engine would search with

    async def go():
        async with with_family() as http:
            for homologs, vectors in zip(("auto", "none"), want, strict=True):
                got = (await http.post("/v1/embed", json=body | {"homologs": homologs})).json()["data"]
                assert relative([np.array(g["embedding"]) for g in got], vectors) <= 1e-4
            for homologs in ({}, {"homologs": "family"}):  # read once, and not mixed in again
                got = (await http.post("/v1/logits", json=body | homologs)).json()["data"]
                assert relative([np.array(g["logits"]) for g in got], logits) <= 1e-4
                assert got[0]["homologs"]["number"] == told and got[0]["homologs"]["weight"] is None
                assert f"{told} homologs read" in got[0]["notes"]
            got = (await http.post("/v1/scan", json={"model": "reading", "sequence": WILD[:70]})).json()
            assert relative([np.array(got["scores"])], [scan]) <= 1e-4
            assert got["homologs"]["number"] == told and got["weights"] is None
            one = {"model": "reading", "sequences": [WILD[:70]], "alignment": a3m.read_text()}
            got = (await http.post("/v1/embed", json=one)).json()["data"][0]
            assert relative([np.array(got["embedding"])], [aligned]) <= 1e-4
            assert got["notes"] == ["2 homologs read"]
            for wrong, why in (
                ({"homologs": "family"}, "either"), ({"sequences": [WILD[:70]] * 2}, "2 sequences"),
                ({"sequences": [WILD[1:70]]}, "none of its 4 rows is the query"), ({"alignment": "rows"}, "neither"),
                ({"alignment": ">q\nMK1\n"}, "row 1"), ({"model": "tiny"}, "does not read homologs"),
            ):  # fmt: skip
                r = await http.post("/v1/embed", json=one | wrong)
                assert r.status_code == 422 and why in r.json()["detail"], r.text
                assert WILD[5:20] not in r.text
            for many in (">a\nM\n" * 100_001, "\ufeff\n# STOCKHOLM 1.0\n" + "a M\n" * 100_000):
                r = await http.post("/v1/embed", json=one | {"alignment": many})
                assert (r.status_code, r.json()["limit"]) == (413, 100_000)
            plain = {"model": "reading", "sequences": [WILD[:70]], "homologs": "none"}
            cost = (await http.post("/v1/embed", json=plain)).json()["usage"]["tokens"]
            deep = one | {"alignment": a3m.read_text() + f">x\n{WILD[:70]}\n" * 20_000}
            r = (await http.post("/v1/embed", json=deep)).json()
            assert r["usage"]["tokens"] - cost == 2000 + 20_000 * 74 // 2000
        async with with_family(reference_sets=[], homologs="none") as http:
            r = await http.post("/v1/embed", json=body)
            assert (r.status_code, r.json()["code"]) == (503, "homologs.not_found")

    asyncio.run(go())
    assert relative([want[0][0]], [want[1][0]]) > 1e-3


def test_what_waits_is_searched_together_and_each_gets_its_own(settings, reference, monkeypatch):
    """The answer to a sequence does not depend on its batch-mates; too much is refused, not queued without end."""
    from bioseq.homologs import door

    sizes: list[int] = []
    began, go_on = threading.Event(), threading.Event()

    def counted(sequences, *arguments, **options):
        sizes.append(len(sequences))
        began.set()
        assert go_on.wait(60)
        return search(sequences, *arguments, **options)

    monkeypatch.setattr(door, "search", counted)
    options = settings(
        homologs="family", reference_sets=[str(reference.folder)], search_threads=1, max_queued_residues=2000
    )

    async def go():
        searches = Searches(options)
        go_on.set()
        await searches.start()
        sizes.clear()
        began.clear()
        go_on.clear()
        asks = [SearchAsk("family", (WILD[i:],)) for i in range(10)]
        first = asyncio.create_task(searches.find(asks[0]))
        assert await asyncio.to_thread(began.wait, 60)
        others = [asyncio.create_task(searches.find(a)) for a in asks[1:]]
        while searches.engine.status()["queued_tokens"] < sum(len(a.sequences[0]) for a in asks[1:]):
            await asyncio.sleep(0.01)
        go_on.set()
        together = await asyncio.gather(first, *others)
        assert sizes == [1, 9], "all that waited for the first search were searched at once"
        alone = [await searches.find(a) for a in asks]
        for a, b in zip(together, alone, strict=True):
            assert a.fault is None and np.array_equal(
                a.found[0].profile.log_probs, b.found[0].profile.log_probs
            )
        go_on.clear()
        flood = [asyncio.create_task(searches.find(SearchAsk("family", (WILD,) * 10))) for _ in range(12)]
        await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        go_on.set()
        refused = [r.fault for r in await asyncio.gather(*flood) if r.fault is not None]
        assert all(f.status == 429 and f.retry_after for f in refused)
        bad = await searches.find(SearchAsk("family", (WILD, "MK1T"), offset=7))
        assert bad.fault is not None and (bad.fault.kind, bad.fault.index) == ("IllegalResidueError", 8)
        searches.engine.stop()

    asyncio.run(go())


@pytest.mark.parametrize(
    "task, value, label",
    [("multilabel", ["a"], ["a", "b"]), ("multiclass", "a", "b"), ("regression", 1.5, 2.5), ("regression", {"x": 1.0}, {"x": 2.0})],
)  # fmt: skip
def test_the_evidence_of_a_prediction_travels_as_arrow(task, value, label):
    import pyarrow as pa

    from serving.http.tables import prediction_type

    hit = {"id": "P1", "identity": 0.5, "coverage": 1.0, "label": label, "text": "P1: 50 %"}
    prediction = {
        "task": task, "value": value, "interval": None, "probabilities": None if task == "regression" else {"a": 0.5},
        "ood": 0.1, "ood_percentile": 0.2, "head": "h", "version": 1,
        "nearest": [hit], "homologs": {"number": 3, "effective": 1.5},
    }  # fmt: skip
    without = prediction | {"nearest": [], "homologs": {"number": 0, "effective": 0.0}}
    for first in (prediction, without):  # the first row's evidence does not decide the type
        rows = pa.array([prediction, without], type=prediction_type(first)).to_pylist()
        assert {k: rows[0]["nearest"][0][k] for k in hit} == hit and rows[1]["nearest"] == []
        assert [r["homologs"] for r in rows] == [p["homologs"] for p in (prediction, without)]


def test_two_first_requests_open_a_reference_set_once(settings, reference, monkeypatch):
    opened: list[str] = []
    second = threading.Event()

    class Slow(Reference):
        def __init__(self, where, variants, threads):
            opened.append(where)
            second.wait(0.5)  # long enough for the other thread to get here, if it may
            super().__init__(where, variants, threads)

    monkeypatch.setattr("serving.engine.searches.Reference", Slow)
    searches = Searches(settings(homologs="family", reference_sets=[str(reference.folder)]))
    runners: list[Reference] = []
    threads = [
        threading.Thread(target=lambda: runners.append(searches._open("family", True))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1 and len(set(map(id, runners))) == 1


def test_a_search_that_fails_for_one_costs_its_batch_mates_nothing(reference, monkeypatch):
    from bioseq.homologs import search as room

    queries = [Wanted(s, i) for i, s in enumerate(relatives(WILD, 9, 11))]
    runner, real, calls = Reference(str(reference.folder), True, 1), room._search_chunk, []
    monkeypatch.setattr("bioseq.homologs.cache.SearchCache.get", lambda *_: None)
    whole = runner.run(queries)

    def one_fails(sequences, *arguments, **options):
        if queries[5].sequence in sequences:
            raise SearchError("mmseqs search failed with exit code 1: no reason")
        return real(sequences, *arguments, **options)

    monkeypatch.setattr(room, "_search_chunk", one_fails)
    found = runner.run(queries)
    assert isinstance(found[5], ServiceError) and found[5].status == 503
    for i in (0, 1, 2, 3, 4, 6, 7, 8):
        assert np.array_equal(found[i].profile.log_probs, whole[i].profile.log_probs)

    def all_fail(sequences, *_, **__):
        calls.append(len(sequences))
        raise SearchError("mmseqs search failed with exit code 127: not found")

    monkeypatch.setattr(room, "_search_chunk", all_fail)
    assert all(isinstance(f, ServiceError) for f in runner.run(queries))
    assert calls == [9, 1], "a program that is broken is not asked for each"


def test_homologs_of_a_protein_come_aligned_to_it(with_family, reference, serve):
    from bioseq.homologs.door import Homologs

    async def go():
        async with with_family() as http:
            r = await http.post("/v1/homologs", json={"sequence": WILD.lower(), "most": 5})
            assert r.status_code == 200, r.text
            body = r.json()
            want = Homologs(reference.folder, threads=1, quiet=True).align(WILD)
            assert body["number"] == len(want) >= 10 and len(body["data"]) == 5
            assert [d["id"] for d in body["data"]] == list(want.ids[:5]) and body["query"] == WILD
            for place, row in enumerate(body["data"]):
                assert len(row["aligned"]) == len(WILD)
                pairs = [(a, b) for a, b in zip(row["aligned"], WILD) if a != "-"]
                assert row["identity"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs), abs=1e-3)
                assert row["coverage"] == pytest.approx(len(pairs) / len(WILD), abs=1e-3)
                assert row["bits"] == pytest.approx(want.bits[place], abs=0.06)
            none = await http.post("/v1/homologs", json={"sequence": "GSGSGSGSGSGSGSGSGSGS"})
            assert none.json()["number"] == 0 and none.json()["data"] == []
            bad = await http.post("/v1/homologs", json={"sequence": "MKT1"})
            assert bad.status_code == 422 and bad.json()["code"] == "sequence.illegal_residue"
            other = await http.post("/v1/homologs", json={"sequence": WILD, "homologs": "moon"})
            assert (other.status_code, other.json()["code"]) == (404, "homologs.not_found")
        async with serve() as http:
            r = await http.post("/v1/homologs", json={"sequence": WILD})
            assert (r.status_code, r.json()["code"]) == (404, "homologs.not_found")

    asyncio.run(go())

"""Screening ends in the `Predictor`: the same numbers as a plain loop over it, one sequence at a time."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from screening_helpers import LIBRARY, hits, reference, searching_models, table

from bioseq.errors import (
    ArtefactError,
    BundleError,
    NotFoundError,
    ReferenceSetError,
    SearchError,
    SpecError,
    VectorStoreError,
)
from bioseq.sequences.fasta import Record
from bioseq.specs.screen import ScreenSpec
from bioseq.vectors.store import VectorStore
from serving.screening.engine import predictor_factory
from serving.screening.run import screen

WIDTH = 32


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """A tiny random backbone and one head of each kind, as bundles."""
    from bioseq.backbones.packed.config import ModelConfig
    from bioseq.backbones.packed.encoder import PackedEncoder
    from bioseq.backbones.storage import save_backbone
    from bioseq.bundles.bundle import open_bundle, write_bundle

    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    encoder = PackedEncoder(ModelConfig("t", n_layers=2, d_model=WIDTH, n_heads=4, d_ff=64))
    encoder.init_weights(generator, std=0.2)
    save_backbone(folder / "tiny", encoder, name="tiny", card="# tiny", evidence={}, licence="CC0-1.0")
    base = open_bundle(folder / "tiny").manifest.content_hash

    def head(name, task, classes, targets, calibration, **tensors):
        outputs = len(classes) or len(targets)
        tensors = {
            "features.mean": torch.zeros(WIDTH),
            "features.scale": torch.ones(WIDTH),
            "ood.mean": torch.zeros(WIDTH),
            "ood.project": torch.eye(WIDTH)[:, :4].contiguous(),
            "ood.grid": torch.linspace(0, 3, 101),
            "layers.0.weight": torch.randn(1, WIDTH, outputs, generator=generator),
            "layers.0.bias": torch.zeros(1, 1, outputs),
            "target.offset": torch.ones(outputs),
            "target.scale": torch.full((outputs,), 2.0),
            **tensors,
        }
        fields = {
            "kind": "head",
            "name": name,
            "alphabet": "protein",
            "base_hash": base,
            "task": task,
            "labels": classes or targets,
            "per_residue": task == "per_residue",
            "extra": {"head": {"blocks": ["embedding"], "classes": classes, "targets": targets}},
        }
        write_bundle(
            folder / name,
            manifest_fields=fields,
            tensors=tensors,
            calibration=calibration,
            card=f"# {name}",
            evidence={},
        )

    head("melting", "regression", [], ["tm"], {"radius": [1.5]})
    head("pair", "regression", [], ["tm", "kd"], {"radius": [1.5, 0.5]})
    head(
        "place",
        "multilabel",
        ["nucleus", "cell wall"],
        [],
        {"platt": [[1, 0], [2, 0.1]], "thresholds": [0.5, 0.4]},
    )
    head("fold", "multiclass", ["a", "b", "c"], [], {"temperature": 1.3})
    head("yes", "binary", ["no", "yes"], [], {"platt": [[1, 0]], "thresholds": [0.5]},
         **{"layers.0.weight": torch.randn(1, WIDTH, 1, generator=generator), "layers.0.bias": torch.zeros(1, 1, 1)})  # fmt: skip
    wide = WIDTH + 21
    head("ss", "per_residue", ["H", "E", "C"], [], {"temperature": 1.0},
         **{"features.mean": torch.zeros(wide), "features.scale": torch.ones(wide),
            "conv.0.weight": torch.randn(3, wide, 5, generator=generator), "conv.0.bias": torch.zeros(3)})  # fmt: skip
    return folder


NAMES = ("melting", "pair", "place", "fold", "yes", "ss")


def make(artefacts, run, names=NAMES, **changes):
    heads = tuple(str(artefacts / n) for n in names)
    given = {
        "inputs": (str(LIBRARY),),
        "model": str(artefacts / "tiny"),
        "heads": heads,
        "workers": 2,
        "device": "cpu",
    }
    return ScreenSpec(**{**given, "output": str(run), **changes})


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The odd records of the shipped library and some ordinary ones: a loop over all 318 takes long."""
    odd = ("-copy", "lower case", "stop", "unknown", "longer", "digit", "no-residues", "letter-j", "same id")
    records = LIBRARY.read_text().split(">")[1:]
    kept = [r for i, r in enumerate(records) if i % 6 == 0 or any(word in r.splitlines()[0] for word in odd)]
    path = tmp_path_factory.mktemp("library") / "library.fasta"
    path.write_text("".join(">" + r for r in kept))
    return path


@pytest.mark.usefixtures("ray_session")
def test_a_screen_equals_the_loop_and_itself_on_other_workers(artefacts, library, tmp_path):
    import bioseq

    done = screen(
        make(artefacts, tmp_path / "two", inputs=(str(library),), where="nucleus > 0.2", top=40),
        progress=False,
    )
    predictor = bioseq.load(artefacts / "tiny", threads=1, device="cpu")
    for name in NAMES:
        from bioseq.bundles.bundle import open_bundle
        from bioseq.heads.head import Head

        predictor.load_head(name, Head.load(open_bundle(artefacts / name)))
    columns = predictor_factory(make(artefacts, tmp_path / "x"), device="cpu").heads

    def one(sequence):
        answer = predictor.predict([sequence], NAMES, long_sequences="window")[0]
        return {k: v for head in columns for k, v in head.cells(answer[head.name]).items()}

    found = table(done.path)
    wanted = reference(library, one)
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted):
        want.pop("code", None)
        for key, value in want.items():
            if isinstance(value, float) or (
                isinstance(value, list) and value and isinstance(value[0], float)
            ):
                assert np.allclose(got[key], value, rtol=1e-4, atol=1e-5), (got["id"], key)
            else:
                assert got[key] == value, (got["id"], key)
    notes = {r["id"]: r["notes"] for r in found if r["notes"]}
    assert "2159 residues in 3 windows" in notes["A7E6F5"] and notes["letter-j"] == "1 J read as X"
    lines = hits(done.path)
    assert "ss.value" not in lines[0] and "ss.ood" in lines[0] and "pair.kd.low" in lines[0]

    again = screen(
        make(artefacts, tmp_path / "one", inputs=(str(library),), where="nucleus > 0.2", top=40, workers=1),
        progress=False,
    )
    for name in ("hits.csv", "hits.fasta", "summary.json", "predictions/part-000000.parquet"):
        assert (again.path / name).read_bytes() == (done.path / name).read_bytes()
    assert "# melting" in (done.path / "report.html").read_text()


def test_a_shard_with_searches_is_the_same_whoever_computes_it_again(tmp_path, monkeypatch):
    """Other shards before it, other threads of the search, and a cache of searches change nothing."""
    from bioseq.homologs import search
    from bioseq.sequences.fasta import read_fasta

    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))
    model, head = searching_models(tmp_path)
    factory = predictor_factory(
        ScreenSpec(inputs=(str(LIBRARY),), output="x", heads=(head,), model=model), device="cpu"
    )
    sequences = [r.sequence for r in read_fasta(LIBRARY, allow_empty=True) if r.sequence.isalpha()][:24]
    first = factory.build().run(sequences, [True] * 24)
    second = factory.build()
    second.run(sequences[::-1][:7], [False] * 7)
    monkeypatch.setattr(search, "default_threads", lambda: 1)
    for a, b in zip(first, second.run(sequences, [True] * 24), strict=True):
        assert a.cells == b.cells and np.array_equal(a.embedding, b.embedding)
    found = [r.cells["kin.homologs"] for r in first]
    assert max(found) >= 1 and first[0].cells["kin.nearest_identity"] == 1.0


def test_a_screen_chooses_the_homologs_that_its_backbone_reads(tmp_path, monkeypatch):
    """None is the plain model to the last bit; a set is named, held by its hash, and each record says how many it had."""
    from bioseq.homologs.reference import build_reference
    from bioseq.inference.loading import load
    from bioseq.sequences.fasta import read_fasta

    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))
    model, head = searching_models(tmp_path, reads=True)
    records = [r for r in read_fasta(LIBRARY, allow_empty=True) if r.sequence.isalpha()][:8]
    sequences = [r.sequence for r in records]
    relative = "".join("W" if i % 6 == 0 else a for i, a in enumerate(sequences[1]))
    near = build_reference([Record("near", relative)], tmp_path / "near", name="near")

    def factory(homologs, model=model, heads=(head,)):
        given = {"homologs": homologs, "long_sequences": "truncate"}
        spec = ScreenSpec(inputs=(str(LIBRARY),), output="x", heads=heads, model=model, **given)
        return predictor_factory(spec, device="cpu")

    def run(made, some=sequences):
        return made.build().run(some, [True] * len(some))

    plain = load(model, threads=1, homologs="none")
    without, some = run(factory("none")), run(factory(str(near.folder)))
    want = plain.embed(sequences, long_sequences="truncate")
    assert all(np.array_equal(a.embedding, b) for a, b in zip(without, want, strict=True))
    assert not any("homologs read" in (a.note or "") for a in without)
    read = [int(a.note.split()[-3]) for a in some]
    assert read[1] == 1 and sum(read) < len(read)
    for a, b, number in zip(some, without, read, strict=True):
        assert np.array_equal(a.embedding, b.embedding) == (number == 0)
    (alone,) = run(factory(str(near.folder)), sequences[1:2])
    assert np.linalg.norm(alone.embedding - some[1].embedding) <= 1e-5 * np.linalg.norm(alone.embedding)
    assert factory(str(near.folder)).identity()["engine"]["homologs"] == near.hash
    assert "homologs" not in factory("none").identity()["engine"]
    with pytest.raises(ReferenceSetError, match="is another set"):  # auto is the shipped set here
        factory("auto")
    made = factory(str(near.folder))
    shutil.rmtree(near.folder)
    build_reference([Record("other", sequences[2])], tmp_path / "near", name="near")
    with pytest.raises(ArtefactError, match="reference set near changed"):
        made.build()
    with pytest.raises(SpecError, match="does not read homologs"):
        factory("default", model="default", heads=("localization",))


@pytest.mark.usefixtures("ray_session")
def test_the_error_policy_quarantines_long_records(artefacts, library, tmp_path):
    spec = make(
        artefacts, tmp_path / "run", names=("melting",), inputs=(str(library),), long_sequences="error"
    )
    done = screen(spec, progress=False)
    (row,) = [r for r in table(done.path) if (r["error"] or "").startswith("sequence.too_long")]
    assert row["id"] == "A7E6F5" and "the limit is 1022" in row["error"]


def test_describing_an_engine_does_not_bring_torch_into_the_driver(artefacts, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from bioseq.specs.screen import ScreenSpec; import serving.screening.run as r\n"
        "from serving.screening.engine import predictor_factory\n"
        "predictor_factory(ScreenSpec.load(sys.argv[1]), device='cpu')\n"
        "assert 'torch' not in sys.modules"
    )
    (tmp_path / "s.json").write_text(make(artefacts, tmp_path).to_json())
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s.json")], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_token_budgets_are_the_predictors():
    from bioseq.inference.predictor import BUDGETS
    from serving.screening import engine

    assert engine.BUDGETS == BUDGETS


def test_unknown_and_foreign_heads_are_told(artefacts, tmp_path):
    with pytest.raises(NotFoundError, match="no head 'nothing'"):
        predictor_factory(make(artefacts, tmp_path, heads=("nothing",)), device="cpu")
    with pytest.raises(BundleError, match="is a head, not a backbone"):
        predictor_factory(make(artefacts, tmp_path, model=str(artefacts / "fold")), device="cpu")
    with pytest.raises(BundleError, match="is a backbone, not a head"):
        predictor_factory(make(artefacts, tmp_path, names=("tiny",)), device="cpu")


def test_a_model_exchanged_in_mid_run_is_refused(artefacts, tmp_path):
    import dataclasses

    factory = predictor_factory(make(artefacts, tmp_path, names=("melting",)), device="cpu")
    with pytest.raises(ArtefactError, match="tiny changed while the run was going"):
        dataclasses.replace(factory, model_hash="sha256:other").build()
    other = dataclasses.replace(factory.sources[0], hash="sha256:other")
    with pytest.raises(ArtefactError, match="head melting changed"):
        dataclasses.replace(factory, sources=(other,)).build()


def test_a_search_that_fails_for_one_record_costs_that_record_alone(tmp_path, monkeypatch):
    """MMseqs2 that fails for everything ends the run; nothing is quarantined for it."""
    from bioseq.homologs import search
    from bioseq.sequences.fasta import read_fasta

    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))
    model, head = searching_models(tmp_path)
    spec = ScreenSpec(inputs=(str(LIBRARY),), output="x", heads=(head,), model=model)
    sequences = [r.sequence for r in read_fasta(LIBRARY, allow_empty=True) if r.sequence.isalpha()][:9]
    engine = predictor_factory(spec, device="cpu").build()
    whole = engine.run(sequences, [False] * 9)
    real = search._search_chunk

    def failing(queries, *args, **kwargs):
        if sequences[4] in queries:
            raise SearchError("mmseqs search failed with exit code 1: no reason")
        return real(queries, *args, **kwargs)

    monkeypatch.setattr(search, "_search_chunk", failing)
    found = engine.run(sequences, [False] * 9)
    assert found[4].error == "homologs.search_failed: mmseqs search failed with exit code 1: no reason"
    for place in (0, 1, 2, 3, 5, 6, 7, 8):
        assert found[place].error is None
        assert found[place].cells["kin.homologs"] == whole[place].cells["kin.homologs"]

    def broken(*_, **__):
        raise SearchError("mmseqs search failed with exit code 127: not found")

    monkeypatch.setattr(search, "_search_chunk", broken)
    with pytest.raises(SearchError, match="127"):
        engine.run(sequences, [False] * 9)


BARE = ("melting", "pair", "place", "fold", "yes")


def test_a_store_saves_the_passes_and_a_run_reads_what_it_held_at_first(artefacts, tmp_path, monkeypatch):
    sequences = ["MKTAYIAKQR", "MKV" * 20, "ACDEFGHIKL" * 6, "W" * 9]
    wanted = [True, False, True, False]
    spec = make(artefacts, tmp_path / "run", names=BARE, vectors=str(tmp_path / "store"))
    plain = predictor_factory(make(artefacts, tmp_path / "run", names=BARE), device="cpu").build()
    first = predictor_factory(spec, device="cpu")
    assert first.identity()["vectors"] == {"store": str(tmp_path / "store"), "rows": 0}
    expected, cold = plain.run(sequences, wanted), first.build().run(sequences[:3], wanted[:3])
    for a, b in zip(expected, cold):
        assert a.cells == b.cells and (a.embedding is None) == (b.embedding is None)
    # the same run once more, as after a kill: what it added itself is not read, so the bytes are the same
    again = first.build()
    passes = count_passes(again, monkeypatch)
    assert [r.cells for r in again.run(sequences[:3], wanted[:3])] == [r.cells for r in cold]
    assert len(passes) == 3
    warm = predictor_factory(spec, device="cpu")
    assert warm.vectors_rows == 3
    engine = warm.build()
    passes = count_passes(engine, monkeypatch)
    found = engine.run(sequences, wanted)
    assert len(passes) == 1  # of the sequence that the store lacked
    for a, b in zip(expected, found):
        for name, value in a.cells.items():
            assert b.cells[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    assert np.allclose(found[0].embedding, expected[0].embedding, atol=1e-5)
    assert predictor_factory(spec, device="cpu").vectors_rows == 4


def count_passes(engine, monkeypatch) -> list[int]:
    """The segments that the engine's encoder is given, one an entry."""
    seen: list[int] = []
    run = engine.predictor._runner.run
    monkeypatch.setattr(
        engine.predictor._runner, "run", lambda e, q, segments: seen.extend(segments) or run(e, q, segments)
    )
    return seen


def test_a_store_that_no_head_reads_or_of_other_vectors_is_refused(artefacts, tmp_path):
    def build(**changes):
        return predictor_factory(make(artefacts, tmp_path / "run", **changes), device="cpu").build()

    store = str(tmp_path / "store")
    with pytest.raises(SpecError, match="the head ss reads more"):
        build(names=("place", "ss"), vectors=store)
    build(names=("place",), vectors=store)
    with pytest.raises(VectorStoreError, match="long_sequences 'window', asked 'truncate'"):
        build(names=("place",), vectors=store, long_sequences="truncate")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(VectorStoreError, match="not a vector store"):
        build(names=("place",), vectors=str(tmp_path / "other"))


@pytest.mark.usefixtures("ray_session")
def test_a_second_screen_of_a_library_reads_the_store(artefacts, library, tmp_path):
    spec = make(artefacts, tmp_path / "one", names=("place",), inputs=(str(library),), vectors=str(tmp_path / "store"))  # fmt: skip
    first = screen(spec, progress=False)
    held = len(VectorStore(tmp_path / "store"))
    assert held == first.summary["distinct"]
    done = screen(spec, progress=False)  # again: complete, though the store has grown since
    assert not done.fresh
    screen(dataclasses.replace(spec, output=str(tmp_path / "two")), progress=False)
    assert len(VectorStore(tmp_path / "store")) == held
    one, two = hits(tmp_path / "one"), hits(tmp_path / "two")
    assert [r["id"] for r in one] == [r["id"] for r in two]
    for a, b in zip(one, two):
        assert float(a["place.nucleus"]) == pytest.approx(float(b["place.nucleus"]), rel=1e-4)

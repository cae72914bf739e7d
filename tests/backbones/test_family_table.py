"""Each cell of the table in docs/backbones.md: what a family can do is done, what it cannot is refused with a reason."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")
from family_folders import MAKERS

import bioseq
from bioseq.backbones.importing import export_checkpoint, import_checkpoint
from bioseq.backbones.packed.int8 import supported
from bioseq.bundles.bundle import open_bundle
from bioseq.bundles.registry import Registry
from bioseq.errors import BioseqError

DOCS = Path(__file__).parents[2] / "docs/backbones.md"


@cache
def table() -> dict[str, dict[str, bool]]:
    lines = DOCS.read_text().split("## What each can do")[1].splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, cells = rows[0][1:], rows[2:]
    assert {c for row in cells for c in row[1:]} == {"yes", "no"}
    return {row[0]: {family: c == "yes" for family, c in zip(head, row[1:], strict=True)} for row in cells}


def test_the_table_has_every_family_and_every_check():
    assert set(table()) == set(CHECKS)
    assert all(list(row) == list(MAKERS) for row in table().values())


def sequences(family, count=3, seed=0):
    rng = np.random.default_rng(seed)
    letters = "ACGT" if family in ("Nucleotide Transformer", "DNABERT") else "ACDEFGHIKLMNPQRSTVWY"
    return ["".join(rng.choice(list(letters), n)) for n in rng.integers(12, 40, count)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("table")

    @cache
    def made(family):
        name = family.lower().replace(" ", "-")
        MAKERS[family](root / name)
        return import_checkpoint(root / name, root / f"{name}-bundle", name=name)

    return made


def model_of(bundle, **options):
    return bioseq.load(bundle.path, threads=1, **options)


def embed(family, bundle, tmp_path):
    model = model_of(bundle)
    texts = sequences(family)
    whole = model.embed(texts, layers=range(model.config.n_layers + 1), per_residue=True)
    assert [w.shape[1] for w in whole] == [len(t) for t in texts]
    for w in whole:  # states are those of a model: finite, and another for another residue and layer
        assert np.isfinite(w).all() and np.ptp(w[-1], axis=0).max() > 1e-3
        assert not np.array_equal(w[0], w[-1])


def cls(family, bundle, tmp_path):
    assert np.isfinite(model_of(bundle).embed(sequences(family), pooling="cls")).all()


def windows(family, bundle, tmp_path):
    model = model_of(bundle)
    model.max_residues = 30
    long = "".join(sequences(family, 4, seed=1))
    rows = model.embed([long], long_sequences="window", per_residue=True)[0]
    assert len(rows) == len(long) > 60 and np.isfinite(rows).all()


def scores(family, bundle, tmp_path):
    model = model_of(bundle)
    scan = model.scan("MKTAYIAK", homologs="none")
    assert scan.shape == (8, 20) and np.ptp(scan) > 0
    values = model.score("MKTAYIAK", ["K2A", "K2A:T3G"], homologs="none")
    assert values[0] == pytest.approx(scan[1][model.alphabet.standard.index("A")], rel=1e-4, abs=1e-5)
    assert len(model.logits(["MKT"])[0]) == 3


def labelled(family, tmp_path):
    rows = sequences(family, 90, seed=2)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["id", "cluster", "sequence", "y"])
        for i, s in enumerate(rows):
            out.writerow([f"s{i}", f"c{i}", s, s.count("A") / len(s) + s.count("C") / len(s)])
    return str(tmp_path / "table.csv")


def trained(family, bundle, tmp_path, **options):
    pytest.importorskip("sklearn", reason="the extra [train] is not installed")
    from bioseq.specs.finetune import FinetuneSpec
    from training.finetune.run import finetune

    spec = {
        "labels": labelled(family, tmp_path), "targets": ("y",), "base": str(bundle.path), "output": str(tmp_path / "head"),
        "bootstrap": 20, "neighbours": 10, "homologs": "none", "threads": 1, "features": ("composition",), "name": "y",
        "models": ("linear",), "licence": "CC0-1.0",
    }  # fmt: skip
    return finetune(FinetuneSpec(**(spec | options)))


_HEADS = {}


def frozen_head(family, bundle, tmp_path):
    """Trained once a family; pytest keeps the folder while the session runs."""
    if family not in _HEADS:
        _HEADS[family] = trained(family, bundle, tmp_path)
    return _HEADS[family]


def frozen(family, bundle, tmp_path):
    head = frozen_head(family, bundle, tmp_path)
    text = sequences(family, 1, seed=5)
    said = model_of(bundle).predict(text, [str(head.path)])[0][str(head.path)]
    low, high = said["interval"]
    assert low < said["value"] < high and head.manifest.base_weights_hash == bundle.manifest.weights_hash


def lora(family, bundle, tmp_path):
    head = trained(family, bundle, tmp_path, method="lora", epochs=1, lr=1e-2)
    assert head.adapter is not None
    model = model_of(bundle)
    text = sequences(family, 2, seed=5)
    assert np.isfinite([p[str(head.path)]["value"] for p in model.predict(text, [str(head.path)])]).all()


def int8(family, bundle, tmp_path):
    try:
        rows = model_of(bundle, dtype="int8").embed(sequences(family))
    except BioseqError:
        if table()["int8"][family] and supported() is not None:
            pytest.skip("this processor has no instructions for int8")
        raise
    want = model_of(bundle).embed(sequences(family))
    assert 0 < np.linalg.norm(rows - want) / np.linalg.norm(want) < 0.1


def registered(bundle, tmp_path, *heads):
    empty = tmp_path / "nothing-shipped"
    empty.mkdir()
    registry = Registry(tmp_path / "registry", shipped=empty)
    for one in (bundle, *heads):
        registry.register(one.path, accept_weak=True)
    registry.alias("default", f"{bundle.manifest.name}@1")
    return registry


def http(family, bundle, tmp_path):
    """A head of the family, served: the answers are the library's."""
    import asyncio

    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    from serving.http.app import in_process
    from serving.settings import Settings

    head = frozen_head(family, bundle, tmp_path)
    registry = registered(bundle, tmp_path, head)
    texts = sequences(family, 3, seed=6)

    async def ask():
        settings = Settings.from_dict(
            {
                "database": f"sqlite:///{tmp_path / 's.sqlite'}", "home": str(tmp_path / "home"), "threads": 1,
                "homologs": "none",
            }
        )  # fmt: skip
        async with (
            in_process(settings, registry=registry) as app,
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://bioseq", timeout=60
            ) as client,
        ):
            rows = await client.post("/v1/embed", json={"sequences": texts})
            said = await client.post("/v1/predict", json={"sequences": texts, "heads": ["y"]})
            wrong = await client.post("/v1/embed", json={"sequences": ["MKTAYIAKQRZ1"]})
            priced = await client.post("/v1/estimate", json={"sequences": texts})
            return rows, said, wrong, priced

    rows, said, wrong, priced = asyncio.run(ask())
    assert rows.status_code == said.status_code == 200, (rows.text, said.text)
    assert wrong.status_code == 422
    assert priced.status_code == 200 and priced.json()["flops"] > 0, priced.text
    model = model_of(bundle)
    got = np.asarray([item["embedding"] for item in rows.json()["data"]], dtype=np.float32)
    assert np.allclose(got, model.embed(texts), rtol=1e-4, atol=1e-5)
    want = [p[str(head.path)]["value"] for p in model.predict(texts, [str(head.path)])]
    assert np.allclose([r["predictions"]["y"]["value"] for r in said.json()["data"]], want, rtol=1e-4)


def screening(family, bundle, tmp_path):
    """The engine that each worker of a screening run builds."""
    pytest.importorskip("ray", reason="the extra [serve] is not installed")
    import os

    from bioseq.specs.screen import ScreenSpec
    from serving.screening.engine import predictor_factory

    head = frozen_head(family, bundle, tmp_path)
    registered(bundle, tmp_path, head)
    before = os.environ["BIOSEQ_HOME"]
    os.environ["BIOSEQ_HOME"] = str(tmp_path / "registry")
    try:
        (tmp_path / "in.fasta").write_text(">a\nACGT\n")
        spec = ScreenSpec(
            inputs=(str(tmp_path / "in.fasta"),), heads=("y",), model=f"{bundle.manifest.name}@1", output=str(tmp_path / "out"), threads=1
        )  # fmt: skip
        texts = sequences(family)
        found = predictor_factory(spec, device="cpu").build().run(texts, [True] * len(texts))
    finally:
        os.environ["BIOSEQ_HOME"] = before
    assert np.allclose(
        np.stack([f.embedding for f in found]), model_of(bundle).embed(texts), rtol=1e-3, atol=1e-4
    )


def vectors(family, bundle, tmp_path):
    from bioseq.backbones.pooling import EmbedOptions
    from bioseq.inference.vectors import embed_stored, settings_of
    from bioseq.vectors.store import VectorStore

    model = model_of(bundle)
    store = VectorStore(tmp_path / "store", settings_of(model, EmbedOptions(), "error"))
    queries = [model.prepare(s, embed=EmbedOptions()) for s in sequences(family)]
    rows, computed = embed_stored(model, store, queries)
    again, none = embed_stored(model, store, queries)
    assert (computed, none) == (3, 0) and np.array_equal(rows, again)


def export(family, bundle, tmp_path):
    export_checkpoint(open_bundle(bundle.path), tmp_path / "out")
    back = bioseq.load(tmp_path / "out", threads=1)
    assert back.weights_hash == bundle.manifest.weights_hash


def contacts(family, bundle, tmp_path):
    found = model_of(bundle).contacts(sequences(family, 1))[0]
    assert found.shape[0] == found.shape[1] and 0 <= found.min() < found.max() <= 1


def attributions(family, bundle, tmp_path):
    head = frozen_head(family, bundle, tmp_path)
    found = model_of(bundle).attribute(sequences(family, 1, seed=7)[0], str(head.path))
    assert np.isfinite(found.values).all() and np.ptp(found.values) > 0


CHECKS = {
    "embed, any layer, per residue": embed,
    "pooling by `cls`": cls,
    "long sequences by windows": windows,
    "logits, variant scores, scans": scores,
    "frozen heads": frozen,
    "LoRA heads": lora,
    "int8": int8,
    "HTTP service": http,
    "screening": screening,
    "contacts": contacts,
    "attributions": attributions,
    "vector stores": vectors,
    "export to its own layout": export,
}


REASONS = {  # of a "no"
    "pooling by `cls`": "has no token before the sequence",
    "logits, variant scores, scans": "has no language-model head",
    "LoRA heads": "runs through transformers",
    "int8": "runs through transformers",
    "contacts": "has no contact head",
    "attributions": "single residues cannot be hidden",
}


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("what", CHECKS)
def test_a_cell_of_the_table(bundles, tmp_path, what, family):
    bundle = bundles(family)
    if table()[what][family]:
        CHECKS[what](family, bundle, tmp_path)
        return
    with pytest.raises(BioseqError, match=REASONS[what]):
        CHECKS[what](family, bundle, tmp_path)

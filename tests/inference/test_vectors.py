"""Embeddings through a store equal those of the predictor, and are computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.pooling import EmbedOptions
from bioseq.errors import VectorStoreError
from bioseq.inference.predictor import Predictor
from bioseq.inference.vectors import embed_stored, open_cache, settings_of
from training.finetune import embeddings
from training.finetune.embeddings import embed_cached

SEQUENCES = ["MKTAYIAKQR", "mktayiakqr", "GSHMLEDPVDAFKE", "MKV", "MKTAYIAKQR*"]
DISTINCT = 3  # as the model reads them


def predictor(weights_hash: str = "sha256:a") -> Predictor:
    encoder = PackedEncoder(ModelConfig("t", n_layers=2, d_model=32, n_heads=4, d_ff=64, max_residues=40))
    encoder.init_weights(torch.Generator().manual_seed(0), std=0.2)
    return Predictor(encoder, weights_hash=weights_hash, threads=1)


@pytest.fixture()
def model(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """Counts the queries that are computed."""
    model = predictor()
    run, model.computed = model.run, 0  # type: ignore[attr-defined]

    def counted(queries, **options):
        model.computed += len(queries)  # type: ignore[attr-defined]
        return run(queries, **options)

    monkeypatch.setattr(model, "run", counted)
    return model


@pytest.mark.parametrize(
    "options", [EmbedOptions(), EmbedOptions("max", (0, -1)), EmbedOptions(per_residue=True)]
)
def test_stored_vectors_equal_the_predictors_and_are_computed_once(
    tmp_path: Path, model: Predictor, options: EmbedOptions
) -> None:
    store = open_cache(tmp_path, settings_of(model, options, "error"))
    queries = [model.prepare(s, embed=options) for s in SEQUENCES]
    first, computed = embed_stored(model, store, queries, list("abcde"))
    assert computed == DISTINCT == len(store) and store.names([0]) == [("a", "b", "e")]
    for got, result in zip(first, predictor().run(queries)):
        assert result.embedding is not None
        assert np.linalg.norm(got.ravel() - result.embedding.ravel()) <= 1e-5 * np.linalg.norm(
            result.embedding
        )
    again, computed = embed_stored(model, open_cache(tmp_path, store.settings), queries)
    assert computed == 0 and model.computed == DISTINCT  # type: ignore[attr-defined]
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)


def test_the_last_layer_has_one_name_and_settings_follow_the_model() -> None:
    model = predictor()
    by_name, by_number = (settings_of(model, EmbedOptions(layers=(n,)), "window") for n in (-1, 2))
    assert by_name == by_number
    assert settings_of(predictor("sha256:b"), EmbedOptions(), "window") != by_name
    assert settings_of(model, EmbedOptions(), "truncate") != by_name
    with pytest.raises(VectorStoreError, match="no hash"):
        settings_of(predictor(""), EmbedOptions(), "window")


def test_a_table_is_embedded_once_whatever_its_order(tmp_path: Path, model: Predictor) -> None:
    rows, cached = embed_cached(model, SEQUENCES, cache=str(tmp_path), progress=False)
    assert not cached and model.computed == DISTINCT  # type: ignore[attr-defined]
    again, cached = embed_cached(model, SEQUENCES[::-1], cache=str(tmp_path), progress=False)
    assert cached and model.computed == DISTINCT  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.stack(rows), np.stack(again[::-1]))


def test_a_table_that_was_killed_between_chunks_keeps_the_chunks(
    tmp_path: Path, model: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "CHUNK", 2)
    run = model.run

    def dies(queries, **options):
        if model.computed >= 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return run(queries, **options)

    table = ["MKTAYIAKQR", "GSHM", "MKVLA", "AAAA", "WWWW"]
    monkeypatch.setattr(model, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        embed_cached(model, table, cache=str(tmp_path), progress=False)
    monkeypatch.setattr(model, "run", run)
    rows, cached = embed_cached(model, table, cache=str(tmp_path), progress=False)
    assert model.computed == 5 and not cached  # type: ignore[attr-defined]
    whole, _ = embed_cached(predictor(), table, cache=str(tmp_path / "other"), progress=False)
    np.testing.assert_array_equal(np.stack(rows), np.stack(whole))


def test_a_cache_that_cannot_be_used_is_passed_over(tmp_path: Path, model: Predictor) -> None:
    (tmp_path / "vectors").write_text("a file")
    rows, cached = embed_cached(model, SEQUENCES, cache=str(tmp_path), progress=False)
    assert len(rows) == len(SEQUENCES) and not cached
    rows, _ = embed_cached(model, SEQUENCES, cache=str(tmp_path / "b"), progress=False)
    damaged = next((tmp_path / "b").rglob("vectors.bin"))
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    again, cached = embed_cached(model, SEQUENCES, cache=str(tmp_path / "b"), progress=False)
    assert not cached
    np.testing.assert_allclose(np.stack(rows), np.stack(again), rtol=1e-4, atol=1e-6)

"""A head belongs to weights: not to the name, card, licence or code version of the bundle that holds them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bioseq import load
from bioseq.backbones.importing import export_checkpoint, import_checkpoint
from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.packed.weights import hash_weights
from bioseq.backbones.storage import save_backbone, weights_hash
from bioseq.bundles.bundle import Bundle, open_bundle, write_bundle
from bioseq.bundles.manifest import Manifest
from bioseq.bundles.registry import Registry
from bioseq.errors import BundleError


def encoder(seed: int = 0) -> PackedEncoder:
    model = PackedEncoder(CONFIGS["tiny"])
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ESM-2 checkpoint in the Hugging Face layout."""
    made = save_backbone(tmp_path / "made", encoder(), name="made", card="# m", evidence={})
    return export_checkpoint(made, tmp_path / "esm2")


def head(path: Path, **base: str | None) -> Bundle:
    fields = {"kind": "head", "name": "stability", "alphabet": "protein", "task": "regression", **base}
    settings = {"blocks": ["embedding"], "targets": ["y"]}
    tensors = {
        "features.mean": torch.zeros(64),
        "features.scale": torch.ones(64),
        "ood.mean": torch.zeros(64),
        "ood.project": torch.eye(64)[:, :4].contiguous(),
        "ood.grid": torch.linspace(0, 3, 101),
        "layers.0.weight": torch.ones(1, 64, 1),
        "layers.0.bias": torch.zeros(1, 1, 1),
        "target.offset": torch.zeros(1),
        "target.scale": torch.ones(1),
    }
    return write_bundle(
        path,
        manifest_fields={**fields, "labels": ["y"], "extra": {"head": settings}},
        tensors=tensors,
        card="# Head",
        evidence={"beats_baseline": True},
    )


def as_written_before(bundle: Bundle) -> Bundle:
    """The bundle with a manifest from before there was a hash of weights."""
    data = bundle.manifest.to_dict()
    del data["weights_hash"], data["base_weights_hash"]
    (bundle.path / "manifest.json").write_text(json.dumps(data))
    return open_bundle(bundle.path)


def test_two_imports_and_the_folder_itself_accept_the_same_head(folder: Path, tmp_path: Path) -> None:
    first = import_checkpoint(folder, tmp_path / "a", name="first", licence="MIT")
    second = import_checkpoint(folder, tmp_path / "b", name="second", licence="CC0-1.0", card="# another")
    assert first.manifest.content_hash != second.manifest.content_hash
    assert first.manifest.weights_hash == second.manifest.weights_hash
    made = head(tmp_path / "h", base_weights_hash=first.manifest.weights_hash)
    for source in (first.path, second.path, folder):
        model = load(source)
        assert model.weights_hash == first.manifest.weights_hash
        assert model.load_head(str(made.path)).name == "stability"


def test_other_weights_refuse_the_head(tmp_path: Path) -> None:
    mine = save_backbone(tmp_path / "a", encoder(0), name="tiny", card="# a", evidence={})
    other = save_backbone(tmp_path / "b", encoder(1), name="tiny", card="# a", evidence={})
    made = head(tmp_path / "h", base_weights_hash=mine.manifest.weights_hash)
    with pytest.raises(BundleError, match="was made for the backbone"):
        load(other.path).load_head(str(made.path))


def test_bundles_from_before_the_hash_of_weights_are_read(folder: Path, tmp_path: Path) -> None:
    base = import_checkpoint(folder, tmp_path / "a", name="first")
    content, weights = base.manifest.content_hash, base.manifest.weights_hash
    by_content = as_written_before(head(tmp_path / "old", base_hash=content))
    by_weights = head(tmp_path / "new", base_hash=None, base_weights_hash=weights)
    other = head(tmp_path / "other", base_hash="sha256:" + "0" * 64)
    for bundle in (base, as_written_before(base)):
        assert bundle.manifest.content_hash == content and weights_hash(bundle) == weights
        model = load(bundle.path)
        model.load_head(str(by_content.path))
        model.load_head(str(by_weights.path))
        with pytest.raises(BundleError, match="was made for the backbone"):
            model.load_head(str(other.path))


def test_the_registry_finds_heads_by_weights(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "home", shipped=tmp_path / "none")
    first = registry.register(import_checkpoint(folder, tmp_path / "a", name="first"))
    second = registry.register(import_checkpoint(folder, tmp_path / "b", name="second", licence="MIT"))
    made = registry.register(head(tmp_path / "h", base_weights_hash=first.weights_hash))
    assert made.notes == ()
    assert [[e.ref for e in registry.heads_for(base)] for base in (first, second)] == [["stability@1"]] * 2


def test_an_index_from_before_the_hash_of_weights_is_read(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "home", shipped=tmp_path / "none")
    base = registry.register(as_written_before(import_checkpoint(folder, tmp_path / "a", name="first")))
    old = registry.register(as_written_before(head(tmp_path / "h", base_hash=base.content_hash)))
    file = tmp_path / "home" / "index.json"
    index = json.loads(file.read_text()) | {"format_version": 1}
    for model in index["models"].values():
        for record in model["versions"].values():
            del record["weights_hash"], record["base_weights_hash"]
    file.write_text(json.dumps(index))
    assert [e.ref for e in registry.heads_for(registry.find("first"))] == [old.ref]
    registry.alias("newest", "first")
    assert json.loads(file.read_text())["format_version"] == 2


def test_the_hash_leaves_out_the_name_and_what_has_its_default() -> None:
    model = encoder()
    config, tensors = model.config, model.state_dict()
    digest = hash_weights(config, tensors)
    assert hash_weights(replace(config, name="other"), tensors) == digest
    assert hash_weights(replace(config, token_dropout=False), tensors) != digest
    assert hash_weights(config, tensors, reference="sha256:" + "1" * 64) != digest
    assert hash_weights(config, {k: v.bfloat16() for k, v in tensors.items()}) != digest


def test_content_hash_does_not_cover_the_hash_of_weights() -> None:
    manifest = Manifest(kind="backbone", name="x", alphabet="protein", architecture={"n_layers": 1})
    assert replace(manifest, weights_hash="sha256:" + "2" * 64).expected_hash() == manifest.expected_hash()
    other = replace(manifest, base_weights_hash="sha256:" + "2" * 64)
    assert other.expected_hash() != manifest.expected_hash()

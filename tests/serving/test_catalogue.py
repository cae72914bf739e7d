"""Which heads the service offers for a backbone: by weights, for older heads by the bundle's content hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.bundles.bundle import write_bundle
from bioseq.bundles.registry import Entry, Registry
from bioseq.errors import NotFoundError
from serving.engine.catalogue import Catalogue


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "home", shipped=tmp_path / "none")


def backbone(registry: Registry, folder: Path, name: str, seed: int) -> Entry:
    model = PackedEncoder(CONFIGS["tiny"])
    model.init_weights(torch.Generator().manual_seed(seed))
    return registry.register(save_backbone(folder / name, model, name=name, card=f"# {name}", evidence={}))


def head(registry: Registry, folder: Path, name: str, **base: str | None) -> Entry:
    fields = {"kind": "head", "name": name, "alphabet": "protein", "task": "regression", **base}
    bundle = write_bundle(
        folder / name, manifest_fields=fields, tensors={"w": torch.ones(1)}, card="", evidence={}
    )
    return registry.register(bundle)


def test_a_copy_of_the_weights_offers_the_same_heads(registry: Registry, tmp_path: Path) -> None:
    first = backbone(registry, tmp_path, "first", 0)
    copy = backbone(registry, tmp_path, "copy", 0)
    other = backbone(registry, tmp_path, "other", 1)
    assert first.content_hash != copy.content_hash and first.weights_hash == copy.weights_hash
    head(registry, tmp_path, "new", base_weights_hash=first.weights_hash)
    head(registry, tmp_path, "old", base_hash=first.content_hash)
    catalogue = Catalogue(registry, "first")
    catalogue.refresh()
    bases = {name: catalogue.backbone(name) for name in ("first", "copy", "other")}
    assert {n for n, base in bases.items() if _has(catalogue, "new", base)} == {"first", "copy"}
    assert {n for n, base in bases.items() if _has(catalogue, "old", base)} == {"first"}
    with pytest.raises(NotFoundError, match="belongs to another backbone than other@1"):
        catalogue.head("new", bases[other.name])


def _has(catalogue: Catalogue, name: str, base: object) -> bool:
    try:
        return catalogue.head(name, base).name == name  # type: ignore[arg-type]
    except NotFoundError:
        return False


def test_manifests_that_are_kept_are_bounded(registry: Registry, tmp_path: Path, monkeypatch) -> None:
    from serving.engine import catalogue as room

    monkeypatch.setattr(room, "MANIFESTS", 2)
    for i, name in enumerate(("a", "b", "c")):
        backbone(registry, tmp_path, name, i)
    served = Catalogue(registry, "a")
    served.refresh()
    models = [served.backbone(n) for n in ("a", "b", "c")]
    for model in (models[0], models[1], models[0], models[2]):
        assert served.manifest(model).name == model.name
    assert [served.known_manifest(m) is not None for m in models] == [True, False, True]

"""The models that a request names, as exact versions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from bioseq.bundles.manifest import Manifest
from bioseq.errors import NotFoundError
from serving.engine.catalogue import Model
from serving.http.checks import Shape
from serving.http.service import Service


@dataclass(frozen=True, slots=True)
class Target:
    """The exact versions that answer: `heads` maps the names asked for to them."""

    model: Model
    shape: Shape
    manifest: Manifest
    heads: dict[str, Model] = field(default_factory=dict)
    routes: int = 1  # passes over each sequence: the bare backbone, and each head with weights of its own

    @property
    def exact_heads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.exact for m in self.heads.values()))


async def find(service: Service, model: str, heads: Sequence[str] = ()) -> Target:
    """Raises `NotFoundError`. A name that is unknown is looked for once more in the registry as it is now."""
    try:
        return await _find(service, model, heads)
    except NotFoundError:
        await service.refresh()
        return await _find(service, model, heads)


async def _find(service: Service, model: str, heads: Sequence[str]) -> Target:
    catalogue = service.catalogue
    backbone = catalogue.backbone(model)
    manifest = await _manifest(service, backbone)
    chosen = {name: catalogue.head(name, backbone) for name in heads}
    routes = 0
    plain = not chosen
    for head in {m.exact: m for m in chosen.values()}.values():
        if _own_weights(await _manifest(service, head)):
            routes += 1
        else:
            plain = True
    return Target(backbone, Shape.of(manifest), manifest, chosen, routes + plain)


async def _manifest(service: Service, model: Model) -> Manifest:
    known = service.catalogue.known_manifest(model)
    return known if known is not None else await asyncio.to_thread(service.catalogue.manifest, model)


def _own_weights(manifest: Manifest) -> bool:
    """Whether a head changes the backbone (LoRA, or a trunk of its own), and so costs a pass of its own."""
    if any(name.startswith("adapter/") for name in manifest.files):
        return True
    return (manifest.extra.get("head") or {}).get("method") == "full"

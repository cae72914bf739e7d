"""The models that a request names, as exact versions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from bioseq.bundles.manifest import Manifest
from bioseq.errors import NotFoundError, ServiceError
from bioseq.heads.relatives import reads_profiles, searches
from bioseq.homologs.reference import open_reference
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
    searching: tuple[str, ...] = ()  # exact names of the heads that read homologs
    profiles: bool = False  # whether a head reads profiles
    routes: int = 1  # passes over each sequence: the bare backbone, and each head with weights of its own

    @property
    def exact_heads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.exact for m in self.heads.values()))

    @property
    def reads_homologs(self) -> bool:
        """Whether the backbone itself does."""
        return bool(self.manifest.architecture.get("reads_homologs"))


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
    searching, profiles = [], False
    for head in {m.exact: m for m in chosen.values()}.values():
        found = await _manifest(service, head)
        if searches(found):
            searching.append(head.exact)
        profiles |= reads_profiles(found)
        if _own_weights(found):
            routes += 1
        else:
            plain = True
    return Target(backbone, Shape.of(manifest), manifest, chosen, tuple(searching), profiles, routes + plain)


async def own_set(service: Service, target: Target) -> str:
    """The name of the reference set that a backbone reads. Raises `ServiceError`."""
    wanted = target.manifest.extra["homologs"]["reference"]
    for name, folder in service.settings.references.items():
        if (await asyncio.to_thread(open_reference, folder)).hash == wanted:
            return name
    raise ServiceError(
        f"{target.model.name} reads homologs from a reference set that this server has not.",
        status=503, code="homologs.not_found", hint="Ask with homologs 'none'.",
    )  # fmt: skip


async def _manifest(service: Service, model: Model) -> Manifest:
    known = service.catalogue.known_manifest(model)
    return known if known is not None else await asyncio.to_thread(service.catalogue.manifest, model)


def _own_weights(manifest: Manifest) -> bool:
    """Whether a head changes the backbone (LoRA, or a trunk of its own), and so costs a pass of its own."""
    if any(name.startswith("adapter/") for name in manifest.files):
        return True
    return (manifest.extra.get("head") or {}).get("method") == "full"

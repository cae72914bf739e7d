"""Names to exact versions: a snapshot of the registry, taken again whenever the registry has changed.

A request's names are resolved once, at the ingress, against one snapshot; everything behind it deals in exact
names ("NAME@V"). Unknown names are not repeated in messages: what a user put there may be a sequence. An alias moves between two requests and never within one, and a request in flight keeps what it began with.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bioseq.bundles.manifest import fits
from bioseq.errors import BundleError, NotFoundError

if TYPE_CHECKING:
    from bioseq.bundles.bundle import Bundle, Manifest
    from bioseq.bundles.registry import Registry

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}(@[0-9]{1,6})?")
MANIFESTS = 1024  # kept at most
TOLD = 20  # names in a hint


@dataclass(frozen=True, slots=True)
class Model:
    """One version of a backbone or head. `exact` is its unambiguous name, `NAME@V` (or a bundle's path)."""

    exact: str
    name: str
    version: int
    kind: str
    content_hash: str
    base_hash: str | None
    weights_hash: str | None
    base_weights_hash: str | None
    task: str | None
    aliases: tuple[str, ...]
    shipped: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`versions` are those of each name; `heads` some names of heads by the hash of the weights (or bundle) they belong
    to. Everything is looked up by a key, so that a request's cost does not grow with the number of models."""

    models: tuple[Model, ...] = ()
    by_name: dict[str, Model] = field(default_factory=dict)
    versions: dict[str, list[Model]] = field(default_factory=dict)
    backbones: tuple[str, ...] = ()
    heads: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, models: list[Model], given: Model | None) -> Snapshot:
        by_name: dict[str, Model] = {}
        versions: dict[str, list[Model]] = {}
        heads: dict[str, set[str]] = {}
        for model in sorted(models, key=lambda m: m.version):
            by_name[model.name] = by_name[model.exact] = model
            versions.setdefault(model.name, []).append(model)
            if model.kind == "head":
                heads.setdefault(model.base_weights_hash or model.base_hash or "", set()).add(model.name)
        for model in models:
            by_name.update(dict.fromkeys(model.aliases, model))
        if given is not None:
            by_name["default"] = by_name[given.name] = given
            models = [*models, given]
        backbones = tuple(sorted({m.name for m in models if m.kind == "backbone"}))
        return cls(
            tuple(models), by_name, versions, backbones, {k: sorted(v)[:TOLD] for k, v in heads.items()}
        )

    def heads_of(self, base: Model) -> list[str]:
        names = (*self.heads.get(base.weights_hash or "", ()), *self.heads.get(base.content_hash, ()))
        return sorted(set(names))


class Catalogue:
    """Thread-safe. `default` is what answers where a request names no backbone: a registry name, or the path
    of a bundle, which is then served under its own name as well."""

    def __init__(self, registry: Registry, default: str = "default"):
        self.registry, self.default = registry, default
        self._lock = threading.Lock()
        self._generation: Any = object()
        self._snapshot = Snapshot()
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()  # the least recently used goes first
        self._given = self._open_given(default)

    def _open_given(self, default: str) -> Model | None:
        if "/" not in default and not (Path(default) / "manifest.json").is_file():
            return None
        from bioseq.bundles.bundle import open_bundle

        bundle = open_bundle(Path(default))
        manifest = bundle.manifest
        if manifest.kind != "backbone":
            raise BundleError(f"{default} is a head, not a backbone.", hint="Serve its backbone.")
        exact = str(Path(default).resolve())
        self._manifests[f"{exact} {manifest.content_hash}"] = manifest
        return Model(
            exact, manifest.name, manifest.version or 1, "backbone", manifest.content_hash, None,
            manifest.weights_hash, None, None, ("default",), False,
        )  # fmt: skip

    def refresh(self) -> bool:
        """Look whether the registry has changed; True if it has. Blocks on the disk or object store."""
        generation = self.registry.generation()
        if generation == self._generation:
            return False
        models = []
        for entry in self.registry.entries():
            models.append(
                Model(
                    f"{entry.name}@{entry.version}", entry.name, entry.version, entry.kind,
                    entry.content_hash, entry.base_hash, entry.weights_hash, entry.base_weights_hash, entry.task,
                    tuple(entry.aliases), entry.shipped,
                )
            )  # fmt: skip
        snapshot = Snapshot.of(models, self._given)
        with self._lock:
            self._generation = generation
            self._snapshot = snapshot
        return True

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def backbone(self, name: str | None = None) -> Model:
        """Raises `NotFoundError` (model.not_found)."""
        if name is None or name == "default":
            name = "default" if self._given is not None else self.default
        model = self._find(name)
        if model is None or model.kind != "backbone":
            what = f"{model.exact} is a head, not a backbone." if model else "there is no model of that name."
            raise NotFoundError(what, hint=f"There are: {', '.join(self._snapshot.backbones[:TOLD])}.")
        return model

    def head(self, name: str, base: Model) -> Model:
        """A head that fits the backbone `base`. Raises `NotFoundError` (head.not_found)."""
        model = self._find(name)
        hint = f"Heads of {base.name}: {', '.join(self._snapshot.heads_of(base)[:TOLD]) or 'none'}."
        if model is None or model.kind != "head":
            raise NotFoundError("there is no head of that name.", code="head.not_found", hint=hint)
        if not fits(model, base):
            # A newer version may belong to a newer backbone; the newest that fits answers, unless one is named.
            same = [m for m in self._snapshot.versions[model.name] if m.kind == "head" and fits(m, base)]
            if not same or "@" in name or name != model.name:
                raise NotFoundError(
                    f"head {model.exact} belongs to another backbone than {base.exact}.",
                    code="head.not_found",
                    hint=hint,
                )
            model = max(same, key=lambda m: m.version)
        return model

    def any(self, name: str) -> Model:
        """A backbone or head. Raises `NotFoundError`."""
        model = self._find(name)
        if model is None:
            raise NotFoundError("there is no model of that name.", hint="See GET /v1/models.")
        return model

    def _find(self, name: str) -> Model | None:
        return self._snapshot.by_name.get(name) if NAME.fullmatch(name) else None

    def bundle(self, model: Model) -> Bundle:
        """Blocks on the disk."""
        if self._is_given(model):
            from bioseq.bundles.bundle import open_bundle

            return open_bundle(Path(model.exact), verify=False)
        return self.registry.resolve(model.exact, paths=False)

    def known_manifest(self, model: Model) -> Manifest | None:
        """The manifest if it was read before."""
        key = f"{model.exact} {model.content_hash}"
        with self._lock:
            if key in self._manifests:
                self._manifests.move_to_end(key)
            return self._manifests.get(key)

    def manifest(self, model: Model) -> Manifest:
        """Read alone, and kept after the first look, so many at most. Blocks on the disk."""
        found = self.known_manifest(model)
        if found is None:
            found = self.bundle(model).manifest if self._is_given(model) else self._read_manifest(model)
            with self._lock:
                self._manifests[f"{model.exact} {model.content_hash}"] = found
                while len(self._manifests) > MANIFESTS:
                    self._manifests.popitem(last=False)
        return found

    def _read_manifest(self, model: Model) -> Manifest:
        return self.registry.manifest(self.registry.find(model.exact))

    def text(self, model: Model, name: str) -> str:
        """A small file of the bundle, such as card.md, read alone. Blocks on the disk."""
        if self._is_given(model):
            return self.bundle(model).file(name).read_text("utf-8")
        return self.registry.file(self.registry.find(model.exact), name).decode("utf-8")

    def _is_given(self, model: Model) -> bool:
        return self._given is not None and model.exact == self._given.exact

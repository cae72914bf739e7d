"""Names, versions and aliases -> bundles.

Concept: a *name* has *versions* 1, 2, 3 ..., counted up for ever: a removed version's number is never given
again. `NAME` means its newest version, `NAME@V` that one, and an *alias* points at one version of one name and
can be moved. Bundles lie under blobs/ by content hash, so the same content is stored once however many names
it has; the index is one small file, replaced atomically under a lock, so a kill at any moment leaves either
the old registry or the new one.

The bundles that bioseq ships (bioseq/models/) are always there and read-only. `default` points at the shipped
backbone until it is aliased elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bioseq.bundles.bundle import Bundle, open_bundle
from bioseq.bundles.index import (
    INDEX,
    KEPT,
    KEPT_SINCE_2,
    PREVIOUS,
    Entry,
    Index,
    Shipped,
    dumped,
    hashes,
    parse,
    split,
)
from bioseq.bundles.manifest import MANIFEST, Manifest, check_name, fits, manifest_from_dict
from bioseq.bundles.stores import Store, open_store
from bioseq.errors import NotFoundError, RegistryError

__all__ = ["Entry", "Registry"]

SHIPPED = Path(__file__).parents[1] / "models"


class Registry:
    """A registry at `home`: a folder, a URL of pyarrow's file systems, a `Store`, or None for $BIOSEQ_HOME
    (else ~/.local/share/bioseq). `shipped` is the folder of read-only bundles. Safe to use from several
    processes and threads at once: the index is kept while its stamp is the same, so another's change is seen at the next
    call."""

    def __init__(self, home: str | Path | Store | None = None, *, shipped: Path | None = None):
        self.store: Store = open_store(home) if home is None or isinstance(home, str | Path) else home
        self._shipped_folder = SHIPPED if shipped is None else shipped
        self._shipped_seen: tuple[int, Shipped] | None = None
        self._seen: tuple[tuple[Any, ...], Index] | None = None

    # ------------------------------------------------------------------------------------------------ reading

    def entries(self) -> list[Entry]:
        """All versions of all names, shipped ones included, sorted by kind, name and version."""
        return self._index().entries()

    def find(self, name: str, *, kind: str | None = None) -> Entry:
        """The entry of `NAME`, `NAME@V` or an alias, without fetching anything.

        `kind` ("backbone" or "head") says what is looked for. Raises `NotFoundError` with code model.not_found,
        head.not_found or version.not_found.
        """
        return self._index().find(name, kind)

    def resolve(self, name: str, *, kind: str | None = None, paths: bool = True) -> Bundle:
        """The verified bundle of `NAME`, `NAME@V`, an alias, or (with `paths`) a bundle's folder.

        A registered name wins over a folder of the same name. The manifest carries the registered name and
        version. Raises `NotFoundError`, `BundleError`, `RegistryError`.
        """
        text = str(name)
        if paths and ("/" in text or isinstance(name, Path)):
            return open_bundle(Path(text).expanduser())
        try:
            entry = self.find(text, kind=kind)
        except NotFoundError:
            if paths and text and (Path(text) / "manifest.json").is_file():
                return open_bundle(text)
            raise
        return self.bundle(entry)

    def bundle(self, entry: Entry) -> Bundle:
        """The verified bundle of an entry, fetched into the local cache if the registry is remote."""
        path = Path(entry.path) if entry.shipped else self.store.fetch(entry.content_hash)
        bundle = open_bundle(path)
        if bundle.manifest.content_hash != entry.content_hash:
            raise RegistryError(
                f"{entry.ref} should be {entry.content_hash}, but {path} holds {bundle.manifest.content_hash}.",
                hint=f"Remove {entry.ref} and register it again.",
            )
        return Bundle(bundle.path, replace(bundle.manifest, name=entry.name, version=entry.version))

    def manifest(self, entry: Entry) -> Manifest:
        """An entry's manifest under its registered name, read alone: nothing else of the bundle is fetched. Raises
        `RegistryError`, `BundleError`."""
        where = f"{entry.ref}/{MANIFEST}"
        try:
            found = manifest_from_dict(json.loads(self._file(entry, MANIFEST)), where=where)
        except ValueError as error:
            raise RegistryError(f"{where} is not JSON.", hint="Register the bundle again.") from error
        if found.content_hash != entry.content_hash or found.expected_hash() != entry.content_hash:
            raise RegistryError(
                f"{where} is not that of {entry.content_hash}.",
                hint=f"Remove {entry.ref} and register it again.",
            )
        return replace(found, name=entry.name, version=entry.version)

    def file(self, entry: Entry, name: str) -> bytes:
        """One small file of an entry's bundle, such as card.md, checked against the manifest and read alone. Raises
        `RegistryError`, `BundleError`."""
        data = self._file(entry, name)
        wanted = self.manifest(entry).files.get(name)
        if wanted != f"sha256:{hashlib.sha256(data).hexdigest()}":
            raise RegistryError(
                f"{name} of {entry.ref} has not the hash that its manifest gives.",
                hint="Register the bundle again.",
            )
        return data

    def _file(self, entry: Entry, name: str) -> bytes:
        data = (
            (Path(entry.path) / name).read_bytes()
            if entry.shipped
            else self.store.read_blob(entry.content_hash, name)
        )
        if data is None:
            raise RegistryError(f"{entry.ref} has no {name}.", hint="Register the bundle again.")
        return data

    def heads_for(self, backbone: Entry | Manifest) -> list[Entry]:
        """The newest version of every head that was made for this backbone."""
        newest = {e.name: e for e in self.entries() if e.kind == "head" and fits(e, backbone)}
        return list(newest.values())

    def aliases(self) -> dict[str, str]:
        """alias -> `NAME@V`."""
        return {alias: f"{n}@{v}" for alias, (n, v) in self._index().aliases.items()}

    def generation(self) -> str:
        """A token that changes whenever anything in the registry does; cheap enough to poll every second."""
        return self.store.stamp(INDEX)

    # ------------------------------------------------------------------------------------------------ writing

    def register(
        self, bundle: str | Path | Bundle, name: str | None = None, accept_weak: bool = False
    ) -> Entry:
        """Copy a bundle in as the next version of `name` (default: the manifest's own name).

        Content that `name` already has is not registered again: its entry is returned. A head that does not
        beat its trivial baseline (evidence.json: "beats_baseline": false) is refused with code head.weak
        unless `accept_weak`. Raises `BundleError`, `RegistryError`, `OutputError`.
        """
        opened = open_bundle(bundle.path if isinstance(bundle, Bundle) else bundle)
        manifest = opened.manifest
        name = check_name(name or manifest.name, RegistryError)
        if manifest.kind == "head" and opened.evidence().get("beats_baseline") is False and not accept_weak:
            raise RegistryError(
                f"{name} does not beat its trivial baseline (evidence.json: beats_baseline is false).",
                hint="Improve it, or register it knowingly: --accept-weak (accept_weak=True).",
                code="head.weak",
            )
        if name in self._shipped():
            raise RegistryError(f"{name!r} is a model that bioseq ships.", hint="Choose another name.")
        digest = manifest.content_hash
        record = {key: getattr(manifest, key) for key in (*KEPT, *KEPT_SINCE_2)}

        def add(index: dict[str, Any]) -> int:
            if name in self._indexed(index).aliases:
                raise RegistryError(f"{name!r} is an alias.", hint="Choose another name, or move the alias.")
            model = index["models"].setdefault(name, {"next": 1, "versions": {}})
            for version, known in model["versions"].items():
                if known["content_hash"] == digest:
                    return int(version)
            kinds = {known["kind"] for known in model["versions"].values()} - {manifest.kind}
            if kinds:
                raise RegistryError(
                    f"{name!r} is a {kinds.pop()}, this bundle a {manifest.kind}.",
                    hint="Choose another name.",
                )
            version = model["next"]
            model["versions"][str(version)] = record
            model["next"] = version + 1
            return version

        # Copied before the lock, which is then held only for a moment; looked at again inside, because the
        # last version with this content may have been removed in between.
        for _ in range(10):
            if not self.store.has_blob(digest):
                self.store.put_blob(digest, opened.path)
            result = self._change(add, needs=digest)
            if result is not None:
                break
        else:
            raise RegistryError(f"{name} cannot be registered: other processes keep removing its content.")
        entry = self.find(f"{name}@{result}")
        if entry.kind == "head" and not any(e.kind == "backbone" and fits(entry, e) for e in self.entries()):
            base = entry.base_weights_hash or entry.base_hash
            note = f"its backbone {base} is not registered here: register it before using the head"
            entry = replace(entry, notes=(note,))
        return entry

    def remove(self, ref: str) -> Entry:
        """Remove one version, named in full. Its number is never given again. Raises `NotFoundError`, and
        `RegistryError` while an alias points at it or if it is shipped."""
        name, version = split(ref)
        if version is None:
            raise RegistryError(f"{ref!r} names no version.", hint=f"Say which one: {name}@1, for example.")
        removed: list[Entry] = []

        def drop(index: dict[str, Any]) -> None:
            entry = self._indexed(index).find(f"{name}@{version}")
            if entry.name != name:
                raise RegistryError(
                    f"{name!r} is an alias of {entry.ref}.", hint=f"Remove {entry.ref} by its name."
                )
            if entry.shipped:
                raise RegistryError(f"{entry.ref} is shipped with bioseq and read-only.")
            if entry.aliases:
                raise RegistryError(
                    f"the alias {entry.aliases[0]!r} points at {entry.ref}.",
                    hint=f"Move it first: bioseq models alias {entry.aliases[0]} NAME@V.",
                )
            del index["models"][name]["versions"][str(version)]
            removed.append(entry)

        self._change(drop, unused=True)
        return removed[0]

    def alias(self, name: str, target: str) -> Entry:
        """Point the alias `name` at `NAME@V` (`NAME` alone: its newest version now), moving it if it exists.
        Raises `NotFoundError`, and `RegistryError` if `name` is a model's."""
        check_name(name, RegistryError)
        moved: set[str] = set()

        def point(index: dict[str, Any]) -> None:
            if name in index["models"] or name in self._shipped():
                raise RegistryError(f"{name!r} is a model's name.", hint="Choose another alias.")
            entry = self._indexed(index).find(target)
            index["aliases"][name] = [entry.name, entry.version]
            moved.add(entry.ref)

        self._change(point)
        return self.find(moved.pop())

    # ------------------------------------------------------------------------------------------------- inside

    def _change(
        self, change: Callable[[dict[str, Any]], Any], *, needs: str | None = None, unused: bool = False
    ) -> Any:
        """Apply `change` to the index under the lock. Returns None, changing nothing, if the blob `needs` is
        gone; with `unused`, blobs that the change left without a name are deleted."""
        with self.store.lock():
            if needs is not None and not self.store.has_blob(needs):
                return None
            raw = self.store.read(INDEX)
            index = parse(raw, self.store.where)
            before, held = dumped(index), hashes(index)
            result = change(index)
            after = dumped(index)
            if after != before:
                self.store.write(PREVIOUS, raw or before)
                self.store.write(INDEX, after)
            if unused:
                for digest in held - hashes(index):
                    self.store.drop_blob(digest)
            return result

    def _index(self) -> Index:
        # The stamp first: a change between the two is seen at the next call.
        self._shipped()
        stamp = (self.store.stamp(INDEX), self._shipped_seen and self._shipped_seen[0])
        if self._seen is None or self._seen[0] != stamp:
            self._seen = (stamp, self._indexed(parse(self.store.read(INDEX), self.store.where)))
        return self._seen[1]

    def _indexed(self, data: dict[str, Any]) -> Index:
        return Index(data, self._shipped(), self.store.blob_path, self.store.where)

    def _shipped(self) -> Shipped:
        """name -> version -> entry of the shipped bundles."""
        found: Shipped = {}
        try:
            changed = self._shipped_folder.stat().st_mtime_ns
        except OSError:
            return found
        if self._shipped_seen is not None and self._shipped_seen[0] == changed:
            return self._shipped_seen[1]
        for folder in sorted(self._shipped_folder.iterdir()):
            if (folder / "manifest.json").is_file():
                manifest = open_bundle(folder, verify=False).manifest
                entry = Entry(
                    name=manifest.name,
                    version=manifest.version or 1,
                    path=str(folder),
                    shipped=True,
                    **{key: getattr(manifest, key) for key in (*KEPT, *KEPT_SINCE_2)},
                )
                found.setdefault(entry.name, {})[entry.version] = entry
        self._shipped_seen = (changed, found)
        return found

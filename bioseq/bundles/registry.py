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

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bioseq.bundles.bundle import Bundle, open_bundle
from bioseq.bundles.manifest import Manifest, check_name, fits
from bioseq.bundles.stores import Store, open_store
from bioseq.errors import BundleError, NotFoundError, RegistryError

INDEX, PREVIOUS = "index.json", "index.previous.json"
FORMAT_VERSION = 2  # 1 had no hashes of weights, and is read
SHIPPED = Path(__file__).parents[1] / "models"
_KEPT = ("kind", "content_hash", "base_hash", "task", "alphabet", "per_residue", "labels", "units", "licence")
_KEPT_SINCE_2 = ("weights_hash", "base_weights_hash")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One registered version. `path` is a folder, or a URL in object storage; `aliases` are those that point
    at this version; `notes` are remarks of `register` for the user."""

    name: str
    version: int
    kind: str
    content_hash: str
    weights_hash: str | None = None
    base_hash: str | None = None
    base_weights_hash: str | None = None
    task: str | None = None
    alphabet: str = "protein"
    per_residue: bool = False
    labels: list[str] = field(default_factory=list)
    units: Any = None
    licence: str = "unknown"
    path: str = ""
    aliases: tuple[str, ...] = ()
    shipped: bool = False
    notes: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """`NAME@V`"""
        return f"{self.name}@{self.version}"


class Registry:
    """A registry at `home`: a folder, a URL of pyarrow's file systems, a `Store`, or None for $BIOSEQ_HOME
    (else ~/.local/share/bioseq). `shipped` is the folder of read-only bundles. Safe to use from several
    processes and threads at once; nothing is cached, so another's change is seen at the next call."""

    def __init__(self, home: str | Path | Store | None = None, *, shipped: Path | None = None):
        self.store: Store = open_store(home) if home is None or isinstance(home, str | Path) else home
        self._shipped_folder = SHIPPED if shipped is None else shipped
        self._shipped_seen: tuple[int, dict[str, dict[int, Entry]]] | None = None

    # ------------------------------------------------------------------------------------------------ reading

    def entries(self) -> list[Entry]:
        """All versions of all names, shipped ones included, sorted by kind, name and version."""
        return self._entries(self._read())

    def find(self, name: str, *, kind: str | None = None) -> Entry:
        """The entry of `NAME`, `NAME@V` or an alias, without fetching anything.

        `kind` ("backbone" or "head") says what is looked for. Raises `NotFoundError` with code model.not_found,
        head.not_found or version.not_found.
        """
        return self._find(self._read(), name, kind)

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

    def heads_for(self, backbone: Entry | Manifest) -> list[Entry]:
        """The newest version of every head that was made for this backbone."""
        newest = {e.name: e for e in self.entries() if e.kind == "head" and fits(e, backbone)}
        return list(newest.values())

    def aliases(self) -> dict[str, str]:
        """alias -> `NAME@V`."""
        return {alias: f"{n}@{v}" for alias, (n, v) in self._aliases(self._read()).items()}

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
        record = {key: getattr(manifest, key) for key in (*_KEPT, *_KEPT_SINCE_2)}

        def add(index: dict[str, Any]) -> int:
            if name in self._aliases(index):
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
        name, version = _split(ref)
        if version is None:
            raise RegistryError(f"{ref!r} names no version.", hint=f"Say which one: {name}@1, for example.")
        removed: list[Entry] = []

        def drop(index: dict[str, Any]) -> None:
            entry = self._find(index, f"{name}@{version}", None)
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
            entry = self._find(index, target, None)
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
            index = self._read()
            before = json.dumps(index, indent=1, sort_keys=True)
            held = _hashes(index)
            result = change(index)
            after = json.dumps(index, indent=1, sort_keys=True)
            if after != before:
                self.store.write(PREVIOUS, (before + "\n").encode())
                self.store.write(INDEX, (after + "\n").encode())
            if unused:
                for digest in held - _hashes(index):
                    self.store.drop_blob(digest)
            return result

    def _read(self) -> dict[str, Any]:
        raw = self.store.read(INDEX)
        if raw is None:
            return {"format_version": FORMAT_VERSION, "models": {}, "aliases": {}}
        try:
            index = json.loads(raw)
            if index["format_version"] not in (1, FORMAT_VERSION):
                raise RegistryError(
                    f"{self.store.where}/{INDEX} has format_version {index['format_version']!r}; this bioseq reads "
                    f"1 and {FORMAT_VERSION}.",
                    hint="Use a newer bioseq.",
                )
            index["format_version"] = FORMAT_VERSION
            _check_index(index)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BundleError) as error:
            raise RegistryError(
                f"{self.store.where}/{INDEX} is damaged ({type(error).__name__}: {error}).",
                hint=f"Put {PREVIOUS} (the state before the last change) in its place, or move it away and "
                "register the bundles under blobs/ again.",
            ) from error
        return index

    def _shipped(self) -> dict[str, dict[int, Entry]]:
        """name -> version -> entry of the shipped bundles."""
        found: dict[str, dict[int, Entry]] = {}
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
                    **{key: getattr(manifest, key) for key in (*_KEPT, *_KEPT_SINCE_2)},
                )
                found.setdefault(entry.name, {})[entry.version] = entry
        self._shipped_seen = (changed, found)
        return found

    def _aliases(self, index: dict[str, Any]) -> dict[str, tuple[str, int]]:
        aliases = {alias: (str(n), int(v)) for alias, (n, v) in index["aliases"].items()}
        if "default" not in aliases:
            shipped = [e for v in self._shipped().values() for e in v.values() if e.kind == "backbone"]
            if shipped:  # the folder called "default", else the first
                chosen = next((e for e in shipped if Path(e.path).name == "default"), shipped[0])
                aliases["default"] = (chosen.name, chosen.version)
        return aliases

    def _entries(self, index: dict[str, Any]) -> list[Entry]:
        aliases = self._aliases(index)
        models = {name: dict(versions) for name, versions in self._shipped().items()}
        for name, model in index["models"].items():
            for version, record in model["versions"].items():
                path = self.store.blob_path(record["content_hash"])
                entry = Entry(name=name, version=int(version), path=path, **record)
                models.setdefault(name, {})[entry.version] = entry
        entries = [
            replace(e, aliases=tuple(sorted(a for a, at in aliases.items() if at == (e.name, e.version))))
            for versions in models.values()
            for e in versions.values()
        ]
        return sorted(entries, key=lambda e: (e.kind, e.name, e.version))

    def _find(self, index: dict[str, Any], ref: str, kind: str | None) -> Entry:
        name, version = _split(ref)
        aliases = self._aliases(index)
        entries = self._entries(index)
        if name in aliases and not any(e.name == name for e in entries):
            if version is not None and version != aliases[name][1]:
                raise NotFoundError(
                    f"the alias {name!r} points at {aliases[name][0]}@{aliases[name][1]}, not at version {version}.",
                    code="version.not_found",
                )
            name, version = aliases[name]
        versions = {e.version: e for e in entries if e.name == name}
        if not versions or (kind is not None and all(e.kind != kind for e in versions.values())):
            what = {"head": "head", "backbone": "backbone"}.get(kind or "", "model")
            names = {e.name for e in entries if kind is None or e.kind == kind}
            names |= {a for a, at in aliases.items() if kind is None or at[0] in names}
            but = f" ({name} is a {next(iter(versions.values())).kind})" if versions else ""
            raise NotFoundError(
                f"there is no {what} {ref!r} in the registry at {self.store.where}{but}.",
                hint=_closest(name, names, "bioseq models list shows what is there."),
                code="head.not_found" if kind == "head" else "model.not_found",
            )
        if version is None:
            version = max(versions)
        if version not in versions:
            raise NotFoundError(
                f"{name} has no version {version}.",
                hint=f"It has {', '.join(map(str, sorted(versions)))}.",
                code="version.not_found",
            )
        return versions[version]


def _split(ref: str) -> tuple[str, int | None]:
    """`NAME@V` -> (name, version). A malformed name is reported as not found."""
    name, at, version = str(ref).partition("@")
    if not at:
        return name, None
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise NotFoundError(
            f"{version!r} is not a version.",
            hint="Versions are whole numbers: NAME@1.",
            code="version.not_found",
        )
    return name, int(version)


def _closest(name: str, names: set[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else otherwise


def _hashes(index: dict[str, Any]) -> set[str]:
    return {v["content_hash"] for m in index["models"].values() for v in m["versions"].values()}


def _check_index(index: dict[str, Any]) -> None:
    for name, model in index["models"].items():
        check_name(name)
        for version, record in model["versions"].items():
            unknown = set(record) - set(_KEPT) - set(_KEPT_SINCE_2)
            if not 0 < int(version) < model["next"] or unknown or not set(_KEPT) <= set(record):
                raise ValueError(f"{name}@{version} is not as it was written")
            if not re.fullmatch(r"sha256:[0-9a-f]{64}", record["content_hash"]):
                raise ValueError(f"{name}@{version} has no content hash")
    for alias, (name, version) in index["aliases"].items():
        check_name(alias), check_name(name), int(version)

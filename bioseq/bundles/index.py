"""The index of a registry: which versions each name has, and where aliases point.

Concept: a file of JSON is read whole and then answers by name, at a cost that does not grow with the number of
models. What was read is never changed; `Registry` keeps it until the file has another stamp.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bioseq.bundles.manifest import check_name
from bioseq.errors import BundleError, NotFoundError, RegistryError

INDEX, PREVIOUS = "index.json", "index.previous.json"
FORMAT_VERSION = 2  # 1 had no hashes of weights, and is read
KEPT = ("kind", "content_hash", "base_hash", "task", "alphabet", "per_residue", "labels", "units", "licence")
KEPT_SINCE_2 = ("weights_hash", "base_weights_hash")
_READABLE = 200  # names up to which the file is indented, which takes Python's slow encoder


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


Shipped = dict[str, dict[int, Entry]]


class Index:
    """`data` is the file's content; `shipped` the read-only versions by name; `blob_path` tells where a bundle lies."""

    def __init__(self, data: dict[str, Any], shipped: Shipped, blob_path: Callable[[str], str], where: str):
        self.data, self.shipped, self._blob_path, self._where = data, shipped, blob_path, where
        self.aliases = {alias: (str(n), int(v)) for alias, (n, v) in data["aliases"].items()}
        if "default" not in self.aliases:
            backbones = [e for v in shipped.values() for e in v.values() if e.kind == "backbone"]
            if backbones:  # the folder called "default", else the first
                chosen = next((e for e in backbones if Path(e.path).name == "default"), backbones[0])
                self.aliases["default"] = (chosen.name, chosen.version)
        self._pointing: dict[tuple[str, int], list[str]] = {}
        for alias, at in sorted(self.aliases.items()):
            self._pointing.setdefault(at, []).append(alias)

    def versions(self, name: str) -> dict[int, Entry]:
        """The versions that a name has; none for an alias or an unknown name."""
        found = dict(self.shipped.get(name, {}))
        for version, record in self.data["models"].get(name, {"versions": {}})["versions"].items():
            path = self._blob_path(record["content_hash"])
            found[int(version)] = Entry(name=name, version=int(version), path=path, **record)
        return {
            v: replace(e, aliases=tuple(self._pointing[name, v])) if (name, v) in self._pointing else e
            for v, e in found.items()
        }

    def entries(self) -> list[Entry]:
        """All versions of all names, sorted by kind, name and version."""
        names = self.data["models"].keys() | self.shipped.keys()
        found = [entry for name in names for entry in self.versions(name).values()]
        return sorted(found, key=lambda e: (e.kind, e.name, e.version))

    def find(self, ref: str, kind: str | None = None) -> Entry:
        """See `Registry.find`."""
        name, version = split(ref)
        versions = self.versions(name)
        if not versions and name in self.aliases:
            target, at = self.aliases[name]
            if version is not None and version != at:
                raise NotFoundError(
                    f"the alias {name!r} points at {target}@{at}, not at version {version}.",
                    code="version.not_found",
                )
            name, version = target, at
            versions = self.versions(name)
        if not versions or (kind is not None and all(e.kind != kind for e in versions.values())):
            raise self._missing(ref, name, kind, versions)
        if version is None:
            version = max(versions)
        if version not in versions:
            raise NotFoundError(
                f"{name} has no version {version}.",
                hint=f"It has {', '.join(map(str, sorted(versions)))}.",
                code="version.not_found",
            )
        return versions[version]

    def _missing(self, ref: str, name: str, kind: str | None, versions: dict[int, Entry]) -> NotFoundError:
        what = {"head": "head", "backbone": "backbone"}.get(kind or "", "model")
        names = {e.name for e in self.entries() if kind is None or e.kind == kind}
        names |= {a for a, at in self.aliases.items() if kind is None or at[0] in names}
        but = f" ({name} is a {next(iter(versions.values())).kind})" if versions else ""
        return NotFoundError(
            f"there is no {what} {ref!r} in the registry at {self._where}{but}.",
            hint=_closest(name, names, "bioseq models list shows what is there."),
            code="head.not_found" if kind == "head" else "model.not_found",
        )


def split(ref: str) -> tuple[str, int | None]:
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


def parse(raw: bytes | None, where: str) -> dict[str, Any]:
    """The checked content of an index file; an empty one where there is none. Raises `RegistryError`."""
    if raw is None:
        return {"format_version": FORMAT_VERSION, "models": {}, "aliases": {}}
    try:
        data = json.loads(raw)
        if data["format_version"] not in (1, FORMAT_VERSION):
            raise RegistryError(
                f"{where}/{INDEX} has format_version {data['format_version']!r}; this bioseq reads "
                f"1 and {FORMAT_VERSION}.",
                hint="Use a newer bioseq.",
            )
        data["format_version"] = FORMAT_VERSION
        _check(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BundleError) as error:
        raise RegistryError(
            f"{where}/{INDEX} is damaged ({type(error).__name__}: {error}).",
            hint=f"Put {PREVIOUS} (the state before the last change) in its place, or move it away and "
            "register the bundles under blobs/ again.",
        ) from error
    return data


def dumped(data: dict[str, Any]) -> bytes:
    indent = 1 if len(data["models"]) <= _READABLE else None
    return (json.dumps(data, indent=indent, sort_keys=True) + "\n").encode()


def hashes(data: dict[str, Any]) -> set[str]:
    """Content hashes that have a name."""
    return {v["content_hash"] for m in data["models"].values() for v in m["versions"].values()}


def _check(data: dict[str, Any]) -> None:
    for name, model in data["models"].items():
        check_name(name)
        for version, record in model["versions"].items():
            unknown = set(record) - set(KEPT) - set(KEPT_SINCE_2)
            if not 0 < int(version) < model["next"] or unknown or not set(KEPT) <= set(record):
                raise ValueError(f"{name}@{version} is not as it was written")
            if not re.fullmatch(r"sha256:[0-9a-f]{64}", record["content_hash"]):
                raise ValueError(f"{name}@{version} has no content hash")
    for alias, (name, version) in data["aliases"].items():
        check_name(alias), check_name(name), int(version)

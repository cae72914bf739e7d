"""manifest.json of a bundle: its keys, their types, and the content hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, TypedDict

from bioseq.errors import BundleError
from bioseq.specs.finetune import Task
from bioseq.specs.reading import build, read_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
Kind = Literal["backbone", "head"]


class Extra(TypedDict, total=False):
    """What `extra` may hold. A new key is declared here first: a reader that does not know a key must refuse
    it, not half understand the bundle."""

    lm_head: bool  # backbone: does it have a language-model head
    dtype: str  # backbone: dtype of the stored tensors
    source: str  # backbone: what it was imported from
    head: dict[str, Any]  # head: what bioseq.heads.head needs to build it
    training: dict[str, Any]  # settings of the run that made it
    recipe: str
    citation: list[Any]
    homologs: dict[str, Any]  # backbone that reads them: reference set (name, hash), settings of the search


_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


def check_name(name: str, error: type[BundleError] | type[Any] = BundleError) -> str:
    """`name`, if it may name a model; raises `error`. No path can be made of such a name."""
    if (
        not isinstance(name, str)
        or not _NAME.fullmatch(name)
        or len(name) > 100
        or name.endswith((".", ".part"))
    ):
        raise error(
            f"{name!r} cannot name a model.",
            hint="Use a-z, 0-9, '_', '.', '-', beginning with a letter or digit, at most 100 characters.",
        )
    return name


def check_file_name(name: str) -> str:
    """`name`, if it is a plain relative path inside a bundle; raises `BundleError`."""
    path = PurePosixPath(name)
    parts = path.parts
    bad = not parts or path.is_absolute() or "\\" in name or str(path) != name
    if bad or any(p in (".", "..") or p.startswith(".") for p in parts) or name == MANIFEST:
        raise BundleError(f"{name!r} cannot name a file of a bundle.")
    return name


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself.

    `content_hash` covers every file and every field but `name` and `version`, so a bundle may be registered
    under another name. `weights_hash` names what a backbone computes (see `bioseq.backbones.packed.weights`);
    it follows from what `content_hash` covers and is left out of it, so that bundles written before it existed
    keep their content hash. A head names its backbone by `base_weights_hash`; `base_hash` is the content hash
    of the backbone's bundle, and all that older heads have. `files` maps each file's name to its SHA-256.
    """

    kind: Kind
    name: str
    alphabet: Literal["protein", "dna", "rna"]
    architecture: dict[str, Any] = field(default_factory=dict)
    version: int | None = None
    weights_hash: str | None = None
    base_hash: str | None = None
    base_weights_hash: str | None = None
    task: Task | None = None
    labels: list[str] = field(default_factory=list)
    units: str | list[Any] | dict[str, Any] | None = None
    per_residue: bool = False
    data_hash: str | None = None
    seed: int | None = None
    code_version: str = ""
    licence: str = "unknown"
    extra: Extra = field(default_factory=Extra)
    files: dict[str, str] = field(default_factory=dict)
    content_hash: str = ""
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def expected_hash(self) -> str:
        """SHA-256 over the sorted (file name, file hash) and all fields but content_hash, name, version and
        weights_hash."""
        fields = self.to_dict()
        files = sorted(fields.pop("files").items())
        for key in ("content_hash", "name", "version", "weights_hash"):
            del fields[key]
        if self.base_weights_hash is None:  # so the content hashes of older bundles stay as they are
            del fields["base_weights_hash"]
        text = json.dumps(
            [files, fields], sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def manifest_from_dict(data: Any, *, where: str = "manifest") -> Manifest:
    """A checked `Manifest`. Unknown and missing keys, wrong types and impossible values are `BundleError`s."""
    version = data.get("format_version", FORMAT_VERSION) if isinstance(data, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{where} has format_version {version!r}; this bioseq reads {FORMAT_VERSION}.",
            hint="Use the bioseq that wrote the bundle, or a newer one.",
        )
    manifest = build(Manifest, data, error=BundleError, where=where)
    check_name(manifest.name)
    if manifest.kind == "backbone" and not manifest.architecture:
        raise BundleError(f"{where}: a backbone needs its architecture.")
    if manifest.kind == "head":
        if manifest.task is None:
            raise BundleError(f"{where}: a head needs its task.")
        if not manifest.base_hash and not manifest.base_weights_hash:
            raise BundleError(
                f"{where}: a head needs base_hash or base_weights_hash, which name its backbone."
            )
    for key in ("weights_hash", "base_hash", "base_weights_hash"):
        digest = getattr(manifest, key)
        if digest and not _HASH.fullmatch(digest):
            raise BundleError(f"{where}: {key} is {digest!r}; 'sha256:' and 64 hex digits are needed.")
    if manifest.version is not None and manifest.version < 1:
        raise BundleError(f"{where}: version is {manifest.version}; versions begin at 1.")
    for name, digest in manifest.files.items():
        check_file_name(name)
        if not _HASH.fullmatch(digest):
            raise BundleError(
                f"{where}: the hash of {name} is {digest!r}; 'sha256:' and 64 hex digits are needed."
            )
    return manifest


class NamesBackbone(Protocol):
    """What names a head's backbone: a manifest, a registry's entry, a loaded head."""

    @property
    def base_weights_hash(self) -> str | None: ...
    @property
    def base_hash(self) -> str | None: ...


class Identity(Protocol):
    """What identifies a backbone: a manifest, a registry's entry, a predictor."""

    @property
    def weights_hash(self) -> str | None: ...
    @property
    def content_hash(self) -> str: ...


def fits(head: NamesBackbone, backbone: Identity) -> bool:
    """Was the head made for this backbone? By the hash of its weights; by the content hash of its bundle where
    one of the two was written before there was a weights hash."""
    if head.base_weights_hash and backbone.weights_hash:
        return head.base_weights_hash == backbone.weights_hash
    return bool(head.base_hash) and head.base_hash == backbone.content_hash


def read_json(file: Path) -> Any:
    """JSON of a bundle's file; raises `BundleError`."""
    if not file.exists():
        raise BundleError(f"{file.parent} has no {file.name}.", hint="Copy the bundle whole.")
    return read_file(file, error=BundleError)


def hash_file(file: Path) -> str:
    with open(file, "rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"

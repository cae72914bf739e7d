"""manifest.json of a bundle: its keys, their types, and the content hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from bioseq.errors import BundleError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
KINDS = ("backbone", "head")
TASKS = ("regression", "binary", "multiclass", "multilabel", "per_residue")

# What `extra` may hold, and of which type. A new key is declared here first: a reader that does not know a
# key must refuse it, not half understand the bundle.
EXTRA_KEYS: dict[str, tuple[type, ...]] = {
    "lm_head": (bool,),  # backbone: does it have a language-model head
    "dtype": (str,),  # backbone: dtype of the stored tensors
    "source": (str,),  # backbone: what it was imported from
    "head": (dict,),  # head: what bioseq.heads.head needs to build it
    "training": (dict,),  # settings of the run that made it
    "recipe": (str,),
    "citation": (list,),
}

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

    kind: str
    name: str
    alphabet: str
    architecture: dict[str, Any] = field(default_factory=dict)
    version: int | None = None
    weights_hash: str | None = None
    base_hash: str | None = None
    base_weights_hash: str | None = None
    task: str | None = None
    labels: list[str] = field(default_factory=list)
    units: Any = None
    per_residue: bool = False
    data_hash: str | None = None
    seed: int | None = None
    code_version: str = ""
    licence: str = "unknown"
    extra: dict[str, Any] = field(default_factory=dict)
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


_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "name": (str,),
    "alphabet": (str,),
    "architecture": (dict,),
    "version": (int, type(None)),
    "weights_hash": (str, type(None)),
    "base_hash": (str, type(None)),
    "base_weights_hash": (str, type(None)),
    "task": (str, type(None)),
    "labels": (list,),
    "units": (str, list, dict, type(None)),
    "per_residue": (bool,),
    "data_hash": (str, type(None)),
    "seed": (int, type(None)),
    "code_version": (str,),
    "licence": (str,),
    "extra": (dict,),
    "files": (dict,),
    "content_hash": (str,),
    "format_version": (int,),
}


def _typed(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def manifest_from_dict(data: Any, *, where: str = "manifest") -> Manifest:
    """A checked `Manifest`. Unknown and missing keys, wrong types and impossible values are `BundleError`s."""
    if not isinstance(data, dict):
        raise BundleError(f"{where} holds no JSON object.")
    version = data.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{where} has format_version {version!r}; this bioseq reads {FORMAT_VERSION}.",
            hint="Use the bioseq that wrote the bundle, or a newer one.",
        )
    for key in data:
        if key not in _TYPES:
            raise BundleError(f"{where}: unknown key {key!r}.", hint=f"Known: {', '.join(_TYPES)}.")
    for key in ("kind", "name", "alphabet"):
        if key not in data:
            raise BundleError(f"{where}: {key} is missing.")
    for key, value in data.items():
        if not _typed(value, _TYPES[key]):
            kinds = " or ".join("null" if k is type(None) else k.__name__ for k in _TYPES[key])
            raise BundleError(f"{where}: {key} is {value!r}; {kinds} is needed.")
    for key, value in data.get("extra", {}).items():
        if key not in EXTRA_KEYS:
            raise BundleError(f"{where}: unknown key extra.{key}.", hint=f"Known: {', '.join(EXTRA_KEYS)}.")
        if not _typed(value, EXTRA_KEYS[key]):
            raise BundleError(f"{where}: extra.{key} is {value!r}; {EXTRA_KEYS[key][0].__name__} is needed.")
    manifest = Manifest(**data)
    check_name(manifest.name)
    if manifest.kind not in KINDS:
        raise BundleError(f"{where}: kind is {manifest.kind!r}; known are {', '.join(KINDS)}.")
    if manifest.alphabet not in ("protein", "dna", "rna"):
        raise BundleError(f"{where}: alphabet is {manifest.alphabet!r}; known are protein, dna, rna.")
    if manifest.kind == "backbone" and not manifest.architecture:
        raise BundleError(f"{where}: a backbone needs its architecture.")
    if manifest.kind == "head":
        if manifest.task not in TASKS:
            raise BundleError(f"{where}: task is {manifest.task!r}; known are {', '.join(TASKS)}.")
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
    if not all(isinstance(label, str) for label in manifest.labels):
        raise BundleError(f"{where}: labels must be strings.")
    for name, digest in manifest.files.items():
        check_file_name(name)
        if not isinstance(digest, str) or not _HASH.fullmatch(digest):
            raise BundleError(f"{where}: the hash of {name} is no 'sha256:' and 64 hex digits.")
    return manifest


class Head(Protocol):
    """What names a head's backbone: a manifest, a registry's entry, a loaded head."""

    @property
    def base_weights_hash(self) -> str | None: ...
    @property
    def base_hash(self) -> str | None: ...


class Backbone(Protocol):
    """What identifies a backbone: a manifest, a registry's entry, a predictor."""

    @property
    def weights_hash(self) -> str | None: ...
    @property
    def content_hash(self) -> str: ...


def fits(head: Head, backbone: Backbone) -> bool:
    """Was the head made for this backbone? By the hash of its weights; by the content hash of its bundle where
    one of the two was written before there was a weights hash."""
    if head.base_weights_hash and backbone.weights_hash:
        return head.base_weights_hash == backbone.weights_hash
    return bool(head.base_hash) and head.base_hash == backbone.content_hash


def read_json(file: Path) -> Any:
    """JSON of a bundle's file; raises `BundleError`."""
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{file.parent} has no {file.name}.", hint="Copy the bundle whole.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"cannot read {file}: {error}.") from error


def hash_file(file: Path) -> str:
    with open(file, "rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"

"""The versioned artefact directory: how a trained model lies on disk.

    manifest.json         what it is; every other file with its SHA-256
    model.safetensors     tensors, and / or
    adapter/              a LoRA adapter in peft's format
    calibration.json      intervals, thresholds, out-of-distribution reference (heads)
    card.md               for people: what it is, what it was trained on, what it is not good for
    evidence.json         for programs: held-out metrics beside baselines ("beats_baseline")
    hf/                   an imported backbone's original config.json and spelling

Written to a temporary name and renamed. On opening, an unknown key, a wrong hash, a missing file and a file
that the manifest does not list are refused (hidden files such as .DS_Store are ignored).
Tensors are safetensors only: a pickle can run code, so a folder that holds one is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bioseq.bundles.manifest import (
    MANIFEST,
    Manifest,
    check_file_name,
    hash_file,
    manifest_from_dict,
    read_json,
)
from bioseq.errors import BundleError, OutputError
from bioseq.output import atomic_folder
from bioseq.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = ["Bundle", "Manifest", "is_checkpoint", "open_bundle", "write_bundle"]

TENSORS = "model.safetensors"
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
_NEEDED = ("card.md", "evidence.json")
_verified: set[tuple[Any, ...]] = set()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `path` is its directory, which must not change while it is in use."""

    path: Path
    manifest: Manifest

    def _has(self, name: str) -> bool:
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files. Raises `BundleError` if it has none of that name."""
        if not self._has(name):
            raise BundleError(f"{self.path} has no {name}.", hint=f"It has {', '.join(self.manifest.files)}.")
        return self.path / name

    def read_tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors of model.safetensors whose names begin so, on the CPU, in their stored dtype; empty if there is
        none."""
        from safetensors import SafetensorError, safe_open

        if not self._has(TENSORS):
            return {}
        try:
            with safe_open(self.path / TENSORS, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise BundleError(
                f"cannot read {self.path / TENSORS}: {error}.",
                hint="The file may be cut short: copy it again.",
            ) from error

    def calibration(self) -> dict[str, Any]:
        return self._json("calibration.json") if self._has("calibration.json") else {}

    def evidence(self) -> dict[str, Any]:
        return self._json("evidence.json")

    def card(self) -> str:
        return self.file("card.md").read_text("utf-8")

    @property
    def adapter(self) -> Path | None:
        """The folder of the LoRA adapter, in peft's format."""
        return self.path / "adapter" if self._has(ADAPTER[0]) else None

    def _json(self, name: str) -> dict[str, Any]:
        data = read_json(self.file(name))
        if not isinstance(data, dict):
            raise BundleError(f"{self.path / name} is not a JSON object.")
        return data


# --------------------------------------------------------------------------------------------------- opening


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in _PICKLES:
            raise BundleError(
                f"{folder} holds {name}, which may be a pickle and run code when opened.",
                hint="Bundles hold safetensors only; remove it or convert it.",
            )
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BundleError(
                f"{folder}: {name} is a link or a special file.", hint="Copy the files themselves."
            )
        if path.is_file() and name != MANIFEST:
            yield name, path


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder is a checkpoint in the Hugging Face layout: it has a config.json, and is not a bundle."""
    return (Path(path) / "config.json").is_file() and not (Path(path) / MANIFEST).exists()


def open_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Open a bundle directory.

    With `verify`, every file is hashed once per process and again only if its size or time changed. Without,
    only the manifest and the presence of the files are checked. Raises `BundleError`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a bundle: no such folder.")
    if not (folder / MANIFEST).is_file():
        hint = "Give a folder that bioseq wrote."
        if is_checkpoint(folder):
            hint = f"It looks like a Hugging Face checkpoint: bioseq models import {folder} NAME."
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}.", hint=hint)
    manifest = manifest_from_dict(read_json(folder / MANIFEST), where=str(folder / MANIFEST))
    found = dict(_walk(folder))
    for name in _NEEDED:
        if name not in manifest.files:
            raise BundleError(f"{folder / MANIFEST} does not list {name}; every bundle has one.")
    if TENSORS not in manifest.files and not all(name in manifest.files for name in ADAPTER):
        raise BundleError(f"{folder / MANIFEST} lists neither {TENSORS} nor a whole adapter/.")
    for name in manifest.files:
        if name not in found:
            raise BundleError(f"{folder}: {name} is missing.", hint="Copy the bundle whole.")
    for name in found:
        if name not in manifest.files:
            raise BundleError(
                f"{folder}: {name} is not listed in {MANIFEST}.",
                hint="Remove it: a bundle holds only its own files.",
            )
    expected = manifest.expected_hash()
    if manifest.content_hash != expected:
        raise BundleError(
            f"{folder / MANIFEST} has content_hash {manifest.content_hash or 'none'}, its content gives {expected}.",
            hint="The manifest was changed after writing.",
        )
    if verify:
        _verify(folder, manifest, found)
    return Bundle(folder, manifest)


def _verify(folder: Path, manifest: Manifest, found: dict[str, Path]) -> None:
    stats = {name: file.stat() for name, file in found.items()}
    key = (
        str(folder.resolve()),
        manifest.content_hash,
        *((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats.items()),
    )
    if key in _verified:
        return
    for name, file in found.items():
        try:
            digest = hash_file(file)
        except OSError as error:
            raise BundleError(f"cannot read {file}: {error.strerror}.") from error
        if digest != manifest.files[name]:
            raise BundleError(
                f"{folder}: {name} has hash {digest}, the manifest expects {manifest.files[name]}.",
                hint="The file is damaged or was changed: copy the bundle again.",
            )
    _verified.add(key)


# --------------------------------------------------------------------------------------------------- writing


def write_bundle(
    path: str | Path,
    *,
    manifest_fields: dict[str, Any],
    tensors: Mapping[str, torch.Tensor] | None,
    card: str,
    evidence: dict[str, Any],
    adapter: Path | None = None,
    calibration: dict[str, Any] | None = None,
    extra_files: Mapping[str, Path] | None = None,
    force: bool = False,
) -> Bundle:
    """Write a bundle directory whole, or nothing.

    `manifest_fields` are `Manifest`'s fields but `files`, `content_hash` and `format_version`, which are made
    here; `adapter` is a folder in peft's format, of which the two adapter files are taken; `extra_files` maps
    names inside the bundle to files to copy. The same input gives the same bytes. Raises `BundleError` for
    impossible fields, `OutputError` if `path` exists (without `force`) or cannot be written.
    """
    made = {"files", "content_hash", "format_version"} & manifest_fields.keys()
    if made:
        raise BundleError(f"manifest: {', '.join(sorted(made))} cannot be set; bioseq computes it.")
    if not tensors and adapter is None:
        raise BundleError("a bundle needs tensors, an adapter, or both.")
    fields = {"code_version": __version__, **manifest_fields}
    manifest_from_dict(fields)
    with atomic_folder(path, force=force) as folder:
        if tensors:
            _save_tensors(folder / TENSORS, tensors)
        if adapter is not None:
            (folder / "adapter").mkdir()
            for name in ADAPTER:
                _copy(Path(adapter) / Path(name).name, folder / name)
        for name, source in (extra_files or {}).items():
            target = folder / check_file_name(name)
            if target.exists() or name in (*_NEEDED, "calibration.json"):
                raise BundleError(f"extra file {name} would replace the bundle's own.")
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(Path(source), target)
        if calibration is not None:
            _dump(folder / "calibration.json", calibration)
        _dump(folder / "evidence.json", evidence)
        (folder / "card.md").write_text(card if card.endswith("\n") else card + "\n", "utf-8")
        fields["files"] = {name: hash_file(file) for name, file in _walk(folder)}
        manifest = manifest_from_dict(fields)
        manifest = replace(manifest, content_hash=manifest.expected_hash())
        (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return open_bundle(path, verify=False)


def amend_bundle(
    bundle: Bundle, path: str | Path, files: Mapping[str, str], *, force: bool = False
) -> Bundle:
    """Write `bundle` again as `path`, with some text files added or replaced. Raises
    `OutputError`, and `BundleError` for an impossible name."""
    with atomic_folder(path, force=force) as folder:
        for name in bundle.manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(bundle.path / name, folder / name)
        for name, text in files.items():
            (folder / check_file_name(name)).write_text(text, "utf-8")
        hashes = {name: hash_file(file) for name, file in _walk(folder)}
        manifest = replace(bundle.manifest, files=hashes, version=None)
        manifest = replace(manifest, content_hash=manifest.expected_hash())
        (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return open_bundle(path, verify=False)


def with_section(card: str, section: str) -> str:
    """A card with this section ("## Heading" first) in the place of the one of the same heading, or at its end."""
    heading, _, _ = section.strip().partition("\n")
    before, _, old = card.partition(heading + "\n")
    after = "\n## " + old.partition("\n## ")[2] if "\n## " in old else ""
    return before.rstrip() + "\n\n" + section.strip() + "\n" + after


def _save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()  # safetensors refuses views of shared memory
        seen.add(storage.data_ptr())
        plain[name] = tensor
    try:
        save_file(plain, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OutputError(f"cannot write {file.name}: {error}.", hint="Check the free space.") from error


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise BundleError(f"{source} is missing; the bundle needs it.")
    shutil.copyfile(source, target)


def _dump(file: Path, data: dict[str, Any]) -> None:
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise BundleError(f"{file.name} cannot be written as JSON: {error}.") from error
    file.write_text(text + "\n", "utf-8")

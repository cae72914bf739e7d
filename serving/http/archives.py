"""Bundles out of uploaded tar and zip archives: plain files only, into a fresh folder, within a size."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from bioseq.errors import BundleError

SUFFIXES = (".safetensors", ".json", ".md", ".txt")  # what a bundle is made of; never a pickle
MAX_FILES = 1000


def unpack(archive: Path, folder: Path, max_bytes: int) -> Path:
    """Unpack into `folder` and return the directory that holds manifest.json. Raises `BundleError`."""
    total = count = 0
    try:
        for name, size, handle in _members(archive):
            path = PurePosixPath(name)
            parts = [p for p in path.parts if p != "."]
            if path.is_absolute() or ".." in parts or "\\" in name or "\0" in name or not parts:
                raise BundleError(
                    "the archive holds a path that leads outside.", hint="Pack the bundle's folder."
                )
            if not parts[-1].endswith(SUFFIXES):
                raise BundleError(
                    "the archive holds a file that does not belong in a bundle.",
                    hint=f"A bundle holds {', '.join(SUFFIXES)} files; tensors as safetensors only, never pickle.",
                )
            total, count = total + size, count + 1
            if total > max_bytes or count > MAX_FILES:
                raise BundleError(
                    f"the archive unpacks to more than {max_bytes} bytes or {MAX_FILES} files.",
                    hint="Register it on the server: bioseq models register.",
                )
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as out:
                _copy(handle, out, size)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise BundleError(
            f"the upload is not a readable tar or zip archive ({type(error).__name__}).",
            hint="Pack the bundle's folder with tar or zip.",
        ) from None
    found = [p.parent for p in folder.rglob("manifest.json")]
    if len(found) != 1:
        raise BundleError(f"the archive holds {len(found)} manifest.json; one is needed.")
    return found[0]


def _members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            for info in z.infolist():
                if info.is_dir():
                    continue
                kind = info.external_attr >> 28
                if kind not in (0, 8):  # a regular file, or no Unix mode at all
                    raise BundleError("the archive holds a link or a device.", hint="Pack plain files.")
                with z.open(info) as handle:
                    yield info.filename, info.file_size, handle
        return
    with tarfile.open(archive, "r:*") as t:
        for member in t:
            if member.isdir():
                continue
            if not member.isreg():
                raise BundleError("the archive holds a link or a device.", hint="Pack plain files.")
            data = t.extractfile(member)
            assert data is not None
            yield member.name, member.size, data


def _copy(source: IO[bytes], target: Any, size: int) -> None:
    """Exactly `size` bytes: a zip entry may hold more than it says."""
    left = size
    while left > 0:
        block = source.read(min(left, 1 << 20))
        if not block:
            raise EOFError
        target.write(block)
        left -= len(block)
    if source.read(1):
        raise BundleError("an entry of the archive is larger than it says.")


def inside(path: str, roots: tuple[str, ...]) -> Path:
    """`path` resolved, if it lies inside one of the roots. Raises `BundleError`."""
    resolved = Path(path).resolve()
    for root in roots:
        if resolved.is_relative_to(Path(root).resolve()):
            return resolved
    allowed = ", ".join(roots) or "none are set"
    raise BundleError(
        f"the path lies outside the server's roots ({allowed}).",
        hint="Upload an archive, or start with --root DIR.",
    )

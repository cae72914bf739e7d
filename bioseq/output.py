"""Writing results: everything under a temporary name beside the target, synced, then renamed.

A full disk, a missing permission or a kill leaves nothing under the final name; nothing is overwritten
unless asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bioseq.errors import OutputError


def _explain(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {path}: {error.strerror or error}.",
        hint="Check the free space and the permissions, or choose another place with -o.",
    )


def check_free(path: Path, *, force: bool) -> None:
    """Raise `OutputError` if `path` exists and may not be replaced, or its folder cannot be written."""
    _recover(path)
    if path.exists() and not force:
        raise OutputError(
            f"{path} exists already.", hint="Choose another name, or pass --force to replace it."
        )
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write into {parent}.", hint="Choose another place with -o.")


@contextlib.contextmanager
def whole_stdout() -> Iterator[Path]:
    """Yields a temporary path; on success its text goes to standard output, on any error nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        yield path
        with open(path, encoding="utf-8") as handle:
            shutil.copyfileobj(handle, sys.stdout)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_file(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, on any error it is removed."""
    path = Path(path)
    check_free(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(fd)
    except OSError as error:
        raise _explain(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _explain(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """The same for a folder; with `force` an existing one is replaced whole."""
    path = Path(path)
    check_free(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    except OSError as error:
        raise _explain(path, error) from error
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
                os.chmod(file, 0o644)
        os.chmod(temporary, 0o755)
        _swap(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _explain(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Give `new` the name `path`. An old folder trades names with it in one step where the system can; elsewhere it
    steps aside first, as deleting it may take long, and `_recover` mends a kill in between."""
    if not path.exists():
        os.replace(new, path)
        return
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file has this name")
    if _exchange(new, path):
        return  # the old one now has the temporary name, which is removed
    old = _aside(path)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Whether the two names were exchanged (renameat2 of Linux, which some file systems refuse)."""
    here, exchange = -100, 2
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _recover(path: Path) -> None:
    """Bring back the folder that a kill between two renames left aside."""
    if not path.exists() and _aside(path).is_dir():
        os.replace(_aside(path), path)

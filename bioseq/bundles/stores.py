"""Where a registry lies: a local folder, or object storage through pyarrow's file systems.

Both hold `index.json` (small, replaced atomically) and `blobs/HASH/` (bundle folders, never changed), and both
give a lock for read-change-write of the index. Readers take no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from bioseq.errors import OutputError, RegistryError
from bioseq.output import atomic_file, atomic_folder, sync_folder

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

LOCK_SECONDS = 60.0  # how long a writer waits for others
LEASE_SECONDS = 120.0  # an object-storage lock older than this belongs to a writer that died
_OBJECT_STORES = ("s3", "gcs", "abfs")  # there a put is atomic by itself


class Store(Protocol):
    where: str

    def read(self, name: str) -> bytes | None: ...
    def write(self, name: str, data: bytes) -> None: ...
    def lock(self) -> contextlib.AbstractContextManager[None]: ...
    def stamp(self, name: str) -> str: ...
    def has_blob(self, digest: str) -> bool: ...
    def put_blob(self, digest: str, folder: Path) -> None: ...
    def drop_blob(self, digest: str) -> None: ...
    def blob_path(self, digest: str) -> str: ...
    def fetch(self, digest: str) -> Path: ...
    def read_blob(self, digest: str, name: str) -> bytes | None: ...


def open_store(home: str | Path | None) -> Store:
    """The store at `home`: a folder, a URL, or None for $BIOSEQ_HOME, else ~/.local/share/bioseq."""
    home = home if home is not None else os.environ.get("BIOSEQ_HOME") or "~/.local/share/bioseq"
    text = str(home)
    if isinstance(home, Path) or "://" not in text:
        return FolderStore(Path(home).expanduser())
    if text.startswith("file://"):
        return FolderStore(Path(unquote(urlsplit(text).path)))
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    try:
        filesystem, root = FileSystem.from_uri(text)
    except (ArrowException, OSError, ValueError) as error:
        raise RegistryError(
            f"cannot open the registry at {text}: {error}.",
            hint="Give a folder, or a URL such as s3://bucket/folder or gs://bucket/folder.",
        ) from error
    return ObjectStore(filesystem, root, text)


@contextlib.contextmanager
def _placed(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target`, whose name is a hash of its content. Another process may have placed
    it first, and others may be reading that one: then it stays, and ours is dropped."""
    for left in target.parent.glob(".*.part"):  # what a killed process left half copied
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left)
    staging = target.parent / f".{uuid.uuid4().hex}.part"
    try:
        with atomic_folder(staging) as temporary:
            yield temporary
        try:
            os.rename(staging, target)  # fails if a folder with files has the name
            sync_folder(target.parent)
        except OSError as error:
            if not (target / "manifest.json").is_file():
                raise OutputError(f"cannot write {target}: {error.strerror}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class FolderStore:
    """A folder. The lock is flock on `.lock`: the kernel frees it when its holder dies."""

    def __init__(self, root: Path):
        self.root = root
        self.where = str(root)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RegistryError(f"cannot read {self.root / name}: {error.strerror}.") from error

    def write(self, name: str, data: bytes) -> None:
        with atomic_file(self.root / name, force=True) as temporary:
            temporary.write_bytes(data)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(
                f"cannot write the registry at {self.root}: {error.strerror}.",
                hint="Set BIOSEQ_HOME to a folder that you may write.",
            ) from error
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise _busy(self.where) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(fd)

    def stamp(self, name: str) -> str:
        try:
            stat = (self.root / name).stat()
        except OSError:
            return "none"
        return f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"

    def _blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest.removeprefix("sha256:")

    def has_blob(self, digest: str) -> bool:
        return (self._blob(digest) / "manifest.json").is_file()

    def put_blob(self, digest: str, folder: Path) -> None:
        with _placed(self._blob(digest)) as temporary:
            shutil.copytree(  # copyfile: the source's files may be read-only
                folder,
                temporary,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns(".*"),
                copy_function=shutil.copyfile,
            )

    def drop_blob(self, digest: str) -> None:
        shutil.rmtree(self._blob(digest), ignore_errors=True)

    def blob_path(self, digest: str) -> str:
        return str(self._blob(digest))

    def fetch(self, digest: str) -> Path:
        if not self.has_blob(digest):
            raise _lost(self.where, digest)
        return self._blob(digest)

    def read_blob(self, digest: str, name: str) -> bytes | None:
        """One file of a bundle, alone."""
        return self.read(str(self._blob(digest).relative_to(self.root) / name))


class ObjectStore:
    """A `pyarrow.fs.FileSystem`; bundles are fetched into a local cache, named by their content hash.

    Object storage has no lock of its own. A writer puts a ticket under locks/, lists them, and holds the lock
    only if its ticket is alone; otherwise it withdraws and tries again after a random pause. With listings
    that see every earlier put (S3, GCS, Azure) two writers cannot both hold it; the one exception is a writer
    that sleeps inside the lock for longer than the lease, after which others take it for dead.
    """

    def __init__(self, filesystem: FileSystem, root: str, where: str = "", *, cache: Path | None = None):
        self.fs, self.root = filesystem, root.rstrip("/")
        self.where = where or f"{filesystem.type_name}:{root}"
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bioseq" / "blobs"
        self.cache = cache or Path(os.environ.get("BIOSEQ_CACHE") or default)

    def _at(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def _info(self, path: str):  # -> pyarrow.fs.FileInfo
        try:
            return self.fs.get_file_info(path)
        except OSError as error:
            raise self._failed("reach", error) from error

    def _failed(self, what: str, error: Exception) -> RegistryError:
        return RegistryError(
            f"cannot {what} the registry at {self.where}: {error}.",
            hint="Check the URL, the network and the credentials.",
        )

    def read(self, name: str) -> bytes | None:
        try:
            with self.fs.open_input_stream(self._at(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed("read", error) from error

    def _put(self, path: str, data: bytes) -> None:
        self.fs.create_dir(path.rpartition("/")[0], recursive=True)
        direct = self.fs.type_name in _OBJECT_STORES
        target = path if direct else f"{path}.{uuid.uuid4().hex}.part"
        with self.fs.open_output_stream(target) as stream:
            stream.write(data)
        if not direct:
            self.fs.move(target, path)

    def write(self, name: str, data: bytes) -> None:
        try:
            self._put(self._at(name), data)
            self._put(self._at(f"{name}.stamp"), uuid.uuid4().hex.encode())
        except OSError as error:
            raise self._failed("write", error) from error

    def _tickets(self) -> dict[str, float]:
        from pyarrow.fs import FileSelector

        found = self.fs.get_file_info(FileSelector(self._at("locks"), allow_not_found=True))
        return {info.base_name: info.mtime_ns or 0 for info in found if not info.base_name.endswith(".part")}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        mine = uuid.uuid4().hex
        path = self._at("locks", mine)
        deadline = time.monotonic() + LOCK_SECONDS
        try:
            while True:
                self._put(path, b"held\n")
                tickets = self._tickets()
                others = {name: age for name, age in tickets.items() if name != mine}
                # ages by the store's own clock: hosts' clocks may differ
                now = tickets.get(mine, 0.0)
                for name in [n for n, t in others.items() if now - t > LEASE_SECONDS * 1e9]:
                    with contextlib.suppress(OSError):
                        self.fs.delete_file(self._at("locks", name))
                    del others[name]
                if not others and mine in tickets:
                    break
                self.fs.delete_file(path)
                if time.monotonic() > deadline:
                    raise _busy(self.where)
                time.sleep(random.uniform(0.02, 0.3))
        except OSError as error:
            raise self._failed("lock", error) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self.fs.delete_file(path)

    def stamp(self, name: str) -> str:
        # A small file that every write makes anew: a modification time of one-second resolution could hide a change.
        # Time and size tell of a writer that died before it, and of one that knows nothing of stamps.
        info = self._info(self._at(name))
        own = self.read(f"{name}.stamp") or b""
        return f"{info.mtime_ns}-{info.size}-{own.decode('ascii', 'replace')}"

    def read_blob(self, digest: str, name: str) -> bytes | None:
        """One file of a bundle, alone: from the cache if it is there, else from the store."""
        cached = self.cache / digest.removeprefix("sha256:") / name
        return (
            cached.read_bytes()
            if cached.is_file()
            else self.read(f"blobs/{digest.removeprefix('sha256:')}/{name}")
        )

    def has_blob(self, digest: str) -> bool:
        return self._info(self._blob(digest, "manifest.json")).is_file

    def _blob(self, digest: str, *parts: str) -> str:
        return self._at("blobs", digest.removeprefix("sha256:"), *parts)

    def put_blob(self, digest: str, folder: Path) -> None:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        files.sort(key=lambda p: p.name == "manifest.json")  # last: where it is, the blob is whole
        try:
            for file in files:
                target = self._blob(digest, *file.relative_to(folder).parts)
                self.fs.create_dir(target.rpartition("/")[0], recursive=True)
                with open(file, "rb") as source, self.fs.open_output_stream(target) as sink:
                    shutil.copyfileobj(source, sink, 8 << 20)
        except OSError as error:
            raise self._failed("write", error) from error

    def drop_blob(self, digest: str) -> None:
        with contextlib.suppress(OSError):
            self.fs.delete_file(self._blob(digest, "manifest.json"))
            self.fs.delete_dir(self._blob(digest))

    def blob_path(self, digest: str) -> str:
        return f"{self.where.rstrip('/')}/blobs/{digest.removeprefix('sha256:')}"

    def fetch(self, digest: str) -> Path:
        from pyarrow.fs import FileSelector

        target = self.cache / digest.removeprefix("sha256:")
        if (target / "manifest.json").is_file():
            return target
        if not self.has_blob(digest):
            raise _lost(self.where, digest)
        root = self._blob(digest)
        with _placed(target) as temporary:
            try:
                for info in self.fs.get_file_info(FileSelector(root, recursive=True)):
                    if info.is_file:
                        file = temporary / info.path[len(root) :].lstrip("/")
                        file.parent.mkdir(parents=True, exist_ok=True)
                        with self.fs.open_input_stream(info.path) as source, open(file, "wb") as sink:
                            shutil.copyfileobj(source, sink, 8 << 20)
            except FileNotFoundError:
                raise _lost(self.where, digest) from None
        return target


def _busy(where: str) -> RegistryError:
    return RegistryError(
        f"the registry at {where} has been locked by another writer for {LOCK_SECONDS:.0f} s.",
        hint="Try again; if nothing is writing, look for a hung bioseq process.",
        code="registry.busy",
    )


def _lost(where: str, digest: str) -> RegistryError:
    return RegistryError(
        f"the registry at {where} lists {digest}, but its files are gone.",
        hint="Remove that version and register the bundle again.",
    )

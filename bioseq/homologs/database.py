"""The searchable form of a reference set: MMseqs2's database and index, and its residues as numbers.

Built once a computer into `$BIOSEQ_HOME/homologs/HASH-VERSION/`, under a lock that ends with the process that
holds it, in a temporary folder that is renamed when it is whole. So a kill leaves nothing that is taken for a
database, and of several processes one builds while the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from bioseq.errors import OutputError, ReferenceSetError
from bioseq.homologs.mmseqs import PROTEINS, default_threads, mmseqs_version, need_mmseqs, run_mmseqs
from bioseq.homologs.reference import ReferenceSet, homologs_home
from bioseq.progress import Progress

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
OTHER, GAP = 20, 21
CODES = np.full(256, OTHER, dtype=np.uint8)
for _code, _letter in enumerate(LETTERS):
    CODES[ord(_letter)] = CODES[ord(_letter.lower())] = _code
_SMALL = 20_000_000  # residues up to which words of five cost less than the table of words of six
_LARGE = 2_000_000_000  # residues above which the index is too big to keep (about 20 bytes a residue)
_READY = "ready.json"
_FORMAT = "2"  # of what is built; databases of another one are built again


class Database:
    """An opened database. `codes` uint8 [residues], sequence k at `offsets[k]:offsets[k + 1]`."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.target = folder / "db"

    @property
    def indexed(self) -> bool:
        return (self.folder / "db.idx").exists()

    @cached_property
    def codes(self) -> np.ndarray:
        return np.memmap(self.folder / "codes.bin", dtype=np.uint8, mode="r")

    @cached_property
    def offsets(self) -> np.ndarray:
        return np.load(self.folder / "offsets.npy", mmap_mode="r")

    @cached_property
    def _ids(self) -> tuple[np.ndarray, np.ndarray]:
        ids = np.memmap(self.folder / "ids.bin", dtype=np.uint8, mode="r")
        return ids, np.load(self.folder / "id_offsets.npy", mmap_mode="r")

    def id(self, key: int) -> str:
        """The id of sequence `key`."""
        text, at = self._ids
        return text[at[key] : at[key + 1] - 1].tobytes().decode()

    def check(self) -> None:
        """Raise `ReferenceSetError` where it was removed."""
        if not (self.folder / _READY).exists():
            raise ReferenceSetError(
                f"the database of reference set {self.name!r} was removed while it was in use.",
                code="homologs.removed",
                hint="Run again; it is then built anew.",
            )


def open_database(reference: ReferenceSet, *, quiet: bool = False) -> Database:
    """The database of a reference set, built now if this computer has none.

    Raises `ReferenceSetError` (wrong hash, removed), `OutputError` (full disk), `SearchError`, `MissingExtraError`.
    """
    version = hashlib.sha256(f"{_FORMAT} {mmseqs_version(need_mmseqs())}".encode()).hexdigest()[:8]
    home = homologs_home()
    name = f"{reference.hash[:24]}-{version}"
    folder = home / name
    if not (folder / _READY).exists():
        with _lock(home / f"{name}.lock", reference.name, quiet):
            if not (folder / _READY).exists():
                for left in home.glob(f"{name}.part-*"):  # of a build that was killed: we hold the lock
                    shutil.rmtree(left, ignore_errors=True)
                part = home / f"{name}.part-{os.getpid()}"
                try:
                    part.mkdir(mode=0o700)
                    _build(reference, part, quiet)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(part, folder)
                except OSError as error:
                    raise OutputError(
                        f"cannot write the database of {reference.name!r} into {home}: {error.strerror}.",
                        hint="Free some space, or set BIOSEQ_HOME to another disk.",
                    ) from error
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    return Database(folder, reference.name)


def remove_database(reference_hash: str) -> None:
    """Remove what was built here of the reference set with this hash. A search in it fails with `homologs.removed`."""
    for folder in homologs_home().glob(f"{reference_hash[:24]}-*"):
        if folder.is_dir():
            (folder / _READY).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(path: Path, name: str, quiet: bool) -> Iterator[None]:
    try:
        handle = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}.", hint="Set BIOSEQ_HOME to a folder that you may write."
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not quiet:
                print(f"homologs: another process prepares {name!r}; waiting for it", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(reference: ReferenceSet, folder: Path, quiet: bool) -> None:
    manifest = reference.manifest
    if not quiet:
        print(
            f"homologs: preparing reference set {reference.name!r} ({manifest.sequences} sequences) for searches; "
            "this happens once",
            file=sys.stderr,
        )
    fasta = folder / "all.fasta"
    with Progress(3, f"preparing {reference.name}", unit="steps", enabled=not quiet) as bar:
        _unpack(reference, folder, fasta)
        bar.add()
        run_mmseqs(["createdb", fasta, folder / "db", "--shuffle", "0", *PROTEINS], folder=folder)
        fasta.unlink()
        bar.add()
        if manifest.residues <= _LARGE:
            size = "5" if manifest.residues < _SMALL else "6"
            run_mmseqs(
                ["createindex", folder / "db", folder / "tmp", "-k", size],
                folder=folder,
                threads=default_threads(),
            )
            shutil.rmtree(folder / "tmp", ignore_errors=True)
        bar.add()
    for file in folder.iterdir():
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
    (folder / _READY).write_text(json.dumps({"name": reference.name, "hash": reference.hash}))


def _unpack(reference: ReferenceSet, folder: Path, fasta: Path) -> None:
    """The sequences three times over: for MMseqs2 under their number, as codes, and their ids."""
    lengths, id_lengths = [], []
    with (
        open(fasta, "wb") as text,
        open(folder / "codes.bin", "wb") as codes,
        open(folder / "ids.bin", "wb") as ids,
    ):
        for key, record in enumerate(reference.records()):
            residues = record.sequence.encode()
            text.write(b">%d\n%s\n" % (key, residues))
            codes.write(CODES[np.frombuffer(residues, np.uint8)].tobytes())
            name = record.id.encode() + b"\n"
            ids.write(name)
            lengths.append(len(residues))
            id_lengths.append(len(name))
    for file, counts in (("offsets.npy", lengths), ("id_offsets.npy", id_lengths)):
        np.save(folder / file, np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))]))

"""Reading what a corpus is made of: FASTA (plain, gzip), or text with one sequence a line (plain, gzip, xz).

The text path needs neither Biopython nor Ray. A text source may have a parallel file with one cluster number
a line; in FASTA the cluster is the header's `cluster=NAME`.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bioseq.errors import FastaError, InputError

_DAMAGED = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"


def open_any(path: str | Path) -> IO[bytes]:
    """A file's bytes, unpacked by its magic number. Raises `InputError`."""
    try:
        with open(path, "rb") as handle:
            magic = handle.read(6)
        if magic[:2] == _GZIP:
            return gzip.open(path, "rb")  # type: ignore[return-value]
        if magic == _XZ:
            return lzma.open(path, "rb")
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def is_fasta(path: str | Path) -> bool:
    """FASTA begins with '>', after blank lines."""
    with open_any(path) as handle:
        for line in itertools.islice(handle, 100):
            if line.strip():
                return line.lstrip().startswith(b">")
    return False


def key_of(name: str) -> int:
    """A cluster's name as a non-negative 63-bit number: itself if it is one, else its hash."""
    if name.isascii() and name.isdigit() and len(name) < 18:
        return int(name)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def read_source(path: str | Path, clusters: str | Path | None = None) -> Iterator[tuple[str, int, str]]:
    """(sequence, cluster number or -1, "file:line") of every record, as a stream.

    Raises `InputError` for a file that cannot be read, or a cluster file of another length.
    """
    if is_fasta(path):
        if clusters is not None:
            raise InputError(
                f"{path} is FASTA; a cluster file goes with text sources only.",
                hint="Write cluster=NAME into the headers.",
            )
        yield from _fasta(path)
    else:
        yield from _text(path, clusters)


def _fasta(path: str | Path) -> Iterator[tuple[str, int, str]]:
    # Not `bioseq.sequences.fasta`: its records carry no header, where the cluster stands, and it needs Biopython.
    parts: list[str] = []
    cluster, where = -1, 0
    try:
        with open_any(path) as handle:
            for at, raw in enumerate(handle, start=1):
                line = raw.strip()
                if line.startswith(b">"):
                    if where:
                        yield _joined(parts, path, where), cluster, f"{path}:{where}"
                    parts, cluster, where = [], -1, at
                    for word in line.decode("utf-8", "replace").split():
                        if word.startswith("cluster="):
                            cluster = key_of(word[8:])
                elif line:
                    if not where:
                        raise FastaError("the first line is no header ('>').", file=str(path), line=at)
                    parts.append(line.decode("latin-1").replace(" ", ""))
    except _DAMAGED as error:
        raise FastaError(f"the compressed file is damaged: {error}.", file=str(path)) from error
    if where:
        yield _joined(parts, path, where), cluster, f"{path}:{where}"


def _joined(parts: list[str], path: str | Path, line: int) -> str:
    if not parts:
        raise FastaError("a record without sequence.", file=str(path), line=line)
    return "".join(parts)


def _text(path: str | Path, clusters: str | Path | None) -> Iterator[tuple[str, int, str]]:
    try:
        with open_any(path) as handle:
            numbers = open_any(clusters) if clusters is not None else None
            for at, line in enumerate(handle, start=1):
                sequence = line.strip().decode("latin-1")
                cluster = -1
                if numbers is not None:
                    text = numbers.readline().strip()
                    if not text:
                        raise InputError(f"{clusters} ends before line {at} of {path}.")
                    cluster = key_of(text.decode("latin-1"))
                if sequence:
                    yield sequence, cluster, f"{path}:{at}"
            if numbers is not None:
                if numbers.readline().strip():
                    raise InputError(f"{clusters} has more lines than {path}.")
                numbers.close()
    except _DAMAGED as error:
        raise FastaError(f"the compressed file is damaged: {error}.", file=str(path)) from error

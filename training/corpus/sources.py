"""Reading what a corpus is made of: FASTA, or text with one sequence a line, plain or compressed.

A text source may have a parallel file with one cluster number a line; in FASTA the cluster is the header's
`cluster=NAME`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Generator, Iterator
from pathlib import Path

from bioseq.compression import DAMAGED, HEAD_BYTES, compression, unpacked
from bioseq.errors import FastaError, InputError
from bioseq.sequences.fasta import read_fasta


def lines_of(path: str | Path) -> Generator[bytes]:
    """The lines of a file, unpacked. Raises `InputError`."""
    try:
        raw = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    with raw:
        kind = compression(raw.read(HEAD_BYTES))
        raw.seek(0)
        try:
            yield from unpacked(raw, kind)
        except DAMAGED as error:
            raise FastaError(f"the {kind} file is damaged: {error}.", file=str(path)) from error


def is_fasta(path: str | Path) -> bool:
    """FASTA begins with '>', after blank lines."""
    with contextlib.closing(lines_of(path)) as lines:
        first = next((line for line in itertools.islice(lines, 100) if line.strip()), b"")
    return first.lstrip().startswith(b">")


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
    for record in read_fasta(path):
        names = [w[8:] for w in record.description.split() if w.startswith("cluster=")]
        yield record.sequence, key_of(names[-1]) if names else -1, record.source


def _text(path: str | Path, clusters: str | Path | None) -> Iterator[tuple[str, int, str]]:
    numbers = lines_of(clusters) if clusters is not None else None
    for at, line in enumerate(lines_of(path), start=1):
        sequence = line.strip().decode("latin-1")
        cluster = -1
        if numbers is not None:
            text = next(numbers, b"").strip()
            if not text:
                raise InputError(f"{clusters} ends before line {at} of {path}.")
            cluster = key_of(text.decode("latin-1"))
        if sequence:
            yield sequence, cluster, f"{path}:{at}"
    if numbers is not None and next(numbers, b"").strip():
        raise InputError(f"{clusters} has more lines than {path}.")

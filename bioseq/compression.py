"""Compressed files: gzip, bzip2 and xz, told by their first bytes and never by their name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

HEAD_BYTES = 6  # what `compression` must see of a file
#: What reading a damaged file raises, beside a plain OSError from bzip2; EOFError means that it breaks off.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)

_FORMATS: tuple[tuple[bytes, str, Callable[[IO[bytes]], Any]], ...] = (
    (b"\x1f\x8b", "gzip", lambda handle: gzip.GzipFile(fileobj=handle)),
    (b"BZh", "bzip2", bz2.BZ2File),
    (b"\xfd7zXZ\x00", "xz", lzma.LZMAFile),
)


def compression(head: bytes) -> str | None:
    """`gzip`, `bzip2` or `xz` by a file's first bytes, None for any other file."""
    return next((name for magic, name, _ in _FORMATS if head.startswith(magic)), None)


def unpacked(handle: IO[bytes], kind: str | None) -> IO[bytes]:
    """A reader of the unpacked bytes of `handle`, which stands at its first byte and is closed by the caller."""
    for _, name, opened in _FORMATS:
        if name == kind:
            return opened(handle)
    return handle


def unpack(data: bytes) -> bytes:
    """A whole file's bytes, unpacked."""
    return unpacked(io.BytesIO(data), compression(data)).read()

"""Records in: FASTA files, plain, compressed or standard input, streamed one record at a time.

Concept: a `Record` is an id (the first word of the header), the sequence, and where it came from. Reading never
holds more than one record, so a library of a million records costs no more memory than one of ten. A plain file
can be read in byte ranges by several readers: a record belongs to the range that holds the '>' of its header, so
any cut of a file gives every record exactly once and in order.

What is accepted: LF and CRLF, blank lines, lower case (kept here, folded by the alphabet), spaces in sequence
lines, a missing newline at the end, a UTF-8 byte order mark, compressed files of several members. What is refused, with file
and line: see `read_fasta`. Comment lines (';') are refused: half of the tools read them as residues.

Ids are kept as they are: duplicates are not merged, and a header without a word gives the id "" (an invented name
could collide with a real one). An id never names a file.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bioseq.compression import DAMAGED, HEAD_BYTES, compression, unpacked
from bioseq.errors import FastaError

_BOM = b"\xef\xbb\xbf"
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (b"PAR1", "a Parquet file"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"@", "a FASTQ file, perhaps"),
)
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One sequence. `source` is "file:line" of the header ("file@byte" when read by byte range), or "";
    `description` is what follows the id in the header."""

    id: str
    sequence: str
    source: str = ""
    description: str = field(default="", compare=False)


def read_fasta(
    path: str | Path, *, start: int | None = None, end: int | None = None, allow_empty: bool = False
) -> Iterator[Record]:
    """Stream the records of a FASTA file, in file order. "-" is standard input; gzip,
    bzip2 and xz are seen by their first bytes.

    `start` and `end` are bytes of a plain file: the records whose '>' lies in [start, end). `allow_empty` yields
    a record without residues (sequence "") instead of raising, for callers that report and skip bad records.

    Raises `FastaError` with file and line: missing file, folder, empty file, a first line that is not a header,
    record without sequence, binary noise, text that is not UTF-8, comment lines, bare carriage returns, and a
    compressed file that breaks off or is damaged (naming the last whole record).
    """
    name = "stdin" if str(path) == "-" else os.fspath(path)
    ranged = start is not None or end is not None
    first, last = start or 0, end
    if first < 0 or (last is not None and last < first):
        raise ValueError(f"byte range [{start}, {end}) is not a range")
    raw, kind = _open(name, stdin=str(path) == "-")
    with raw:
        if kind and ranged:
            if first > 0 or (last is not None and last < os.path.getsize(name)):
                raise FastaError(
                    f"a {kind} file cannot be read by byte ranges.",
                    file=name,
                    hint="Read it whole, or unpack it first.",
                )
            ranged, last = False, None
        if ranged and str(path) == "-":
            raise FastaError("standard input cannot be read by byte ranges.", file=name)
        lines = _Lines(unpacked(raw, kind), name, first, last, kind)
        yield from _records(lines, name, ranged, allow_empty)


def read_stream(
    handle: IO[bytes], name: str, *, start: int = 0, end: int | None = None, allow_empty: bool = False
) -> Iterator[Record]:
    """`read_fasta` for a seekable reader that is already open, such as one of an object store. `name` is what
    errors and sources call it; the caller closes it."""
    kind = compression(handle.read(HEAD_BYTES))
    handle.seek(0)
    if kind and (start or end is not None):
        raise FastaError(f"a {kind} file cannot be read by byte ranges.", file=name, hint="Read it whole.")
    ranged = bool(start) or end is not None
    yield from _records(_Lines(unpacked(handle, kind), name, start, end, kind), name, ranged, allow_empty)


def read_many(paths: Iterable[str | Path], *, allow_empty: bool = False) -> Iterator[Record]:
    """The records of several files, one file after another. Errors as in `read_fasta`."""
    for path in paths:
        yield from read_fasta(path, allow_empty=allow_empty)


def count_records(path: str | Path) -> int:
    """How many headers a file has: a scan for '>' at line starts, with no parsing and no checks of the content."""
    name = os.fspath(path)
    raw, kind = _open(name, stdin=False)
    count, before = 0, b"\n"
    with raw:
        handle = unpacked(raw, kind)
        try:
            while chunk := handle.read(_CHUNK):
                if before == b"\n" and chunk.startswith(_BOM):
                    chunk = chunk[len(_BOM) :] or b" "
                count += chunk.count(b"\n>") + (before == b"\n" and chunk.startswith(b">"))
                before = chunk[-1:]
        except DAMAGED as error:
            raise FastaError(f"the {kind} file breaks off or is damaged ({error}).", file=name) from error
        except OSError as error:
            raise FastaError(f"cannot be read: {error.strerror or error}.", file=name) from error
    return count


class _Replay(io.RawIOBase):
    """A stream whose first bytes were already taken: standard input cannot seek."""

    def __init__(self, head: bytes, rest: IO[bytes]):
        self._head = head
        self._read = getattr(rest, "read1", rest.read)  # read1: what has come, without waiting for more

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._head[: len(buffer)] or self._read(len(buffer))
        self._head = self._head[len(data) :] if self._head else b""
        buffer[: len(data)] = data
        return len(data)


def _open(name: str, *, stdin: bool) -> tuple[IO[bytes], str | None]:
    """A binary reader at its first byte, and how the file is compressed."""
    if stdin:
        head = sys.stdin.buffer.read(HEAD_BYTES)
        return io.BufferedReader(_Replay(head, sys.stdin.buffer), _CHUNK), compression(head)
    if os.path.isdir(name):
        raise FastaError("this is a folder.", file=name, hint="Give a FASTA file.")
    try:
        handle = open(name, "rb", buffering=_CHUNK)  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise FastaError(f"cannot be read: {error.strerror}.", file=name, hint="Check the path.") from error
    head = handle.read(HEAD_BYTES)
    if not handle.seekable():
        return io.BufferedReader(_Replay(head, handle), _CHUNK), compression(head)
    handle.seek(0)
    return handle, compression(head)


class _Lines:
    """Decoded lines of one file or range, counted; `headers` queues (line, byte) of the headers handed out."""

    def __init__(self, handle: IO[bytes], name: str, start: int, end: int | None, kind: str | None):
        self.handle, self.name, self.start, self.end, self.kind = handle, name, start, end, kind
        self.headers: deque[tuple[int, int]] = deque()
        self.line = 0  # counted from `start`; `fault` adds what lies before
        self.done: tuple[int, str] | None = None  # number and id of the last whole record

    def fault(self, message: str, *, line: int | None = None, hint: str | None = None) -> FastaError:
        before = 0
        if self.start:
            # Only the error path pays for counting the lines before a byte range.
            with contextlib.suppress(OSError), open(self.name, "rb") as handle:  # OSError: a URL's name
                left = self.start
                while left and (chunk := handle.read(min(left, _CHUNK))):
                    before += chunk.count(b"\n")
                    left -= len(chunk)
        return FastaError(message, file=self.name, line=before + (line or self.line or 1), hint=hint)

    def __iter__(self) -> Iterator[str]:
        at = self.start
        inside = ended = False
        if at:
            # One byte back: at a line start this takes only the newline before it.
            self.handle.seek(at - 1)
            skipped = self._next()
            at += len(skipped) - 1
            self.line = 1 if len(skipped) > 1 else 0
        while self.end is None or at < self.end or inside:
            raw = self._next()
            if not raw:
                ended = True
                break
            self.line += 1
            offset, at = at, at + len(raw)
            if offset == 0 and raw.startswith(_BOM):
                raw = raw[len(_BOM) :]
            if raw[:1] == b">":
                if self.end is not None and offset >= self.end:
                    return
                inside = True
                self.headers.append((self.line, offset))
            elif not inside:
                # Before the first header: another range's residues, or no FASTA at all.
                if raw.strip() and not self.start:
                    raise self._not_fasta(raw)
                continue
            elif raw[:1] == b";":
                raise self.fault(
                    "a comment line (';').", hint="Remove comment lines; descriptions go in the header."
                )
            yield self._decode(raw)
        if ended and not inside and not self.start:
            raise FastaError("the file is empty.", file=self.name, hint="Give a FASTA file with records.")

    def _next(self) -> bytes:
        try:
            return self.handle.readline()
        except EOFError as error:
            raise self.fault(
                f"the {self.kind} file breaks off {self._after()}.",
                hint="It is not whole: fetch or pack it again.",
            ) from error
        except DAMAGED as error:
            raise self.fault(
                f"the {self.kind} file is damaged {self._after()} ({error}).", hint="Fetch or pack it again."
            ) from error
        except OSError as error:
            raise self.fault(f"cannot be read: {error.strerror or error}.") from error

    def _after(self) -> str:
        return (
            f"after record {self.done[0]} ({self.done[1]!r})"
            if self.done
            else "before the first whole record"
        )

    def _not_fasta(self, raw: bytes) -> FastaError:
        kind = next(
            (f" This looks like {what}." for magic, what in _OTHER_FORMATS if raw.startswith(magic)), ""
        )
        return self.fault(f"not a FASTA file: the first line does not begin with '>'.{kind}")

    def _decode(self, raw: bytes) -> str:
        if b"\0" in raw:
            raise self.fault("binary data (a NUL byte).", hint="Give a text file in FASTA form.")
        body = raw.rstrip(b"\r\n")
        if b"\r" in body:
            raise self.fault("a carriage return inside a line.", hint="Convert the line ends to LF or CRLF.")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(
                "bytes that are not UTF-8 text.", hint="Give a UTF-8 (or ASCII) text file."
            ) from None


def _records(lines: _Lines, name: str, ranged: bool, allow_empty: bool) -> Iterator[Record]:
    for number, (title, sequence) in enumerate(_parser()(iter(lines)), 1):
        line, offset = lines.headers.popleft()
        words = title.split(None, 1)
        source = f"{name}@{offset}" if ranged else f"{name}:{line}"
        record = Record(words[0] if words else "", sequence, source, words[1] if len(words) > 1 else "")
        if not sequence and not allow_empty:
            raise lines.fault(
                f"record {record.id!r} has no sequence.", line=line, hint="Remove it, or give it residues."
            )
        lines.done = (number, record.id)
        yield record


def _parser() -> Callable[[Iterator[str]], Iterator[tuple[str, str]]]:
    try:
        from Bio.SeqIO.FastaIO import SimpleFastaParser
    except ImportError:
        # The minimal GPU environment has no Biopython; a test holds the two equal.
        return _plain_parser
    return SimpleFastaParser


def _plain_parser(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """What Biopython's SimpleFastaParser does with lines whose first one is a header."""
    title: str | None = None
    parts: list[str] = []
    for line in lines:
        if line.startswith(">"):
            if title is not None:
                yield title, "".join(parts)
            title, parts = line[1:].rstrip(), []
        else:
            parts.append(line.rstrip().replace(" ", ""))
    if title is not None:
        yield title, "".join(parts)

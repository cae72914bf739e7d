"""Long answers: log lines as they come (server-sent events), and files by ranges."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import StreamingResponse

from serving.http.problems import Problem
from serving.jobs.folder import JobFolder
from serving.jobs.tables import ENDED

BLOCK = 1 << 18
POLL_S = 0.4
BEAT_S = 15.0


def read_log(folder: JobFolder, offset: int, limit: int = BLOCK) -> bytes:
    """Up to `limit` bytes of the log from `offset`; none if there is no log yet."""
    return _read(folder.log, offset, limit)


def _read(path: Path, offset: int, limit: int = BLOCK) -> bytes:
    try:
        with open(path, "rb") as handle:
            handle.seek(offset)
            return handle.read(limit)
    except FileNotFoundError:
        return b""


class _Metrics:
    """New whole lines of a pretraining run's metrics.jsonl. A resumed run may have shortened the file: then it is
    told from its end on."""

    def __init__(self, path: Path, *, from_end: bool):
        self.path = path
        self.at = self._size() if from_end else 0

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def new(self) -> list[bytes]:
        size = self._size()
        if size <= self.at:
            self.at = size
            return []
        whole, newline, _ = _read(self.path, self.at).rpartition(b"\n")
        self.at += len(whole) + len(newline)
        return [line for line in whole.split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]


async def follow(
    folder: JobFolder, look: Callable[[], Any], offset: int, draining: Callable[[], bool]
) -> AsyncIterator[bytes]:
    """The log from byte `offset` as events whose ids are byte offsets, so that `Last-Event-ID` goes on where a
    broken connection ended; `progress` events; of pretraining `metrics` events (loss, perplexity); and at the
    job's end one `end` event with state and reason.

    `look` gives the job's row; it blocks. When the service stops, the stream ends without `end`.
    """
    rest, told, quiet = b"", None, 0.0
    metrics = _Metrics(folder.output / "metrics.jsonl", from_end=offset > 0)
    yield b"retry: 2000\n\n"
    while True:
        row = await asyncio.to_thread(look)
        while piece := await asyncio.to_thread(read_log, folder, offset + len(rest)):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                yield _event(line, offset)
            if len(rest) > BLOCK:  # a line without end
                offset += len(rest)
                yield _event(rest, offset)
                rest = b""
        progress = await asyncio.to_thread(folder.progress)
        if progress is not None and progress != told:
            told, quiet = progress, 0.0
            yield b"event: progress\ndata: " + orjson.dumps(progress) + b"\n\n"
        for entry in await asyncio.to_thread(metrics.new):
            yield b"event: metrics\ndata: " + entry + b"\n\n"
        if row is None or row.state in ENDED:
            if rest:
                yield _event(rest, offset + len(rest))
            state = {"state": row.state, "reason": row.reason, "registered": row.registered} if row else {}
            yield b"event: end\ndata: " + orjson.dumps(state) + b"\n\n"
            return
        if draining():
            return
        await asyncio.sleep(POLL_S)
        quiet += POLL_S
        if quiet > BEAT_S:
            quiet = 0.0
            yield b": still here\n\n"


def _event(line: bytes, offset: int) -> bytes:
    text = line.replace(b"\r", b" ").decode("utf-8", "replace")
    return f"id: {offset}\ndata: {text}\n\n".encode()


_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def send_file(request: Request, path: Path, name: str, etag: str) -> StreamingResponse:
    """The file, or the one byte range that the request asks for (RFC 9110, 14). Raises `Problem` 404, 416.

    Sent to be saved, never to be shown: a result may hold HTML.
    """
    try:
        size, modified = path.stat().st_size, path.stat().st_mtime
    except OSError:
        raise Problem(404, "result.not_found", "there is no such file.") from None
    first, last = 0, size - 1
    status = 200
    asked = request.headers.get("range")
    condition = request.headers.get("if-range")
    found = _RANGE.fullmatch(asked.strip()) if asked and condition in (None, etag) else None
    if found and (found[1] or found[2]):
        status = 206
        if found[1]:
            first = int(found[1])
            last = min(int(found[2]), size - 1) if found[2] else size - 1
            if found[2] and int(found[2]) < first:
                status, first, last = 200, 0, size - 1  # no valid range: ignored
        else:
            first = max(size - int(found[2]), 0)
        if status == 206 and (first >= size or first > last):
            raise Problem(416, "range.not_satisfiable", f"the file has {size} bytes.", limit=size)
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Last-Modified": formatdate(modified, usegmt=True),
        "Content-Length": str(last - first + 1),
        "Content-Disposition": f'attachment; filename="{Path(name).name}"',
    }
    if status == 206:
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return StreamingResponse(
        _pieces(path, first, last + 1), status, headers=headers, media_type="application/octet-stream"
    )


async def _pieces(path: Path, at: int, end: int) -> AsyncIterator[bytes]:
    handle = await asyncio.to_thread(open, path, "rb")
    try:
        await asyncio.to_thread(handle.seek, at)
        while at < end:
            piece = await asyncio.to_thread(handle.read, min(BLOCK, end - at))
            if not piece:
                return  # cut short while it was read; the client sees the missing bytes
            at += len(piece)
            yield piece
    finally:
        handle.close()


def etag_of(path: Path) -> str:
    """Changes whenever the file does."""
    try:
        stat = os.stat(path)
    except OSError:
        raise Problem(404, "result.not_found", "there is no such file.") from None
    return f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'

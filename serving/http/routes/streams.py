"""Long answers: log lines as they come (server-sent events), and files by ranges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import FileResponse, MalformedRangeHeader, RangeNotSatisfiable

from serving.database.base import DatabaseUnavailable
from serving.jobs.folder import JobFolder
from serving.jobs.tables import ENDED
from serving.problems import Problem

BLOCK = 1 << 18
POLL_S = 0.4
BEAT_S = 15.0
_BINARY = "application/octet-stream"


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
    yield format_sse_event(retry=2000)
    while True:
        try:
            row, away = await asyncio.to_thread(look), False
        except DatabaseUnavailable:
            row, away = None, True  # the log goes on; how the job ended is told once the database is back
        while piece := await asyncio.to_thread(read_log, folder, offset + len(rest)):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                yield _line(line, offset)
            if len(rest) > BLOCK:  # a line without end
                offset += len(rest)
                yield _line(rest, offset)
                rest = b""
        progress = await asyncio.to_thread(folder.progress)
        if progress is not None and progress != told:
            told, quiet = progress, 0.0
            yield format_sse_event(event="progress", data_str=orjson.dumps(progress).decode())
        for entry in await asyncio.to_thread(metrics.new):
            yield format_sse_event(event="metrics", data_str=entry.decode())
        if not away and (row is None or row.state in ENDED):
            if rest:
                yield _line(rest, offset + len(rest))
            state = {"state": row.state, "reason": row.reason, "registered": row.registered} if row else {}
            yield format_sse_event(event="end", data_str=orjson.dumps(state).decode())
            return
        if draining():
            return
        await asyncio.sleep(POLL_S)
        quiet += POLL_S
        if quiet > BEAT_S:
            quiet = 0.0
            yield KEEPALIVE_COMMENT


def _line(line: bytes, offset: int) -> bytes:
    return format_sse_event(data_str=line.replace(b"\r", b" ").decode("utf-8", "replace"), id=str(offset))


class Download(FileResponse):
    """A file, or the byte range of it that the request asks for (RFC 9110, 14). It is sent to be saved and never to
    be shown, because a result may hold HTML. `etag` changes whenever the file does. Raises `Problem` 404."""

    max_ranges = 1  # a request for several is answered with the whole file

    def __init__(self, path: Path, name: str, etag: str | None = None):
        try:
            stat = path.stat()
        except OSError:
            raise Problem(404, "result.not_found", "there is no such file.") from None
        headers = {"ETag": etag} if etag else None
        super().__init__(path, headers=headers, media_type=_BINARY, filename=name, stat_result=stat)

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []  # ignored, as RFC 9110 says
        except RangeNotSatisfiable:
            raise Problem(
                416, "range.not_satisfiable", f"the file has {file_size} bytes.", limit=file_size
            ) from None

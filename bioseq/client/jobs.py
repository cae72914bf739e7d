"""Jobs and files of a service: sending work away and bringing it back.

    job = remote.submit("finetune", {"labels": "table.csv", "targets": ["stability"], "register": "stability"})
    for event in remote.follow(job["id"]):
        print(event)
    remote.result(job["id"], "out/")

Files of this machine that a spec names are uploaded first. Uploads and downloads carry checksums or go on
where they broke off; a submission carries a key of its own, so that trying again makes no second job. All calls
raise `ServiceError` with the server's status and code, and `SpecError` for a spec that the server refuses.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bioseq.client.answers import cut_off, json_of
from bioseq.client.exchange import Call, Connection, ask, exchange
from bioseq.client.job_files import places_of_files
from bioseq.errors import InputError, OutputError, ServiceError
from bioseq.specs.base import Spec

if TYPE_CHECKING:
    import httpx

ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
SERVERS = ("output", "address", "storage", "resume", "force", "cache")  # the server decides these


def _at(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


async def upload(at: Connection, path: str | Path, *, name: str | None = None) -> dict[str, Any]:
    """Upload a file; its `id` goes into specs as `file:ID`. `name` keeps the ending (.fasta, .csv.gz ...); without
    one it is the file's, letters that the server does not take made _. Raises `InputError` if it cannot be read."""
    path = Path(path)

    def look() -> tuple[str, int]:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest(), path.stat().st_size

    try:
        digest, size = await at.driver.work(look)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
    own = re.sub(r"[^A-Za-z0-9._+-]", "_", path.name)[-120:].lstrip("._+-")
    query = {"name": name or own, "sha256": digest}
    return await ask(at, Call("POST", "/v1/files", query=query, headers=headers, file=path))


async def files(at: Connection) -> list[dict[str, Any]]:
    """The files of this key, newest first."""
    return (await ask(at, Call("GET", "/v1/files")))["data"]


async def delete_file(at: Connection, file_id: str) -> None:
    await ask(at, Call("DELETE", f"/v1/files/{quote(file_id, safe='')}"))


async def submit(
    at: Connection,
    kind: str,
    spec: Spec | Mapping[str, Any],
    *,
    name: str | None = None,
    recipe: str | None = None,
    prepare: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> dict[str, Any]:
    """Submit a `pretrain`, `finetune`, `screen` or `propose` job; returns the job.

    `spec` has the fields of `bioseq KIND --spec FILE`, as a spec or a dict; where it writes is the server's
    to decide, so output and the like are left out. Inputs that are files here are uploaded. For pretrain,
    `recipe` names a recipe that `spec` changes, and `prepare` says how the corpus is prepared (clusters,
    valid, held_out, min_length, max_length, on_error).
    """
    data = spec.to_dict() if isinstance(spec, Spec) else spec
    given = {"name": name, "recipe": recipe, "prepare": prepare}
    body: dict[str, Any] = {
        "kind": kind,
        "spec": {k: copy.deepcopy(v) for k, v in data.items() if k not in SERVERS},
        **{k: copy.deepcopy(v) for k, v in given.items() if v is not None},
    }
    for holder, key in places_of_files(body):
        value = holder[key]
        if not value.startswith("file:") and os.path.isfile(value):
            holder[key] = f"file:{(await upload(at, value))['id']}"
    headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
    return await ask(at, Call("POST", "/v1/jobs", body, headers=headers))


async def jobs(
    at: Connection,
    *,
    state: str | None = None,
    kind: str | None = None,
    limit: int = 100,
    everyone: bool = False,
) -> list[dict[str, Any]]:
    """This key's jobs, newest first; `everyone` needs the scope admin."""
    asked = {"state": state, "kind": kind, "limit": str(limit), "all": "true" if everyone else None}
    query = {k: v for k, v in asked.items() if v is not None}
    return (await ask(at, Call("GET", "/v1/jobs", query=query)))["data"]


async def job(at: Connection, job_id: str) -> dict[str, Any]:
    return await ask(at, Call("GET", _at(job_id)))


async def cancel(at: Connection, job_id: str) -> dict[str, Any]:
    """Cancel a pending or running job. A running one ends a moment later: see `wait`."""
    return await ask(at, Call("DELETE", _at(job_id)))


async def purge(at: Connection, job_id: str) -> None:
    """Delete an ended job with its log and result."""
    await ask(at, Call("DELETE", _at(job_id), query={"purge": "true"}))


async def logs(at: Connection, job_id: str) -> str:
    """What the job has printed so far."""
    return await ask(
        at, Call("GET", f"{_at(job_id)}/logs"), lambda content: content.decode("utf-8", "replace")
    )


async def follow(at: Connection, job_id: str) -> AsyncGenerator[dict[str, Any], None]:
    """The job's log from its beginning, as it is written: {"event": "line", "line"}, {"event": "progress",
    "label", "done", "total", "unit", "fraction"}, of pretraining {"event": "metrics", "step", "loss", ...}, and
    last {"event": "end", "state", "reason", "registered"}. Goes on where a broken connection ended."""
    last: dict[str, str] = {}

    def make() -> Call:
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", **last}
        return Call("GET", f"{_at(job_id)}/logs", query={"follow": "true"}, headers=headers, timeout=60)

    async def read(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        async for event in _events(at.driver.pieces(response)):
            if place := event.pop("id", None):
                last["Last-Event-ID"] = place
            yield event
            if event.get("event") == "end":
                return
        raise cut_off("the log stopped before the end of the job")

    async with contextlib.aclosing(exchange(at, make, read)) as events:
        async for event in events:
            if event:
                yield event


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events (WHATWG HTML, 9.2); an empty one for a comment, which says that the server is there."""
    rest = b""
    event: dict[str, str] = {}
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace").removesuffix("\r")
            name, _, value = text.partition(":")
            if name:
                event[name] = value.removeprefix(" ")
            elif text:
                yield {}
            else:
                kind, data = event.get("event", "line"), event.get("data")
                if data is not None:
                    more = {"line": data} if kind == "line" else json_of(data)
                    yield {"event": kind, **({"id": event["id"]} if "id" in event else {}), **more}
                event = {}


async def wait(
    at: Connection, job_id: str, *, timeout: float | None = None, poll: float = 1.0
) -> dict[str, Any]:
    """The job once it has ended. Raises `ServiceError` (code job.timeout) after `timeout` seconds."""
    until = None if timeout is None else time.monotonic() + timeout
    while (found := await job(at, job_id))["state"] not in ENDED:
        if until is not None and time.monotonic() > until:
            raise ServiceError(f"job {job_id} is {found['state']} after {timeout:g} s.", code="job.timeout")
        await at.driver.sleep(poll)
    return found


async def result_files(at: Connection, job_id: str) -> list[dict[str, Any]]:
    """Name and bytes of each file of a job that has succeeded."""
    return (await ask(at, Call("GET", f"{_at(job_id)}/result")))["data"]


async def result(at: Connection, job_id: str, folder: str | Path) -> list[Path]:
    """Download the result into `folder`; call it again to go on where it broke off. Files that are there
    whole are left. Raises `OutputError`."""
    done = []
    for item in await result_files(at, job_id):
        parts = Path(item["name"]).parts
        if not parts or item["name"].startswith("/") or ".." in parts:
            raise ServiceError("the server named a file outside of the folder.", code="service.invalid")
        target = Path(folder).joinpath(*parts)
        if not (target.is_file() and target.stat().st_size == item["bytes"]):
            try:
                await _download(at, quote(item["href"]), target, int(item["bytes"]))
            except OSError as error:
                raise OutputError(f"cannot write {target}: {error.strerror or error}.") from error
        done.append(target)
    return done


async def _download(at: Connection, href: str, target: Path, size: int) -> None:
    """Through a part beside it, and a note of the ETag that the part belongs to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part, note = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.etag")

    def have() -> int:
        return part.stat().st_size if part.exists() and note.exists() else 0

    def make() -> Call:
        headers = {"Accept-Encoding": "identity"}
        if 0 < have() < size:
            headers |= {"Range": f"bytes={have()}-", "If-Range": note.read_text("ascii")}
        return Call("GET", href, headers=headers)

    async def read(response: httpx.Response) -> AsyncIterator[None]:
        note.write_text(response.headers.get("ETag", ""), "ascii")
        goes_on = response.status_code == 206
        with open(part, "ab" if goes_on else "wb") as out:
            async for piece in at.driver.pieces(response):
                await at.driver.work(out.write, piece)
                if goes_on:  # a file that begins anew each time makes no progress
                    yield None
        if part.stat().st_size != size:
            raise cut_off(f"{part.stat().st_size} of {size} bytes of {target.name} came")

    if not 0 < have() == size:
        async with contextlib.aclosing(exchange(at, make, read)) as progress:
            async for _ in progress:
                pass
    os.replace(part, target)
    note.unlink(missing_ok=True)

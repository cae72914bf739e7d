"""Jobs and files of a remote bioseq: the part of `bioseq.client.sync.Client` that sends work away and brings it back.

    remote = bioseq.connect("http://127.0.0.1:8000", api_key=...)
    job = remote.submit("finetune", {"labels": "table.csv", "targets": ["stability"], "register": "stability"})
    for event in remote.follow(job["id"]):
        print(event)
    remote.result(job["id"], "out/")

Files of this machine that a spec names are uploaded first. Uploads and downloads carry checksums or go on
where they broke off; a submission carries a key of its own, so that trying again makes no second job.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bioseq.client.remote import error_of
from bioseq.errors import InputError, OutputError, ServiceError, SpecError
from bioseq.specs.base import Spec

if TYPE_CHECKING:
    import httpx

ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
SERVERS = ("output", "address", "storage", "resume", "force", "cache")  # the server decides these
_INPUTS = {"pretrain": ("corpus",), "finetune": ("labels", "residue_labels", "residue_mask", "wild_type")}
_BLOCK = 1 << 20


class JobsMixin:
    """Methods of `Client`. All raise `ServiceError` with the server's status and code, and `SpecError` for a
    spec that the server refuses."""

    _http: httpx.Client

    # ------------------------------------------------------------------------------------------------- files

    def upload(self, path: str | Path, *, name: str | None = None) -> dict[str, Any]:
        """Upload a file; its `id` goes into specs as `file:ID`. `name` keeps the ending (.fasta, .csv.gz ...).
        Raises `InputError` if it cannot be read."""
        path = Path(path)
        try:
            with open(path, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}.") from error

        def pieces() -> Iterator[bytes]:
            with open(path, "rb") as handle:
                while piece := handle.read(_BLOCK):
                    yield piece

        return self._ask(
            "POST",
            f"/v1/files?name={quote(name or path.name)}&sha256={digest}",
            content=pieces,
            headers={"Content-Type": "application/octet-stream", "Content-Length": str(size)},
        )

    def files(self) -> list[dict[str, Any]]:
        """The files of this key, newest first."""
        return self._ask("GET", "/v1/files")["data"]

    def delete_file(self, file_id: str) -> None:
        self._ask("DELETE", f"/v1/files/{quote(file_id, safe='')}")

    # -------------------------------------------------------------------------------------------------- jobs

    def submit(
        self,
        kind: str,
        spec: Spec | Mapping[str, Any],
        *,
        name: str | None = None,
        recipe: str | None = None,
        prepare: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Submit a `pretrain`, `finetune` or `screen` job; returns the job.

        `spec` has the fields of `bioseq KIND --spec FILE`, as a spec or a dict; where it writes is the server's
        to decide, so output and the like are left out. Inputs that are files here are uploaded. For pretrain,
        `recipe` names a recipe that `spec` changes, and `prepare` says how the corpus is prepared (clusters,
        valid, held_out, min_length, max_length, on_error).
        """
        data = spec.to_dict() if isinstance(spec, Spec) else dict(spec)
        data = {k: v for k, v in data.items() if k not in SERVERS}
        body: dict[str, Any] = {"kind": kind, "spec": self._upload_inputs(kind, data)}
        if name is not None:
            body["name"] = name
        if recipe is not None:
            body["recipe"] = recipe
        if prepare is not None:
            ready = dict(prepare)
            if isinstance(ready.get("clusters"), str):
                ready["clusters"] = self._uploaded(ready["clusters"])
            if isinstance(ready.get("valid"), Mapping):
                ready["valid"] = {k: self._uploaded(v) for k, v in ready["valid"].items()}
            body["prepare"] = ready
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._ask("POST", "/v1/jobs", body=body, headers=headers)

    def _upload_inputs(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        for field in _INPUTS.get(kind, ()):
            if isinstance(data.get(field), str):
                data[field] = self._uploaded(data[field])
        if kind == "screen" and isinstance(data.get("inputs"), list | tuple):
            data["inputs"] = [self._uploaded(v) for v in data["inputs"]]
        return data

    def _uploaded(self, value: Any) -> Any:
        if (
            isinstance(value, str)
            and not value.startswith("file:")
            and "\n" not in value
            and len(value) < 4096
        ) and Path(value).is_file():
            return f"file:{self.upload(value)['id']}"
        return value

    def jobs(
        self, *, state: str | None = None, kind: str | None = None, limit: int = 100, everyone: bool = False
    ) -> list[dict[str, Any]]:
        """This key's jobs, newest first; `everyone` needs the scope admin."""
        asked = {"state": state, "kind": kind, "limit": str(limit), "all": "true" if everyone else None}
        query = "&".join(f"{k}={quote(v, safe='')}" for k, v in asked.items() if v is not None)
        return self._ask("GET", f"/v1/jobs?{query}")["data"]

    def job(self, job_id: str) -> dict[str, Any]:
        return self._ask("GET", _at(job_id))

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a pending or running job. A running one ends a moment later: see `wait`."""
        return self._ask("DELETE", _at(job_id))

    def purge(self, job_id: str) -> None:
        """Delete an ended job with its log and result."""
        self._ask("DELETE", f"{_at(job_id)}?purge=true")

    def logs(self, job_id: str) -> str:
        """What the job has printed so far."""
        response = self._request("GET", f"{_at(job_id)}/logs", headers={})
        return response.text

    def follow(self, job_id: str) -> Iterator[dict[str, Any]]:
        """The job's log from its beginning, as it is written: {"event": "line", "line"}, {"event": "progress",
        "label", "done", "total", "unit", "fraction"}, of pretraining {"event": "metrics", "step", "loss", ...}, and last {"event": "end",
        "state", "reason", "registered"}. Goes on where a broken connection ended."""
        last, failures = "", 0
        while True:
            headers = {**self._auth(), "Last-Event-ID": last} if last else self._auth()
            try:
                with self._http.stream(
                    "GET", f"{_at(job_id)}/logs?follow=true", headers=headers, timeout=60
                ) as response:
                    if response.status_code >= 400:
                        response.read()
                        raise error_of(response)
                    for event in _events(response.iter_lines()):
                        failures = 0
                        last = event.pop("id", "") or last
                        yield event
                        if event["event"] == "end":
                            return
            except self._errors() as error:
                failures += 1
                if failures > 8:
                    raise self._gone(error) from None
            except ServiceError as error:
                failures += 1
                if failures > 8 or error.status not in (429, 500, 502, 503, 504):
                    raise
            time.sleep(min(5.0, 0.3 * 2**failures))

    def wait(self, job_id: str, *, timeout: float | None = None, poll: float = 1.0) -> dict[str, Any]:
        """The job once it has ended. Raises `ServiceError` (code job.timeout) after `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while (job := self.job(job_id))["state"] not in ENDED:
            if until is not None and time.monotonic() > until:
                raise ServiceError(f"job {job_id} is {job['state']} after {timeout:g} s.", code="job.timeout")
            time.sleep(poll)
        return job

    def result_files(self, job_id: str) -> list[dict[str, Any]]:
        """Name and bytes of each file of a job that has succeeded."""
        return self._ask("GET", f"{_at(job_id)}/result")["data"]

    def result(self, job_id: str, folder: str | Path) -> list[Path]:
        """Download the result into `folder`; call it again to go on where it broke off. Files that are there
        whole are left. Raises `OutputError`."""
        folder = Path(folder)
        done = []
        for item in self.result_files(job_id):
            parts = Path(item["name"]).parts
            if not parts or item["name"].startswith("/") or ".." in parts:
                raise ServiceError("the server named a file outside of the folder.", code="service.invalid")
            target = folder.joinpath(*parts)
            if not (target.is_file() and target.stat().st_size == item["bytes"]):
                try:
                    self._download(item["href"], target, int(item["bytes"]))
                except OSError as error:
                    raise OutputError(f"cannot write {target}: {error.strerror or error}.") from error
            done.append(target)
        return done

    def _download(self, href: str, target: Path, size: int) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part, note = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.etag")
        failures = 0
        while True:
            have = part.stat().st_size if part.exists() and note.exists() else 0
            headers = self._auth()
            if have:
                headers |= {"Range": f"bytes={have}-", "If-Range": note.read_text("ascii")}
            try:
                if not have or have < size:
                    with self._http.stream("GET", quote(href), headers=headers) as response:
                        if response.status_code >= 400:
                            response.read()
                            raise error_of(response)
                        note.write_text(response.headers.get("ETag", ""), "ascii")
                        with open(part, "ab" if response.status_code == 206 else "wb") as out:
                            for piece in response.iter_raw():
                                out.write(piece)
                if part.stat().st_size != size:
                    raise ServiceError(f"{target.name} came short.", code="service.unreachable", status=503)
                os.replace(part, target)
                note.unlink(missing_ok=True)
                return
            except self._errors() as error:
                failures += 1
                if failures > 8:
                    raise self._gone(error) from None
            except ServiceError as error:
                failures += 1
                if failures > 8 or error.status not in (429, 500, 502, 503, 504):
                    raise
            time.sleep(min(5.0, 0.3 * 2**failures))

    # ----------------------------------------------------------------------------------------------- sending

    def _auth(self) -> dict[str, str]:
        key = getattr(self, "api_key", None)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _errors(self) -> Any:
        return self._httpx.TransportError  # type: ignore[attr-defined]

    def _gone(self, error: Exception) -> ServiceError:
        return self._broken(error)  # type: ignore[attr-defined]

    def _ask(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        content: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        response = self._request(method, path, body=body, content=content, headers=headers or {})
        return response.json() if response.content else None

    def _request(
        self, method: str, path: str, *, body: Any = None, content: Any = None, headers: dict[str, str]
    ) -> httpx.Response:
        """One request, tried again as often as the client allows. Every request here may be sent twice without
        harm: an upload made twice is one file more, and a submission has its key."""
        attempt = 0
        while True:
            try:
                try:
                    response = self._http.request(
                        method, path, json=body, content=content() if content else None,
                        headers={**self._auth(), **headers},
                    )  # fmt: skip
                except self._errors() as error:
                    raise self._gone(error) from None
                if response.status_code >= 400:
                    raise error_of(response)
                return response
            except ServiceError as error:
                pause = self._pause(attempt, error)  # type: ignore[attr-defined]
                if pause is None or error.code == "quota.jobs":
                    raise
            attempt += 1
            time.sleep(pause)


def _at(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Server-sent events (WHATWG HTML, 9.2)."""
    event: dict[str, str] = {}
    for line in lines:
        if line:
            field, _, value = line.partition(":")
            if field in ("id", "event", "data"):
                event[field] = value.removeprefix(" ")
            continue
        if "data" in event:
            kind = event.get("event", "line")
            content = {"line": event["data"]} if kind == "line" else json.loads(event["data"])
            yield {"event": kind, **({"id": event["id"]} if "id" in event else {}), **content}
        event = {}


def read_job(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """A job file: a spec (TOML or JSON) with `kind`, and for pretrain `recipe` and a table `prepare`, beside its
    fields. Returns the arguments of `submit`. Paths in it are relative to the file. Raises `SpecError`."""
    import tomllib

    path = Path(path)
    try:
        text = path.read_text("utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise SpecError(f"{path} cannot be parsed: {error}.") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path} is no table.")
    named = data.pop("kind", None)
    if kind is not None and named is not None and kind != named:
        raise SpecError(f"{path} is a {named} job, not {kind}.", field="kind")
    kind = kind or named
    if kind not in ("pretrain", "finetune", "screen"):
        raise SpecError(
            "pretrain, finetune or screen is needed.",
            field="kind",
            hint='Write kind = "finetune" into the file.',
        )

    def near(value: Any) -> Any:
        beside = path.parent / value if isinstance(value, str) and value and len(value) < 4096 else None
        return str(beside) if beside is not None and "\n" not in value and beside.is_file() else value

    job: dict[str, Any] = {"kind": kind}
    for field in ("recipe", "prepare"):
        if kind == "pretrain" and field in data:
            job[field] = data.pop(field)
    if isinstance(job.get("prepare"), dict):
        prepare = job["prepare"]
        if "clusters" in prepare:
            prepare["clusters"] = near(prepare["clusters"])
        if isinstance(prepare.get("valid"), dict):
            prepare["valid"] = {k: near(v) for k, v in prepare["valid"].items()}
    for field in _INPUTS.get(kind, ()):
        if field in data:
            data[field] = near(data[field])
    if kind == "screen" and isinstance(data.get("inputs"), list):
        data["inputs"] = [near(v) for v in data["inputs"]]
    return {**job, "spec": data}

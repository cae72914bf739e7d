"""/v1/files and /v1/jobs in one process: uploads, downloads by range, states, logs, results."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.database.base import Database, DatabaseUnavailable
from serving.database.keys import Keys
from serving.http.routes import streams
from serving.jobs.folder import JobFolder

pytestmark = pytest.mark.asyncio
BYTES = {"content-type": "application/octet-stream"}
FASTA = b">a\nMKTAYIAKQR\n>b\nACDEFGHIKL\n"


async def put(http: Any, data: bytes = FASTA, name: str = "lib.fasta", **headers: str) -> str:
    response = await http.post(f"/v1/files?name={name}", content=data, headers=BYTES | headers)
    assert response.status_code == 201, response.text
    return response.json()["id"]


def screen(file_id: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "screen", "spec": {"inputs": [f"file:{file_id}"], "heads": ["stability"]}, **fields}


async def until(http: Any, job: str, *states: str) -> dict[str, Any]:
    for _ in range(600):
        found = (await http.get(f"/v1/jobs/{job}")).json()
        if found["state"] in states:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"job stays {found['state']}")


async def begun(http: Any, job: str) -> str:
    """The name of the job's run, once it has begun."""
    for _ in range(600):
        for run in http.noop.running():
            if job in run:
                return run
        await asyncio.sleep(0.05)
    raise AssertionError("the job does not begin")


async def test_a_file_goes_up_in_pieces_and_comes_back_whole_and_by_ranges(api):
    data = bytes(range(256)) * 5000

    async def pieces():
        for at in range(0, len(data), 100_000):
            yield data[at : at + 100_000]

    async with api() as http:
        made = await http.post("/v1/files?name=lib.fasta", content=pieces(), headers=BYTES)
        assert made.status_code == 201
        info = made.json()
        assert info["bytes"] == len(data) and info["sha256"] == hashlib.sha256(data).hexdigest()
        assert info["expires"] > info["created"]
        at = f"/v1/files/{info['id']}"
        assert (await http.get(at)).json() == info
        assert (await http.get("/v1/files")).json()["data"] == [info]
        whole = await http.get(f"{at}/content")
        assert whole.content == data and whole.headers["etag"] == f'"{info["sha256"]}"'
        for asked, start, end in (
            ("bytes=0-0", 0, 1), ("bytes=1000-1999", 1000, 2000), ("bytes=-7", len(data) - 7, len(data)),
            ("bytes=1279990-", 1279990, len(data)), ("bytes=5-99999999", 5, len(data)),
        ):  # fmt: skip
            part = await http.get(f"{at}/content", headers={"Range": asked})
            assert part.status_code == 206 and part.content == data[start:end], asked
            assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"
        beyond = await http.get(f"{at}/content", headers={"Range": f"bytes={len(data)}-"})
        assert beyond.status_code == 416 and beyond.json()["code"] == "range.not_satisfiable"
        for ignored in ("bytes=9-3", "bytes=1-2,4-5", "lines=1-2", "bytes=-"):
            assert (await http.get(f"{at}/content", headers={"Range": ignored})).status_code == 200
        changed = {"Range": "bytes=0-0", "If-Range": '"of another file"'}
        assert (await http.get(f"{at}/content", headers=changed)).status_code == 200
        assert (await http.delete(at)).status_code == 204
        assert (await http.get(at)).status_code == 404


async def test_an_upload_that_is_refused_leaves_nothing(api, settings):
    root = Path(settings().data, "files")
    async with api(max_file_bytes=1000, max_stored_bytes_per_key=1500) as http:

        async def send(data: Any, query: str, **headers: str) -> tuple[int, str]:
            response = await http.post(f"/v1/files?{query}", content=data, headers=BYTES | headers)
            return response.status_code, response.json()["code"]

        async def endless():
            while True:
                yield b"A" * 300

        async def broken():
            yield b"AA"
            raise asyncio.CancelledError

        assert await send(b"A" * 1001, "name=a.fasta") == (413, "request.too_large")
        assert await send(endless(), "name=a.fasta") == (413, "request.too_large")
        wrong = "sha256=" + "0" * 64
        assert await send(FASTA, f"name=a.fasta&{wrong}") == (422, "file.checksum")
        assert await send(FASTA, "name=a.fasta", **{"content-type": "text/plain"}) == (400, "request.bad")
        assert await send(FASTA, "x=1") == (422, "request.invalid")
        assert list(root.glob("*")) == []
        await put(http, b"A" * 1000)
        assert await send(b"A" * 600, "name=b.fasta") == (413, "quota.storage")
        assert len(list(root.glob("*"))) == 1


async def test_a_file_that_a_job_needs_stays(api):
    async with api() as http:
        file_id = await put(http)
        job = (await http.post("/v1/jobs", json=screen(file_id))).json()
        kept = await http.delete(f"/v1/files/{file_id}")
        assert (kept.status_code, kept.json()["code"]) == (409, "file.in_use")
        await http.delete(f"/v1/jobs/{job['id']}")
        await until(http, job["id"], "CANCELLED")
        assert (await http.delete(f"/v1/files/{file_id}")).status_code == 204


async def test_a_job_from_submission_to_result(api):
    async with api() as http:
        file_id = await put(http)
        sent = await http.post("/v1/jobs", json=screen(file_id, name="my screen"))
        assert sent.status_code == 201
        job = sent.json()
        assert sent.headers["location"] == f"/v1/jobs/{job['id']}"
        assert job["state"] == "PENDING" and job["name"] == "my screen"
        assert job["spec"]["heads"] == ["stability@1"] and job["spec"]["model"] == "tiny@1"
        early = await http.get(f"/v1/jobs/{job['id']}/result")
        assert (early.status_code, early.json()["code"]) == (409, "job.no_result")
        run = await begun(http, job["id"])
        folder, attempt = http.noop.folders[run]
        assert attempt == 1
        spec = json.loads((folder.path / "spec.json").read_text())
        assert Path(spec["inputs"][0]).read_bytes() == FASTA
        assert spec["output"] == str(folder.output) and spec["address"] is None
        folder.write("progress.json", {"label": "x", "done": 3, "total": 4, "unit": "u", "fraction": 0.75})
        assert (await until(http, job["id"], "RUNNING"))["progress"]["fraction"] == 0.75
        folder.note("hello from the run")
        assert "hello from the run" in (await http.get(f"/v1/jobs/{job['id']}/logs")).text
        (folder.output / "sub").mkdir(parents=True)
        (folder.output / "hits.csv").write_text("id,score\na,1\n")
        (folder.output / "sub" / "part 1.csv").write_text("x")
        (folder.output / ".hidden").write_text("x")
        (folder.output / "link").symlink_to("/etc/passwd")
        (folder.output / "work").mkdir()
        (folder.output / "work" / "state").write_text("x")
        for state in ("lock.json", "spec.json"):  # they name the server's folders and hosts
            (folder.output / state).write_text("{}")
        http.noop.finish(run)
        ended = await until(http, job["id"], "SUCCEEDED")
        assert ended["created"] <= ended["started"] <= ended["ended"] and ended["reason"] is None
        files = (await http.get(ended["result"])).json()["data"]
        assert [f["name"] for f in files] == ["hits.csv", "sub/part 1.csv"]
        hits = await http.get(files[0]["href"], headers={"Range": "bytes=9-"})
        assert hits.status_code == 206 and hits.text == "a,1\n"
        assert hits.headers["content-disposition"].startswith("attachment")
        assert (await http.get(files[1]["href"])).text == "x"
        for hidden in (
            ".hidden",
            "link",
            "work/state",
            "../spec.json",
            "%2e%2e/spec.json",
            "sub",
            "nope",
            "lock.json",
            "spec.json",
        ):
            assert (await http.get(f"{ended['result']}/{hidden}")).status_code == 404, hidden
        active = await http.delete(f"/v1/jobs/{job['id']}")
        assert active.status_code == 200 and active.json()["state"] == "SUCCEEDED"
        assert (await http.delete(f"/v1/jobs/{job['id']}?purge=true")).status_code == 200
        assert (await http.get(f"/v1/jobs/{job['id']}")).status_code == 404
        assert not folder.path.exists()


def events(text: str) -> list[dict[str, str]]:
    return [
        dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        for block in text.split("\n\n")
        if "data" in block
    ]


async def test_a_followed_log_goes_on_while_the_database_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "POLL_S", 0.0)
    folder = JobFolder(tmp_path, "j1")
    folder.log.parent.mkdir(parents=True, exist_ok=True)
    folder.log.write_text("first\n")
    looks = []

    def look() -> Any:
        looks.append(1)
        if len(looks) < 3:
            raise DatabaseUnavailable("OperationalError")
        return SimpleNamespace(state="SUCCEEDED", reason=None, registered=None)

    events = [e.decode() async for e in streams.follow(folder, look, 0, lambda: False)]
    assert len(looks) == 3 and "data: first" in events[1]
    assert "event: end" in events[-1] and "SUCCEEDED" in events[-1]


async def test_a_followed_log_ends_with_the_job_and_goes_on_after_a_break(api):
    async with api() as http:
        job = (await http.post("/v1/jobs", json=screen(await put(http)))).json()
        run = await begun(http, job["id"])
        folder, _ = http.noop.folders[run]
        stream = asyncio.create_task(http.get(f"{job['logs']}?follow=true"))
        await asyncio.sleep(0.3)
        for i in range(5):
            folder.note(f"line {i}")
            await asyncio.sleep(0.1)
        folder.write("progress.json", {"label": "x", "done": 4, "total": 4, "unit": "u", "fraction": 1.0})
        folder.output.mkdir()
        metrics = folder.output / "metrics.jsonl"
        metrics.write_text('{"kind": "train", "step": 1, "loss": 2.5}\n{"kind": "train", "st')
        await asyncio.sleep(0.6)
        with open(folder.log, "ab") as out:
            out.write(b"\xff\xfe no newline at the end")
        http.noop.finish(run, code=1, error="it went wrong")
        answer = await stream
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = events(answer.text)
        lines = [e for e in seen if "event" not in e]
        assert [e["data"] for e in lines[1:6]] == [f"[job] line {i}" for i in range(5)]
        assert lines[-1]["data"].endswith("no newline at the end")
        told = [json.loads(e["data"]) for e in seen if e.get("event") == "metrics"]
        assert told == [{"kind": "train", "step": 1, "loss": 2.5}]  # and not the half-written line
        assert any(e.get("event") == "progress" and json.loads(e["data"])["fraction"] == 1 for e in seen)
        end = json.loads(seen[-1]["data"])
        assert seen[-1]["event"] == "end"
        assert end == {"state": "FAILED", "reason": "it went wrong", "registered": None}
        again = await http.get(f"{job['logs']}?follow=true", headers={"Last-Event-ID": lines[3]["id"]})
        assert [e["data"] for e in events(again.text) if "event" not in e][:2] == [
            "[job] line 3",
            "[job] line 4",
        ]


async def test_submitting_again_with_the_same_key_gives_the_same_job(api):
    async with api() as http:
        body = screen(await put(http))
        key = {"Idempotency-Key": "run-7"}
        first = await http.post("/v1/jobs", json=body, headers=key)
        second = await http.post("/v1/jobs", json=body, headers=key)
        assert (first.status_code, second.status_code) == (201, 200)
        assert first.json()["id"] == second.json()["id"]
        other = await http.post("/v1/jobs", json={**body, "name": "x"}, headers=key)
        assert (other.status_code, other.json()["code"]) == (409, "job.idempotency_conflict")
        assert len((await http.get("/v1/jobs")).json()["data"]) == 1


async def test_lists_filter_and_page(api):
    async with api(max_running_jobs=1) as http:
        file_id = await put(http)
        ids = [(await http.post("/v1/jobs", json=screen(file_id))).json()["id"] for _ in range(4)]
        await until(http, ids[0], "RUNNING")
        waiting = (await http.get("/v1/jobs?state=PENDING&kind=screen")).json()["data"]
        assert [j["id"] for j in waiting] == ids[:0:-1]
        assert [j["waiting_before"] for j in waiting] == [2, 1, 0]
        page = (await http.get(f"/v1/jobs?limit=1&before={waiting[0]['number']}")).json()["data"]
        assert [j["id"] for j in page] == [ids[2]]


async def test_admission_names_the_field_at_fault(api):
    async with api(roots=("/srv/libraries",)) as http:
        file_id = await put(http)
        table = f"file:{file_id}"
        ok = {"labels": table, "targets": ["t"]}
        cases: list[tuple[dict[str, Any], str]] = [
            (screen(file_id) | {"spec": {"inputs": [table], "heads": ["nope"]}}, "heads"),
            (screen(file_id) | {"spec": {"inputs": [table], "heads": ["stability"], "top": 0}}, "top"),
            (screen(file_id) | {"spec": {"inputs": [], "heads": ["stability"]}}, "inputs"),
            ({"kind": "finetune", "spec": {"targets": ["t"]}}, "labels"),
            ({"kind": "finetune", "spec": ok | {"base": "nope"}}, "base"),
            ({"kind": "finetune", "spec": ok | {"base": "stability"}}, "base"),
            ({"kind": "finetune", "spec": ok | {"workers": 100_000}}, "workers"),
            ({"kind": "finetune", "spec": ok, "recipe": "protein_tiny"}, "recipe"),
            ({"kind": "finetune", "spec": ok, "prepare": {}}, "prepare"),
            (
                {"kind": "screen", "spec": {"inputs": [table], "heads": ["stability"], "output": "/x"}},
                "output",
            ),
        ]
        for body, field in cases:
            response = await http.post("/v1/jobs", json=body)
            assert (response.status_code, response.json().get("field")) == (422, field), (body, response.text)
        inside = screen(file_id) | {"spec": {"inputs": ["/srv/libraries/a.fasta"], "heads": ["stability"]}}
        assert (await http.post("/v1/jobs", json=inside)).status_code == 201


async def test_a_recipe_is_changed_by_the_spec_and_its_corpus_prepared_first(api):
    async with api() as http:
        file_id = await put(http)
        body = {
            "kind": "pretrain", "recipe": "protein_tiny", "prepare": {"held_out": 0.5},
            "spec": {"corpus": f"file:{file_id}", "steps": 7, "schedule": {"warmup": 1, "decay": 2}},
        }  # fmt: skip
        made = await http.post("/v1/jobs", json=body)
        assert made.status_code == 201, made.text
        job = made.json()
        assert job["spec"]["steps"] == 7 and job["spec"]["model"]["n_layers"] == 2
        assert job["spec"]["schedule"] | {"warmup": 1, "decay": 2} == job["spec"]["schedule"]
        folder, _ = http.noop.folders[await begun(http, job["id"])]
        prepare, run = folder.read("plan.json")["commands"]
        assert prepare[:2] == ["pretrain", "prepare"] and prepare[prepare.index("--held-out") + 1] == "0.5"
        assert run[:2] == ["pretrain", "--spec"]
        unknown = await http.post("/v1/jobs", json={**body, "recipe": "no_such"})
        assert (unknown.status_code, unknown.json()["field"]) == (422, "recipe")


async def test_two_hundred_submissions_by_http_at_once(api):
    async with api(max_jobs_per_key=200, max_running_jobs=4, max_running_jobs_per_key=4) as http:
        body = screen(await put(http))
        answers = await asyncio.gather(*(http.post("/v1/jobs", json=body) for _ in range(200)))
        assert [a.status_code for a in answers] == [201] * 200
        assert len({a.json()["id"] for a in answers}) == 200
        over = await http.post("/v1/jobs", json=body)
        assert (over.status_code, over.json()["code"]) == (429, "quota.jobs") and over.headers["retry-after"]
        for _ in range(3000):
            for run in http.noop.running():
                http.noop.finish(run)
            counts = await asyncio.to_thread(http.store.counts)
            if counts == {"SUCCEEDED": 200}:
                break
            await asyncio.sleep(0.05)
        assert counts == {"SUCCEEDED": 200}
        assert http.noop.most <= 4 and len(http.noop.order) == 200


async def test_what_a_restarted_service_finds(api, registry, settings):
    """The service goes while one job runs and two wait; the runs end meanwhile."""
    from jobs_helpers import NoOp

    noop = NoOp()
    async with api(noop, max_running_jobs=1) as http:
        file_id = await put(http)
        ids = [(await http.post("/v1/jobs", json=screen(file_id))).json()["id"] for _ in range(3)]
        run = await begun(http, ids[0])
    noop.finish(run)
    async with api(noop, max_running_jobs=1) as http:
        await until(http, ids[0], "SUCCEEDED")
        for job in ids[1:]:
            noop.finish(await begun(http, job))
            assert (await until(http, job, "SUCCEEDED"))["attempt"] == 1
    assert len(noop.order) == 3


async def test_a_key_registers_only_under_names_of_its_own(api, settings):
    made = settings()
    database = Database(made.database)
    database.upgrade()
    keys = Keys(database)
    texts = {n: keys.create(n, ("train", "read"))[1] for n in "ab"}
    boss = keys.create("boss", ("admin",))[1]
    async with api() as http:

        async def ask(text: str, name: str) -> int:
            auth = {"Authorization": f"Bearer {text}"}
            file_id = await put(http, b"sequence,t\nMK,1\n", "t.csv", **auth)
            body = {
                "kind": "finetune",
                "spec": {"labels": f"file:{file_id}", "targets": ["t"], "register": name},
            }
            return (await http.post("/v1/jobs", json=body, headers=auth)).status_code

        assert await ask(texts["a"], "stability") == 403  # registered by the operator
        assert await ask(texts["a"], "tiny") == 403
        assert await ask(texts["a"], "default") == 422  # an alias
        assert await ask(texts["a"], "../x") == 422
        assert await ask(texts["a"], "fresh") == 201
        assert await ask(boss, "stability") == 201

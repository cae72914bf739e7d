"""What a stranger, a lesser key, or a key with bad intent gets to see and to do: nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from serving.database.base import Database
from serving.database.keys import Keys

BYTES = {"content-type": "application/octet-stream"}
ROUTES = [
    ("GET", "/v1/files"), ("POST", "/v1/files?name=a.fasta"), ("GET", "/v1/files/" + "0" * 24),
    ("GET", "/v1/files/" + "0" * 24 + "/content"), ("DELETE", "/v1/files/" + "0" * 24),
    ("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs/" + "0" * 24),
    ("DELETE", "/v1/jobs/" + "0" * 24), ("GET", "/v1/jobs/" + "0" * 24 + "/logs"),
    ("GET", "/v1/jobs/" + "0" * 24 + "/result"), ("GET", "/v1/jobs/" + "0" * 24 + "/result/hits.csv"),
]  # fmt: skip
pytestmark = pytest.mark.asyncio


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@pytest.fixture
def keys(settings) -> dict[str, str]:
    database = Database(settings().database)
    database.upgrade()
    room = Keys(database)
    scopes: dict[str, tuple[str, ...]] = {
        "alice": ("train", "predict", "read"), "mallory": ("train", "predict", "read"),
        "reader": ("read", "predict"), "boss": ("admin",),
    }  # fmt: skip
    return {name: room.create(name, given)[1] for name, given in scopes.items()}


async def put(http: Any, text: str, name: str = "lib.fasta", data: bytes = b">a\nMKT\n") -> str:
    made = await http.post(f"/v1/files?name={name}", content=data, headers=BYTES | bearer(text))
    assert made.status_code == 201, made.text
    return made.json()["id"]


async def test_no_key_a_wrong_key_and_a_key_without_the_scope(api, keys):
    async with api() as http:
        for method, path in ROUTES:
            await turned_away(http, keys, method, path)


async def turned_away(http: Any, keys: dict[str, str], method: str, path: str) -> None:
    plain, body = {}, {}
    if method == "POST":
        plain, body = (BYTES, {"content": b"x"}) if "files" in path else ({}, {"json": {}})
    real = keys["alice"]
    cases = [
            (None, 401), ("nonsense", 401), (real[:-3] + "abc", 401), ("bsk_' OR 1=1 --_x", 401),
            (keys["reader"], 403),
        ]  # fmt: skip
    for text, status in cases:
        headers = plain | (bearer(text) if text else {})
        response = await http.request(method, path, headers=headers, **body)
        assert response.status_code == status, (text, response.text)
        assert response.headers["content-type"] == "application/problem+json"


async def test_another_keys_files_and_jobs_are_not_there(api, keys):
    async with api() as http:
        file_id = await put(http, keys["alice"])
        spec = {"inputs": [f"file:{file_id}"], "heads": ["stability"]}
        sent = {"kind": "screen", "spec": spec}
        job = (await http.post("/v1/jobs", json=sent, headers=bearer(keys["alice"]))).json()["id"]
        mallory, boss = bearer(keys["mallory"]), bearer(keys["boss"])
        for method, path in (
            ("GET", f"/v1/files/{file_id}"), ("GET", f"/v1/files/{file_id}/content"),
            ("DELETE", f"/v1/files/{file_id}"), ("GET", f"/v1/jobs/{job}"), ("DELETE", f"/v1/jobs/{job}"),
            ("DELETE", f"/v1/jobs/{job}?purge=true"), ("GET", f"/v1/jobs/{job}/logs"),
            ("GET", f"/v1/jobs/{job}/logs?follow=true"), ("GET", f"/v1/jobs/{job}/result"),
            ("GET", f"/v1/jobs/{job}/result/hits.csv"),
        ):  # fmt: skip
            response = await http.request(method, path, headers=mallory)
            assert response.status_code == 404, path
            made_up = await http.request(
                method, path.replace(file_id, "f" * 24).replace(job, "f" * 24), headers=mallory
            )
            assert made_up.status_code == 404 and made_up.json() == response.json(), "ids can be probed"
        assert (await http.get("/v1/jobs", headers=mallory)).json()["data"] == []
        assert (await http.get("/v1/files", headers=mallory)).json()["data"] == []
        assert (await http.get("/v1/jobs?all=true", headers=mallory)).status_code == 403
        stolen = await http.post("/v1/jobs", json=sent, headers=mallory)
        assert (stolen.status_code, stolen.json()["code"]) == (404, "file.not_found")
        shared_key = mallory | {"Idempotency-Key": "k"}
        assert (await http.post("/v1/jobs", json=sent, headers=shared_key)).status_code == 404
        assert [j["id"] for j in (await http.get("/v1/jobs?all=true", headers=boss)).json()["data"]] == [job]
        assert (await http.get(f"/v1/jobs/{job}", headers=bearer(keys["alice"]))).status_code == 200


BAD_NAMES = [
    "../../etc/cron.d/x.fasta",
    "/etc/x.fasta",
    "a/b.fasta",
    "..%2f..%2fx.fasta",
    ".hidden.fasta",
    "a\\b.fasta",
    "a%00.fasta",
    "a%0a.fasta",
    "x" * 300 + ".fasta",
    "a..fasta",
    "model.pkl",
    "model.pt",
    "run.sh",
    "a.html",
    "x.fasta.exe",
    "",
    "-rf.fasta",
    "a b.fasta",
    "%D0%B0.fasta",
]


async def test_file_names_that_lead_elsewhere_or_are_no_data(api, keys, settings):
    async with api() as http:
        for name in BAD_NAMES:
            response = await http.post(
                f"/v1/files?name={name}", content=b"x", headers=BYTES | bearer(keys["alice"])
            )
            assert response.status_code == 422, response.text
            assert not list(Path(settings().data).rglob("*.fasta"))


async def test_specs_cannot_name_paths_models_by_path_or_what_the_server_decides(api, keys):
    async with api() as http:
        alice = bearer(keys["alice"])
        file_id = await put(http, keys["alice"])
        table = f"file:{file_id}"
        screen = {"inputs": [table], "heads": ["stability"]}
        finetune = {"labels": table, "targets": ["t"]}
        bad: list[tuple[str, dict[str, Any]]] = [
            ("screen", {**screen, "inputs": ["/etc/passwd"]}),
            ("screen", {**screen, "inputs": ["../../etc/passwd"]}),
            ("screen", {**screen, "inputs": ["s3://somewhere/x.fasta"]}),
            ("screen", {**screen, "inputs": ["file:///etc/passwd"]}),
            ("screen", {**screen, "inputs": [f"file:{file_id}/../../x"]}),
            ("screen", {**screen, "inputs": ["file:../" + "0" * 21]}),
            ("screen", {**screen, "heads": ["/tmp/evil"]}),
            ("screen", {**screen, "heads": ["../evil"]}),
            ("screen", {**screen, "homologs": "/tmp/evil"}),
            ("screen", {**screen, "model": "/tmp/evil"}),
            ("screen", {**screen, "output": "/tmp/x"}),
            ("screen", {**screen, "address": "ray://elsewhere:10001"}),
            ("screen", {**screen, "entrypoint": "id"}),
            ("screen", {**screen, "runtime_env": {"pip": ["x"]}}),
            ("screen", {**screen, "top": "1; DROP TABLE jobs"}),
            ("screen", {**screen, "strict": "yes"}),
            ("finetune", {**finetune, "labels": "/etc/passwd"}),
            ("finetune", {**finetune, "wild_type": "/etc/passwd"}),
            ("finetune", {**finetune, "wild_type": "../x.fasta"}),
            ("finetune", {**finetune, "base": "/tmp/evil"}),
            ("finetune", {**finetune, "cache": "/tmp/x"}),
            ("finetune", {**finetune, "name": "../../x"}),
            ("finetune", {**finetune, "register": "../../x"}),
            ("finetune", {**finetune, "force": True}),
            ("finetune", {**finetune, "split": {"kind": "cluster", "nope": 1}}),
            ("pretrain", {"corpus": "/etc/passwd"}),
            ("pretrain", {"corpus": table, "name": "../../.."}),
            ("pretrain", {"corpus": table, "name": "a/b"}),
            ("pretrain", {"corpus": table, "name": "/etc/cron.d/x"}),
            ("pretrain", {"corpus": table, "register": "../../x"}),
        ]  # fmt: skip
        for kind, spec in bad:
            body: dict[str, Any] = {"kind": kind, "spec": spec}
            if kind == "pretrain":
                body["recipe"] = "protein_tiny"
            response = await http.post("/v1/jobs", json=body, headers=alice)
            assert response.status_code == 422, (kind, spec, response.text)
            assert "passwd" not in response.text
        for body in (
            {"kind": "shell", "spec": {}}, {"kind": "screen", "spec": screen, "entrypoint": "id"},
            {"kind": "screen", "spec": screen, "runtime_env": {}}, {"kind": "screen", "spec": "x"},
            {"kind": "screen"}, {"kind": "pretrain", "recipe": "$(id)", "spec": {"corpus": table}},
            {"kind": "pretrain", "recipe": "../x", "spec": {"corpus": table}},
            {"kind": "pretrain", "recipe": "protein_tiny", "spec": {"corpus": table, "storage": "s3://x"}},
            {"kind": "pretrain", "recipe": "protein_tiny", "spec": {"corpus": table, "init": "/tmp/x"}},
            {"kind": "pretrain", "recipe": "protein_tiny", "spec": {"corpus": table, "trackers": ["wandb"]}},
            {"kind": "pretrain", "recipe": "protein_tiny", "spec": {"corpus": table},
             "prepare": {"valid": {"x": "/etc/passwd"}}},
            {"kind": "pretrain", "recipe": "protein_tiny", "spec": {"corpus": table},
             "prepare": {"valid": {"x=/etc/passwd --force": table}}},
        ):  # fmt: skip
            response = await http.post("/v1/jobs", json=body, headers=alice)
            assert response.status_code == 422, (body, response.text)
        assert (await http.get("/v1/jobs", headers=alice)).json()["data"] == []


SQL = [
    "state=' OR '1'='1",
    "state=RUNNING'; DROP TABLE jobs;--",
    "kind=screen' --",
    "before=1 OR 1=1",
    "limit=1;1",
    "limit=-1",
    "limit=1000000",
]


async def test_sql_in_a_filter_is_refused_and_does_nothing(api, keys):
    async with api() as http:
        alice = bearer(keys["alice"])
        file_id = await put(http, keys["alice"])
        spec = {"inputs": [f"file:{file_id}"], "heads": ["stability"]}
        await http.post("/v1/jobs", json={"kind": "screen", "spec": spec}, headers=alice)
        for query in SQL:
            response = await http.get(f"/v1/jobs?{query}", headers=alice)
            assert (response.status_code, response.json()["code"]) == (422, "request.invalid"), query
        assert len((await http.get("/v1/jobs", headers=alice)).json()["data"]) == 1
        named = await http.get("/v1/jobs/' OR 1=1 --", headers=alice)
        assert named.status_code == 422


async def test_archives_and_pickles_are_no_models(api, keys, tiny):
    """POST /v1/models is not this room's; it is what a job's bundle must not be smuggled past."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (open, ("/tmp/bioseq-must-not-exist", "w"))

    def tar(members: dict[str, bytes | None]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for path in tiny["tiny"].iterdir():
                archive.add(path, f"tiny/{path.name}")
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                if data is None:
                    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                else:
                    info.size = len(data)
                archive.addfile(info, io.BytesIO(data or b""))
        return out.getvalue()

    bomb = pickle.dumps(Bomb())
    boss = bearer(keys["boss"]) | {"content-type": "application/x-tar"}
    async with api() as http:
        for members in (
            {"tiny/extra.pkl": bomb}, {"tiny/pytorch_model.bin": bomb}, {"tiny/x.pt": bomb},
            {"../evil.json": b"{}"}, {"/tmp/evil.json": b"{}"}, {"tiny/link.json": None},
            {"tiny/../../evil.json": b"{}"}, {"tiny/adapter.safetensors": bomb},
        ):  # fmt: skip
            response = await http.post("/v1/models?name=evil", content=tar(members), headers=boss)
            assert response.status_code == 422, (list(members), response.text)
        plain = await http.post("/v1/models?name=evil", content=bomb, headers=boss)
        assert plain.status_code == 422
        assert (await http.get("/v1/models/evil", headers=boss)).status_code == 404
    assert not Path("/tmp/bioseq-must-not-exist").exists()
    assert not Path("/tmp/evil.json").exists()


async def test_no_error_of_a_spec_repeats_what_was_sent(api, keys):
    canary = "mktwwcanaryWWMKT"
    async with api() as http:
        file_id = await put(http, keys["alice"], name="t.csv")
        finetune: dict[str, Any] = {"labels": f"file:{file_id}", "targets": ["t"]}
        for spec in (
            {**finetune, canary: 1}, {**finetune, "method": canary}, {**finetune, "seed": canary},
            {**finetune, "targets": canary}, {**finetune, "split": {"kind": canary}},
            {**finetune, "split": {canary: 1}}, {**finetune, "split": [canary]}, {**finetune, "name": canary + "/"},
            {**finetune, "register": canary + "/"}, {**finetune, "labels": canary}, {**finetune, "base": canary},
        ):  # fmt: skip
            body = {"kind": "finetune", "spec": spec}
            response = await http.post("/v1/jobs", json=body, headers=bearer(keys["alice"]))
            assert response.status_code == 422, response.text
            assert canary.lower() not in response.text.lower()
            assert response.json()["field"], response.text


async def test_what_users_send_appears_in_no_log(api, keys, settings):
    canary = "WWWCANARYMKTWWW"
    async with api() as http:
        file_id = await put(
            http, keys["alice"], data=f">secretname\n{canary}\n".encode(), name="secretlib.fasta"
        )
        spec = {"labels": f"file:{file_id}", "targets": ["secretcolumn"], "wild_type": canary}
        sent = await http.post(
            "/v1/jobs", json={"kind": "finetune", "spec": spec}, headers=bearer(keys["alice"])
        )
        assert sent.status_code == 201
        await http.post(
            "/v1/jobs", json={"kind": "finetune", "spec": {canary: 1}}, headers=bearer(keys["alice"])
        )
    log = Path(str(settings().log_file)).read_text()
    assert log and all(json.loads(line) for line in log.splitlines())
    for secret in (canary, "secretname", "secretlib", "secretcolumn", keys["alice"].rsplit("_", 1)[1]):
        assert secret not in log


async def test_the_services_database_is_not_in_the_environment_that_rays_workers_inherit(
    settings, monkeypatch
):
    from serving.cluster import running

    class Stop(Exception):
        pass

    def session(given, *_):
        assert given.database.endswith("secret.sqlite") and "BIOSEQ_DATABASE" not in os.environ
        raise Stop

    for name in ("check_model", "check_keys", "check_port"):
        monkeypatch.setattr(running, name, lambda *_: None)
    monkeypatch.setattr(running, "ray_session", session)
    monkeypatch.setenv("BIOSEQ_DATABASE", "sqlite:////tmp/secret.sqlite")
    with pytest.raises(Stop):
        running.run(settings(database=""))


async def test_workers_of_a_joined_clusters_nodes_do_not_get_the_database(tmp_path):
    """There the nodes themselves have it in their environment, so that it is blanked for each job."""
    from serving.jobs.folder import JobFolder
    from serving.jobs.ray_executor import RayExecutor

    sent: dict[str, Any] = {}

    class Client:
        def submit_job(self, **given: Any) -> None:
            sent.update(given)

    executor = object.__new__(RayExecutor)
    executor._client, executor._sent = Client(), {}
    executor.start("bioseq-x-1", JobFolder(tmp_path, "x"), 1)
    assert sent["runtime_env"] == {"env_vars": {"BIOSEQ_DATABASE": "", "BIOSEQ_API_KEY": ""}}

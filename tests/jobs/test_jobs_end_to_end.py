"""The whole way on real data through `bioseq serve` and real Ray Jobs: by HTTP, by the command line and by the
Python client alone; a pretrained backbone that answers; a service that is killed in mid-job; shut doors."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_service import LOOPBACK, Live, Steps, listening

import bioseq

pytestmark = pytest.mark.timeout(900)
DATA = Path(__file__).parents[1] / "data"
LABELS, LIBRARY = DATA / "gb1_61.csv", DATA / "valid_orphan_25.fasta"
CORPUS = DATA / "valid_remote_25.fasta"
WILD = "MQYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE"
FINETUNE = {
    "targets": ["target"], "split": {"kind": "random"}, "models": ["linear"], "features": ["composition"],
    "bootstrap": 20, "threads": 1, "accept_weak": True,
}  # fmt: skip
SCREEN = {"top": 5, "threads": 1, "workers": 1}
PRETRAIN = {
    "steps": 6, "log_every": 1, "checkpoint_every": 2, "schedule": {"warmup": 1, "decay": 1},
    "eval": {"every": 3, "proteins": 2, "final_proteins": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def live(tiny: dict[str, Path]) -> Iterator[Live]:
    service = Live(tiny["tiny"])
    try:
        print(f"\nservice ready in {service.start():.1f} s")
        yield service
    finally:
        service.close()


def toml(path: Path, kind: str, fields: dict[str, object]) -> Path:
    tables = {k: v for k, v in fields.items() if isinstance(v, dict)}
    lines = [f'kind = "{kind}"'] + [f"{k} = {json.dumps(v)}" for k, v in fields.items() if k not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]"] + [f"{k} = {json.dumps(v)}" for k, v in table.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def places(live: Live, told: list[object], files: list[Path]) -> list[str]:
    """Where a log or a result says in which folder the server keeps it."""
    found = [f"log: {line}" for line in told if str(live.root) in str(line)]
    return found + [path.name for path in files if str(live.root).encode() in Path(path).read_bytes()]


@pytest.mark.long
def test_by_http_alone(live):
    steps = Steps("by HTTP")
    with httpx.Client(base_url=live.url, timeout=300) as http:

        def put(path: Path) -> str:
            made = http.post(
                f"/v1/files?name={path.name}", content=path.read_bytes(),
                headers={"Content-Type": "application/octet-stream"},
            )  # fmt: skip
            assert made.status_code == 201, made.text
            return f"file:{made.json()['id']}"

        def send(kind: str, spec: dict[str, object]) -> dict[str, object]:
            made = http.post("/v1/jobs", json={"kind": kind, "spec": spec})
            assert made.status_code == 201, made.text
            return made.json()

        def follow(job: dict[str, object]) -> list[str]:
            lines, end = [], None
            with http.stream("GET", f"{job['logs']}?follow=true", timeout=300) as stream:
                for line in stream.iter_lines():
                    if line.startswith("data:"):
                        lines.append(line[6:])
            end = json.loads(lines[-1])
            assert end["state"] == "SUCCEEDED", lines
            return lines

        labels = put(LABELS)
        steps.done("upload the label table")
        job = send("finetune", {"labels": labels, "register": "fitness_http", **FINETUNE})
        lines = follow(job)
        assert any("held-out rows" in line for line in lines)
        steps.done("finetune, its log followed")
        answer = http.post("/v1/predict", json={"sequences": [WILD], "heads": ["fitness_http"]})
        assert answer.status_code == 200, answer.text
        assert isinstance(answer.json()["data"][0]["predictions"]["fitness_http"]["value"], float)
        steps.done("predict with the new head")
        library = put(LIBRARY)
        job = send("screen", {"inputs": [library], "heads": ["fitness_http"], **SCREEN})
        follow(job)
        steps.done("screen of the uploaded library")
        files = {f["name"]: f for f in http.get(f"/v1/jobs/{job['id']}/result").json()["data"]}
        hits = http.get(files["hits.csv"]["href"]).text.splitlines()
        assert len(hits) == 6 and "report.html" in files
        steps.done("download the hits")
    steps.show()


@pytest.mark.long
def test_by_the_command_line_alone(live, tmp_path):
    steps = Steps("by the command line")
    spec = toml(
        tmp_path / "finetune.toml", "finetune", {"labels": str(LABELS), "register": "fitness_cli", **FINETUNE}
    )
    done = live.bioseq("jobs", "submit", str(spec), "--follow")
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert "held-out rows" in done.stderr and "fitness_cli@1" in done.stderr
    steps.done("upload, finetune, log")
    out = tmp_path / "predictions.csv"
    done = live.bioseq(
        "predict", str(LIBRARY), "--heads", "fitness_cli", "--server", live.url, "-o", str(out)
    )
    assert done.returncode == 0 and out.stat().st_size > 0, done.stderr
    steps.done("predict")
    spec = toml(
        tmp_path / "screen.toml", "screen", {"inputs": [str(LIBRARY)], "heads": ["fitness_cli"], **SCREEN}
    )
    done = live.bioseq("jobs", "submit", str(spec), "--follow")
    assert done.returncode == 0, done.stderr
    screened = done.stdout.strip()
    steps.done("upload, screen, log")
    assert places(live, live.bioseq("jobs", "logs", screened).stdout.splitlines(), []) == []
    done = live.bioseq("jobs", "result", screened, "-o", str(tmp_path / "hits"))
    assert places(live, [], [f for f in (tmp_path / "hits").rglob("*") if f.is_file()]) == []
    assert done.returncode == 0 and len((tmp_path / "hits" / "hits.csv").read_text().splitlines()) == 6
    steps.done("download")
    listed = live.bioseq("jobs", "list").stdout
    assert job in listed and screened in listed
    bad = live.bioseq("jobs", "submit", str(spec), "--set", "top=0")
    assert bad.returncode == 1 and "top" in bad.stderr
    steps.show()


@pytest.mark.long
def test_by_the_python_client_alone(live, tmp_path):
    steps = Steps("by the Python client")
    with bioseq.connect(live.url) as remote:
        job = remote.submit("finetune", {"labels": str(LABELS), "register": "fitness_python", **FINETUNE})
        seen = list(remote.follow(job["id"]))
        assert seen[-1]["state"] == "SUCCEEDED" and seen[-1]["registered"] == "fitness_python@1", seen
        assert any(e["event"] == "progress" for e in seen)
        steps.done("upload, finetune, log")
        (answer,) = remote.predict([WILD], heads=["fitness_python"])
        assert isinstance(answer["fitness_python"]["value"], float)
        steps.done("predict")
        job = remote.submit("screen", {"inputs": [str(LIBRARY)], "heads": ["fitness_python"], **SCREEN})
        assert remote.wait(job["id"])["state"] == "SUCCEEDED"
        steps.done("screen")
        (tmp_path / "hits").mkdir()
        (tmp_path / "hits" / ".hits.csv.part").write_text("torn")  # of a download that broke off
        paths = remote.result(job["id"], tmp_path / "hits")
        assert len((tmp_path / "hits" / "hits.csv").read_text().splitlines()) == 6
        assert len(paths) == len(remote.result_files(job["id"]))
        steps.done("download")
    steps.show()


@pytest.mark.long
def test_a_pretrained_backbone_answers(live, tmp_path):
    steps = Steps("pretraining")
    with bioseq.connect(live.url) as remote:
        spec = {"corpus": str(CORPUS), "register": "mini", **PRETRAIN}
        job = remote.submit("pretrain", spec, recipe="protein_tiny", prepare={"held_out": 0.2})
        steps.done("upload the corpus, submit")
        seen = list(remote.follow(job["id"]))
        assert seen[-1]["state"] == "SUCCEEDED" and seen[-1]["registered"] == "mini@1", seen[-40:]
        steps.done("pretrain, its log followed")
        assert [e["step"] for e in seen if e["event"] == "metrics" and "loss" in e] == [1, 2, 3, 4, 5, 6]
        names = [f["name"] for f in remote.result_files(job["id"])]
        assert "metrics.jsonl" in names and not any(n.startswith("checkpoints/") for n in names)
        assert places(live, seen, remote.result(job["id"], tmp_path)) == []
        mini = bioseq.connect(live.url, model="mini")
        assert mini.embed([WILD]).shape == (1, 64)
        steps.done("embed with the registered backbone")
    steps.show()


@pytest.mark.long
def test_five_jobs_through_real_ray_jobs(live, tmp_path):
    """Tables that are wrong: each job starts, says what is wrong, and fails with that."""
    table = tmp_path / "bad.csv"
    table.write_text("sequence,target\nMKTAYIAK,1\nMKT4YIAK,2\n")
    steps = Steps("five jobs")
    with bioseq.connect(live.url) as remote:
        file = f"file:{remote.upload(table)['id']}"
        jobs = [remote.submit("finetune", {"labels": file, "targets": ["target"]})["id"] for _ in range(5)]
        ended = [remote.wait(job, timeout=600) for job in jobs]
    assert [job["state"] for job in ended] == ["FAILED"] * 5
    assert all(job["attempt"] == 1 and job["reason"] for job in ended)
    starts = [job["started"] for job in ended]
    assert starts == sorted(starts)
    steps.done("submitted at once, all ended")
    steps.show()


def test_rays_doors_are_shut(live):
    ports = listening(live.below())
    assert ports
    dashboards = [(ip, port) for (ip, port), p in ports.items() if "dashboard" in " ".join(p.cmdline())]
    # The dashboard's own pages answer on loopback only, and not without the token.
    answered = 0
    token = (live.home / "ray_token").read_text()
    for ip, port in dashboards:
        if ip not in ("127.0.0.1", "::1"):
            continue
        try:
            bare = httpx.get(f"http://127.0.0.1:{port}/api/jobs/", timeout=5)
        except httpx.HTTPError:
            continue
        if bare.status_code == 404 or bare.text.startswith("# HELP ray_"):
            continue  # an agent without pages, or its metrics for this machine's Prometheus
        assert bare.status_code in (401, 403), bare.text
        wrong = httpx.get(
            f"http://127.0.0.1:{port}/api/jobs/", headers={"Authorization": "Bearer " + "0" * 64}, timeout=5
        )
        assert wrong.status_code in (401, 403)
        right = httpx.get(
            f"http://127.0.0.1:{port}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=5
        )
        if right.status_code == 200:
            answered += 1
    assert answered, "the dashboard was not found"
    outside = {f"{ip}:{port} {p.name()}" for (ip, port), p in ports.items() if ip not in LOOPBACK}
    assert not outside, f"reachable from other machines: {outside}"
    mode = (live.home / "ray_token").stat().st_mode & 0o777
    assert mode == 0o600


@pytest.mark.long
def test_nobody_joins_the_cluster_without_its_token(live, tmp_path):
    """The GCS listens on the node's address: a driver without the token, or with a wrong one, is turned away."""
    raylets = [p for p in live.below() if "raylet" in p.name()]
    address = next(a.split("=", 1)[1] for p in raylets for a in p.cmdline() if a.startswith("--gcs-address="))
    code = f"import ray; ray.init(address={address!r}, logging_level='ERROR'); print('joined')"
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    base = {k: v for k, v in live.environment.items() if not k.startswith("RAY_AUTH")} | {
        "HOME": str(tmp_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a driver on loopback, as the cluster is
    }

    def join(**extra: str) -> str:
        command = [sys.executable, "-c", code]
        try:
            done = subprocess.run(command, env=base | extra, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired as waiting:  # Ray asks again and again, and is not let in
            return str(waiting.stdout or b"")
        return done.stdout

    token = {"RAY_AUTH_MODE": "token"}
    assert "joined" in join(**token, RAY_AUTH_TOKEN_PATH=str(live.home / "ray_token"))
    assert "joined" not in join()
    assert "joined" not in join(**token, RAY_AUTH_TOKEN_PATH=str(wrong))


def test_a_service_that_is_killed_in_mid_job_forgets_nothing_and_runs_nothing_twice(live):
    steps = Steps("killed in mid-job")
    with bioseq.connect(live.url, retries=12) as remote:
        labels = f"file:{remote.upload(LABELS)['id']}"
        jobs = [
            remote.submit("finetune", {"labels": labels, "register": f"kept{i}", **FINETUNE})["id"]
            for i in range(3)
        ]
        until = time.monotonic() + 240
        while sum(remote.job(job)["state"] == "RUNNING" for job in jobs) < 2:
            assert time.monotonic() < until
            time.sleep(0.3)
        steps.done("three submitted, two running")
        live.kill()
        steps.done("everything killed")
        rows = sqlite3.connect(live.home / "service.sqlite").execute("select id, state from jobs").fetchall()
        states = dict(rows)
        assert all(states[job] in ("PENDING", "RUNNING") for job in jobs)
        live.start()
        steps.done("service ready again")
        ended = [remote.wait(job, timeout=900) for job in jobs]
        steps.done("all three ended")
        assert [job["state"] for job in ended] == ["SUCCEEDED"] * 3, [job["reason"] for job in ended]
        assert sorted(job["attempt"] for job in ended) == [1, 2, 2]
        assert [job["registered"] for job in ended] == [f"kept{i}@1" for i in range(3)]
        for job in jobs:
            assert remote.logs(job).count("held-out rows") == 1
    steps.show()

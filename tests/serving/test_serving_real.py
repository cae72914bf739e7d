"""`bioseq serve` as a user starts it: one real Ray Serve for this file. Faults, guarding, and leaving nothing behind."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from serving_helpers import CANARY, SEQS

import bioseq
from bioseq.bundles.registry import Registry

pytestmark = pytest.mark.timeout(300)
BIOSEQ = [sys.executable, "-m", "bioseq"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service:
    """The command in a session of its own."""

    def __init__(self, home: Path, tmp: str, *options: str):
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {**os.environ, "BIOSEQ_HOME": str(home), "RAY_TMPDIR": tmp, "OMP_NUM_THREADS": "1"}
        self.log = open(home / "serve.log", "w+")  # noqa: SIM115 - open as long as the process
        command = [
            *BIOSEQ,
            "serve",
            "--port",
            str(self.port),
            "--threads",
            "1",
            "--drain",
            "20",
            "--homologs",
            "none",
            *options,
        ]
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def wait(self) -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until:
            assert self.process.poll() is None, self.text()
            try:
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"not ready: {self.text()}")

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def family(self) -> list[psutil.Process]:
        """Every process that this service started, however they were reparented."""
        found = []
        for p in psutil.process_iter():
            try:
                if p.status() != psutil.STATUS_ZOMBIE and p.environ().get("BIOSEQ_HOME") == str(self.home):
                    found.append(p)
            except (psutil.Error, OSError):
                continue
        return found

    def replica(self, name: str) -> psutil.Process:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for p in self.family():
                try:
                    if f"ServeReplica:bioseq:{name}" in " ".join(p.cmdline()):
                        return p
                except psutil.Error:
                    continue
            time.sleep(0.2)
        raise AssertionError(f"no {name} replica")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(90)
        self.log.close()
        return code


@pytest.fixture(scope="module")
def home(tmp_path_factory, bundles) -> Path:
    folder = tmp_path_factory.mktemp("home")
    registry = Registry(folder)
    registry.register(bundles["tiny"])
    registry.register(bundles["fold"])
    registry.alias("default", "tiny@1")
    return folder


@pytest.fixture(scope="module")
def service(home):
    tmp = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: Ray's socket paths have a limit
    made = Service(home, tmp)
    try:
        made.wait()
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()


@pytest.fixture(scope="module")
def want(home) -> np.ndarray:
    return bioseq.load("default", threads=1, registry=Registry(home)).embed(SEQS)


def near(got, want) -> bool:
    return bool((np.linalg.norm(got - want, axis=1) <= 1e-5 * np.linalg.norm(want, axis=1)).all())


def test_answers_like_the_local_predictor(service, want):
    with bioseq.connect(service.url) as remote:
        assert near(remote.embed(SEQS), want)
        assert remote.predict(SEQS, ["fold"])[0]["fold"]["head"] == "fold"
    r = httpx.post(f"{service.url}/v1/embed", json={"sequences": ["MK1"]}, headers={"X-Request-ID": "me-1"})
    assert r.status_code == 422 and r.headers.get_list("x-request-id") == ["me-1"]
    wanted = ("bioseq_requests_total", "bioseq_engine_tokens_total")
    until = time.monotonic() + 60  # the engine hands its counts over from time to time
    while not all(name in (text := httpx.get(f"{service.url}/metrics").text) for name in wanted):
        assert time.monotonic() < until, text
        time.sleep(0.5)


def test_ports_and_token(service):
    """Ray asks for a token that only the user can read; all its ports are on loopback; so is the service."""
    token = service.home / "ray_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
    heads = [p for p in service.family() if "dashboard.py" in " ".join(p.cmdline())]
    assert heads
    for p in heads:
        assert "--host=127.0.0.1" in p.cmdline()
        assert p.environ()["RAY_AUTH_MODE"] == "token"
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for p in service.family()
        for connection in p.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert ("127.0.0.1", service.port) in listening and len(listening) > 5
    assert {ip for ip, _ in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_slow_body_and_large_answer(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as s:
        s.sendall(
            b"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\n\r\n{"
        )
        assert b" 413 " in s.recv(4096)
    long = ["ACDEFGHIKLMNPQRSTVWY" * 50] * 60  # 60,000 residues: several slices, 15 MB
    with bioseq.connect(service.url) as remote:
        rows = remote.embed(long, per_residue=True)
    assert len(rows) == 60 and all(np.allclose(r, rows[0], rtol=1e-3, atol=1e-4) for r in rows)


def private_bytes(service: Service) -> int:
    """Of the processes that a body passes: Serve's proxies and the ingress."""
    total = 0
    for p in service.family():
        try:
            if any(name in " ".join(p.cmdline()) for name in ("ProxyActor", "ServeReplica:bioseq:api")):
                memory = p.memory_info()
                total += memory.rss - memory.shared
        except psutil.Error:
            continue
    return total


def test_an_upload_waits_for_an_ingress_that_stands_still(service):
    """192 MiB, sent to a replica that reads nothing: what is on its way is a few MiB, and then it is whole."""
    piece, count = b"M" * (1 << 20), 192
    sent, answers = 0, []

    def pieces():
        nonlocal sent
        for _ in range(count):
            yield piece
            sent += 1

    def upload():
        answers.append(
            httpx.post(
                f"{service.url}/v1/files?name=a.fasta", content=pieces(), timeout=120,
                headers={"content-type": "application/octet-stream"},
            )
        )  # fmt: skip

    before, ingress = private_bytes(service), service.replica("api")
    thread = threading.Thread(target=upload)
    ingress.suspend()
    try:
        thread.start()
        stood = -1
        while stood != sent or sent == 0:  # until no more is taken
            stood = sent
            time.sleep(1.5)
        assert sent < 64, f"{sent} MiB were taken though nobody reads"
        assert private_bytes(service) < before + (64 << 20)
    finally:
        ingress.resume()
        thread.join(120)
    (answer,) = answers
    assert answer.status_code == 201 and answer.json()["bytes"] == count << 20
    assert answer.json()["sha256"] == hashlib.sha256(piece * count).hexdigest()
    _read_slowly(service, f"/v1/files/{answer.json()['id']}/content", piece * count, before)


def _read_slowly(service: Service, path: str, whole: bytes, before: int) -> None:
    """A reader that takes nothing for a while: the file waits on disk, and comes whole."""
    with httpx.stream("GET", service.url + path, timeout=60) as answer:
        time.sleep(3)
        assert private_bytes(service) < before + (64 << 20), "an answer that nobody reads is kept in memory"
        assert hashlib.sha256(b"".join(answer.iter_raw())).digest() == hashlib.sha256(whole).digest()


def test_an_answer_that_nobody_reads_is_not_computed_ahead(service):
    """Its pieces are asked for as they are taken, so that the engine is free for others; and it comes whole."""
    long = ["ACDEFGHIKLMNPQRSTVWY" * 50] * 400  # 400,000 residues, 300 MB

    def computed() -> float:
        time.sleep(2.5)  # the engine reports each second
        text = httpx.get(f"{service.url}/metrics", timeout=30).text
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith("bioseq_engine_tokens_total")
        )

    before = computed()
    body = {"sequences": long, "per_residue": True, "layers": [0, 1, -1]}
    accept = {"Accept": "application/vnd.apache.arrow.stream"}
    with httpx.stream("POST", f"{service.url}/v1/embed", json=body, headers=accept, timeout=120) as answer:
        assert answer.status_code == 200
        ahead = -1.0
        while ahead != (now := computed() - before):
            ahead = now
        assert 0 < ahead < 200_000, "all of it is computed though nobody reads"
        assert bioseq.connect(service.url).embed(SEQS).shape[0] == len(SEQS)
        size = sum(len(part) for part in answer.iter_raw())
    assert size > 400_000 * 3 * 4 * 32


def under_load(service, want, seconds_after, trouble, *, retries=8):
    """Four clients ask without pause while `trouble` happens; every answer is checked. Returns the longest
    pause between answers, in seconds."""
    stop, errors, times = threading.Event(), [], []

    def ask():
        with bioseq.connect(service.url, retries=retries) as remote:
            while not stop.is_set():
                try:
                    assert near(remote.embed(SEQS), want)
                    times.append(time.monotonic())
                except Exception as error:
                    errors.append(error)
                    return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    time.sleep(1.5)
    trouble()
    struck = time.monotonic()
    while time.monotonic() < struck + 120:
        if any(t > struck + seconds_after for t in list(times)) or errors:
            break
        time.sleep(0.2)
    time.sleep(1)
    stop.set()
    for t in threads:
        t.join(120)
    assert not errors, errors[0]
    assert any(t > struck + seconds_after for t in times)
    return max(b - a for a, b in zip(times, times[1:]))


def test_engine_killed_under_load_loses_nothing(service, want):
    """SIGKILL of the only engine: what was accepted is answered, and rightly. No retry by the client is needed."""
    before = service.replica("engine")
    pause = under_load(service, want, 3, before.kill, retries=0)
    print(f"engine killed: {pause:.1f} s without an answer")
    assert service.replica("engine").pid != before.pid


def test_ingress_killed_is_hidden_by_the_client(service, want):
    before = service.replica("api")
    pause = under_load(service, want, 3, before.kill)
    print(f"ingress killed: {pause:.1f} s without an answer")


def test_registered_head_answers_within_five_seconds(service, bundles):
    service.wait()
    registry = Registry(service.home)
    registry.register(bundles["localization"], "place")
    began = time.monotonic()
    r = httpx.post(f"{service.url}/v1/predict", json={"sequences": SEQS, "heads": ["place"]}, timeout=60)
    assert r.status_code == 200 and time.monotonic() - began < 30
    assert r.json()["heads"] == {"place": "place@1"}


def test_refusals(service, tmp_path):
    """Off loopback without keys, a port that is taken, a model that is not there: exit 1, a clear message."""
    home = tmp_path / "empty"
    environment = {**service.environment, "BIOSEQ_HOME": str(service.home)}
    for options, text in (
        (["--host", "0.0.0.0", "--database", f"sqlite:///{home}/x.sqlite"], "no API key exists"),
        (["--port", str(service.port)], "cannot listen"),
        (["--model", "nope"], "no model"),
    ):
        done = subprocess.run(
            [*BIOSEQ, "serve", *options], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr


def test_drains_and_leaves_nothing(service, want):
    """SIGTERM with requests in flight: each is answered or turned away cleanly, and no process stays."""
    service.wait()
    outcomes, stop = [], threading.Event()

    def ask():
        with httpx.Client(base_url=service.url, timeout=60) as http:
            while not stop.is_set():
                try:
                    r = http.post("/v1/embed", json={"sequences": [*SEQS, CANARY] * 5})
                except httpx.TransportError as error:
                    outcomes.append(type(error).__name__)
                    return
                outcomes.append(r.status_code)
                if r.status_code != 200:
                    assert r.json()["code"] == "service.draining"
                    return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    time.sleep(1)
    service.process.send_signal(signal.SIGTERM)
    for t in threads:
        t.join(60)
    stop.set()
    assert outcomes.count(503) == 4 and set(outcomes) == {200, 503}, outcomes
    service.process.wait(90)
    told = service.text().splitlines()
    assert service.stop() == 0
    until = time.monotonic() + 30
    while service.family() and time.monotonic() < until:
        time.sleep(0.3)
    assert not service.family()
    # An engine and an ingress were killed before: what Ray had to say of it is in a file of its own.
    assert told and all(line.startswith("bioseq serve:") for line in told), told
    assert "worker died" in (service.home / "logs" / "ray.log").read_text()


def test_no_sequence_on_disk(service):
    """After all of this: neither our logs nor Ray's hold a sequence."""
    folders = [service.home / "logs", Path(service.environment["RAY_TMPDIR"])]
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file() and not f.is_symlink()]
    assert any(f.name == "access.jsonl" for f in files)
    for file in files:
        content = file.read_bytes()
        for secret in (CANARY, SEQS[0], SEQS[1]):
            assert secret.encode() not in content, file


def test_a_signal_to_the_whole_process_group_stops_it_too(home):
    """As systemd sends it: Ray gets it as well, and must not be waited for."""
    made = Service(home, tempfile.mkdtemp(prefix="r", dir="/tmp"))
    try:
        made.wait()
        os.killpg(made.process.pid, signal.SIGTERM)
        assert made.process.wait(60) == 0
        until = time.monotonic() + 30
        while made.family() and time.monotonic() < until:
            time.sleep(0.3)
        assert not made.family()
    finally:
        for process in made.family():
            process.kill()
        made.log.close()


@pytest.mark.parametrize("failing, code", [(False, 0), (True, 1)])
def test_a_ray_that_does_not_end_is_not_waited_for(failing, code):
    """A raylet that outlives its GCS waits for it for minutes; an error on its way out is told all the same."""
    script = f"""
import time
from serving.cluster import running
running._ray_lives = lambda: {failing}
with running._Watchdog(0.5) as watchdog:
    watchdog.error = RuntimeError("the port is taken") if {failing} else None
    watchdog.start()
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == code
    assert ("the port is taken" if failing else "Ray does not answer") in done.stderr

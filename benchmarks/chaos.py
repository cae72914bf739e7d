"""The service under everything at once: mixed load, slow bodies, garbage, killed processes, a database that stops.

    python benchmarks/chaos.py [--seconds 600] [--clients 64]

One command starts `bioseq serve` on Ray (two engines) with PostgreSQL, makes keys, and for `--seconds`:

  clients      mixed requests (embed, predict, score, estimate, models, jobs), each answer compared with what the library
               computed before; 50 connections that send a body byte by byte; garbage; 1,000 connections that say nothing; 200
               followers of a running job's log
  faults       an engine is killed at a quarter of the time, an ingress at half, and PostgreSQL stops for 20 s at two thirds

Counted: answers by request and status, wrong ones (must be 0), those lost with a killed ingress (a 500 that Ray's own proxy gives, or a
closed connection), p50 and p99 of the right ones, and the memory of every process in the first and last third. The exit code is 1
for a wrong answer, a 500, or a request that is still refused 60 s after the last fault.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import multiprocessing as mp
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from _common import host, read_proteins, versions, write_result
from serve import ARROW, answer_of, check, percentiles

WILD = "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTTGKLPVPWPTLVTTFSYGVQCFSRYPDHMKQ"
MUTANTS = ["K3A", "G4W", "E6P:L7D", "T9C"]
HEAD = "target_class"
LOST = " of Ray's proxy"  # whose ingress died with the request in it; our clients ask again
BINARY = {"Content-Type": "application/octet-stream"}
PARTS = ("embed",) * 8 + ("predict",) + ("score",) * 3 + ("estimate",) * 3 + ("models",) * 3 + ("jobs",) * 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A server of our own in a temporary folder, on a Unix socket. It refuses to run as root."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            raise SystemExit("PostgreSQL is not installed: apt-get install -y postgresql")
        self.programs, self.folder = found[-1].parent, Path(tempfile.mkdtemp(prefix="bspg-", dir="/tmp"))
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            self.user = {"user": "postgres"}
        self.run("initdb", "-D", str(self.folder / "data"), "-U", "bioseq", "-A", "trust", "-E", "UTF8")
        self.start()
        self.run("createdb", "-h", str(self.folder), "-U", "bioseq", "chaos")
        self.url = f"postgresql://bioseq@/chaos?host={self.folder}"

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), *arguments]
        environment = {"LC_ALL": "C", "PATH": os.environ["PATH"]}
        subprocess.run(
            command, check=True, capture_output=True, cwd=self.folder, env=environment, **self.user
        )

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c max_connections=100"
        data, log = str(self.folder / "data"), str(self.folder / "log")
        self.run("pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", "fast", "-w", "stop")

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class Service:
    """`bioseq serve` with a home of its own."""

    def __init__(self, database: str):
        self.root = Path(tempfile.mkdtemp(prefix="bsc-", dir="/tmp"))  # short: Ray's sockets lie below
        self.home, self.port = self.root / "home", free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = os.environ | {
            "BIOSEQ_HOME": str(self.home), "RAY_TMPDIR": str(self.root), "OMP_NUM_THREADS": "1", "BIOSEQ_DATABASE": database,
        }  # fmt: skip
        self.keys = [self._key(f"client{i}") for i in range(4)]
        with open(self.root / "serve.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bioseq", "serve", "--port", str(self.port), "--threads", "1", "--engines", "2",
                 "--database", database, "--homologs", "none"],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit((self.root / "serve.log").read_text()[-3000:])
            time.sleep(0.5)

    def _key(self, name: str) -> str:
        command = [sys.executable, "-m", "bioseq", "keys", "create", name, "--scopes", "read,predict,train"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return next(word for word in (done.stdout + done.stderr).split() if word.startswith("bsk_"))

    def processes(self) -> Iterator[tuple[str, psutil.Process]]:
        """(what it is, process) of all that belong to it, found by their environment."""
        for process in psutil.process_iter(["cmdline"]):
            try:
                if process.environ().get("BIOSEQ_HOME") != str(self.home):
                    continue
            except (psutil.Error, OSError):
                continue
            title = " ".join(process.info["cmdline"] or [])
            kinds = (
                "ServeReplica:bioseq:engine",
                "ServeReplica:bioseq:api",
                "ServeReplica:bioseq:homologs",
                "ServeController",
                "raylet",
                "gcs_server",
            )
            yield next((k.rsplit(":", 1)[-1] for k in kinds if k in title), "other"), process

    def kill(self, kind: str) -> bool:
        for name, process in self.processes():
            if name == kind:
                process.send_signal(signal.SIGKILL)
                return True
        return False

    def close(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(120)
        for _, process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.root, ignore_errors=True)


def expected(sequences: list[str], queue: Any) -> None:
    """What the library answers, in a process of its own."""
    import bioseq

    model = bioseq.load("default", threads=1)
    told = model.predict(sequences[:4], [HEAD])
    queue.put(
        {
            "embed": model.embed(sequences),
            "predict": [t[HEAD]["probabilities"] for t in told],
            "score": model.score(WILD, MUTANTS, homologs="none"),
        }
    )


def load(
    url: str, keys: list[str], sequences: list[str], wanted: dict[str, Any], job: str, args: Any, queue: Any
) -> None:
    queue.put(asyncio.run(_load(url, keys, sequences, wanted, job, args)))


async def _load(
    url: str, keys: list[str], sequences: list[str], wanted: dict[str, Any], job: str, args: Any
) -> dict[str, Any]:
    began = time.monotonic()
    until = began + args.seconds
    count: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    times: dict[str, list[float]] = collections.defaultdict(list)
    refused: list[tuple[float, str]] = []

    async def one(http: httpx.AsyncClient, dice: random.Random, key: str) -> None:
        what, headers = dice.choice(PARTS), {"Authorization": f"Bearer {key}"}
        at = dice.randrange(len(sequences) - 4)
        some = sequences[at : at + 4]
        if what == "embed":
            ask = http.post("/v1/embed", json={"sequences": some}, headers=headers | ARROW)
        elif what == "predict":
            at = dice.randrange(4)
            ask = http.post(
                "/v1/predict", json={"sequences": [sequences[at]], "heads": [HEAD]}, headers=headers
            )
        elif what == "score":
            body = {"sequence": WILD, "mutants": MUTANTS, "homologs": "none"}
            ask = http.post("/v1/score", json=body, headers=headers)
        elif what == "estimate":
            ask = http.post(
                "/v1/estimate", json={"kind": "embed", "lengths": [len(s) for s in some]}, headers=headers
            )
        else:
            ask = http.get(f"/v1/{what}", headers=headers)
        start = time.monotonic()
        try:
            r = await ask
        except httpx.TransportError as error:
            count[f"{what} {type(error).__name__}"] += 1
            refused.append((start - began, what))
            await asyncio.sleep(0.2)
            return
        count[f"{what} {r.status_code}{'' if r.status_code != 500 or code_of(r) else LOST}"] += 1
        if r.status_code == 429 or r.status_code >= 500:
            refused.append((start - began, f"{what} {r.status_code} {code_of(r)}"))
            await asyncio.sleep(min(float(r.headers.get("retry-after", 1)), 2.0))
        if r.status_code != 200:
            return
        times[what].append(time.monotonic() - start)
        if what == "embed" and not check(r.content, wanted["embed"][at : at + 4]) < 1e-4:
            wrong.append("embed")
        if what == "predict":
            told = r.json()["data"][0]["predictions"][HEAD]["probabilities"]
            if any(abs(told[k] - v) > 1e-3 for k, v in wanted["predict"][at].items()):
                wrong.append("predict")
        if what == "score" and not np.allclose(r.json()["scores"], wanted["score"], atol=1e-3):
            wrong.append("score")
        if what == "estimate" and r.json()["tokens"] != sum(len(s) + 2 for s in some):
            wrong.append("estimate")

    async def client(number: int) -> None:
        dice = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while time.monotonic() < until:
                await one(http, dice, keys[number % len(keys)])

    async def slow(number: int) -> None:
        """A body of 2,000 bytes, one each half second."""
        head = f"POST /v1/embed HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {keys[0]}\r\nContent-Type: application/json\r\nContent-Length: 2000\r\n\r\n"
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
                writer.write(head.encode())
                answer = asyncio.create_task(reader.readline())  # before the body is whole, if at all
                while time.monotonic() < until and not answer.done():
                    with contextlib.suppress(OSError):
                        writer.write(b" ")
                        await writer.drain()
                    await asyncio.wait([answer], timeout=0.5)
                answer.cancel()
                line = (await asyncio.gather(answer, return_exceptions=True))[0]
                said = line[9:12].decode() if isinstance(line, bytes) else ""
                count[f"slow body {said or ('closed' if time.monotonic() < until else 'open')}"] += 1
                writer.close()
            await asyncio.sleep(0.5)

    async def garbage(number: int) -> None:
        dice = random.Random(1000 + number)
        bodies = [
            b"\x00\xff" * 50, b"{", b"[]", b'{"sequences": "MKV"}', b'{"sequences": [1e999]}', b'{"sequences": ["M1K"]}',
            b'{"sequences": ["' + b"M" * 5000 + b'"]}', b"[" * 5000, b'{"sequences": []}', b'{"heads": ["nope"], "sequences": ["MKV"]}',
        ]  # fmt: skip
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while time.monotonic() < until:
                route = dice.choice(("/v1/embed", "/v1/predict", "/v1/score", "/v1/jobs", "/v1/nowhere"))
                headers = {"Authorization": f"Bearer {dice.choice([*keys, 'bsk_wrong'])}", "Content-Type": "application/json"}  # fmt: skip
                try:
                    r = await http.post(route, content=dice.choice(bodies), headers=headers)
                    count[f"garbage {r.status_code}{'' if r.status_code != 500 or code_of(r) else LOST}"] += 1
                    if r.status_code == 200:
                        wrong.append("garbage was taken")
                except httpx.TransportError as error:
                    count[f"garbage {type(error).__name__}"] += 1
                await asyncio.sleep(0.2)

    async def idle() -> None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
            count["idle connections"] += 1
            await asyncio.sleep(max(0.0, until - time.monotonic()))
            writer.close()

    async def follower(number: int) -> None:
        headers = {"Authorization": f"Bearer {keys[0]}"}
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while time.monotonic() < until:
                try:
                    async with http.stream("GET", f"/v1/jobs/{job}/logs?follow=true", headers=headers) as r:
                        count[f"follow {r.status_code}"] += 1
                        async for _ in r.aiter_lines():
                            if time.monotonic() > until:
                                return
                except httpx.TransportError as error:
                    count[f"follow {type(error).__name__}"] += 1
                await asyncio.sleep(5)

    tasks = [idle() for _ in range(args.idle)] + [follower(i) for i in range(args.followers)]
    tasks += [slow(i) for i in range(50)] + [garbage(i) for i in range(4)]
    everything = asyncio.gather(*(client(i) for i in range(args.clients)), *tasks)
    await everything
    return {
        "answers": dict(sorted(count.items())), "wrong": dict(collections.Counter(wrong)),
        "milliseconds": {k: percentiles(v) for k, v in sorted(times.items())},
        "refused_by_ten_seconds": by_time(refused),
    }  # fmt: skip


def code_of(r: httpx.Response) -> str:
    try:
        return str(r.json().get("code", ""))
    except ValueError:
        return ""


def by_time(refused: list[tuple[float, str]]) -> dict[str, dict[str, int]]:
    out: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for at, what in refused:
        out[int(at // 10) * 10][what] += 1
    return {str(k): dict(v) for k, v in sorted(out.items())}


def start_job(url: str, key: str, sequences: list[str]) -> str:
    """A screen of shuffled proteins, long enough to be followed."""
    dice = random.Random(0)
    text = "".join(f">s{i}\n{''.join(dice.sample(s, len(s)))}\n" for i, s in enumerate(sequences * 20))
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
        file = (
            http.post("/v1/files", content=text, params={"name": "library.fasta"}, headers=BINARY)
            .raise_for_status()
            .json()["id"]
        )
        spec = {"inputs": [f"file:{file}"], "heads": [HEAD], "workers": 1}
        return str(
            http.post("/v1/jobs", json={"kind": "screen", "spec": spec}).raise_for_status().json()["id"]
        )


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=600.0)
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--idle", type=int, default=1000)
    p.add_argument("--followers", type=int, default=200)
    p.add_argument("--out")
    args = p.parse_args()
    sequences = [s for s in read_proteins(128, None) if len(s) <= 400][:64]
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=expected, args=(sequences, queue))
    process.start()
    wanted = answer_of(process, queue)
    database = Postgres()
    service = None
    memory: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    faults: dict[str, float] = {}
    try:
        service = Service(database.url)
        job = start_job(service.url, service.keys[0], sequences)
        given = (service.url, service.keys, sequences, wanted, job, args, queue)
        clients = context.Process(target=load, args=given)
        clients.start()
        began, stopped = time.monotonic(), 0.0
        plan = [("engine", 1 / 4), ("api", 1 / 2), ("database", 2 / 3)]
        while clients.is_alive() and queue.empty():
            now = time.monotonic() - began
            if plan and now > plan[0][1] * args.seconds:
                what, _ = plan.pop(0)
                if what == "database":
                    database.stop()
                    stopped = now
                    faults["database stopped"] = round(now, 1)
                elif service.kill(what):
                    faults[f"{what} killed"] = round(now, 1)
                else:
                    raise SystemExit(f"no process of {what} was found")
            if stopped and now - stopped > min(20.0, args.seconds / 10) and "database back" not in faults:
                database.start()
                faults["database back"] = round(time.monotonic() - began, 1)
            for name, each in service.processes():
                with contextlib.suppress(psutil.Error):
                    memory[f"{name} {each.pid}"].append((now, each.memory_info().rss / 2**20))
            time.sleep(2)
        found = answer_of(clients, queue)
        clients.join()
    finally:
        if service is not None:
            service.close()
        database.close()
    thirds = {}
    for name, rows in memory.items():
        if rows[-1][0] - rows[0][0] > args.seconds / 3:
            third = max(1, len(rows) // 3)
            first, last = (np.mean([m for _, m in part]) for part in (rows[:third], rows[-third:]))
            thirds[name] = {"first_third": round(float(first), 1), "last_third": round(float(last), 1)}
    late = {
        k: v for k, v in found["refused_by_ten_seconds"].items() if float(k) > faults["database back"] + 60
    }
    errors = sum(n for name, n in found["answers"].items() if name.endswith(" 500"))  # of our own
    result = {
        "command": " ".join(["python", "benchmarks/chaos.py", *sys.argv[1:]]), "seconds": args.seconds, "clients": args.clients,
        "faults_at": faults, **found, "memory_mib": thirds, "host": host(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps({k: result[k] for k in ("faults_at", "answers", "wrong", "milliseconds")}, indent=1))
    print(write_result("chaos", result, args.out))
    down = [k for v in late.values() for k in v if " 429 " not in k]
    return int(bool(found["wrong"]) or errors > 0 or bool(down))


if __name__ == "__main__":
    sys.exit(main())

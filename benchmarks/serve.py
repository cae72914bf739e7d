"""The service: engine efficiency, latency over a no-op chain, overload, memory, throughput against latency.

    python benchmarks/serve.py [--model default] [--seconds 60] [--minutes 10] [--threads N]
    python benchmarks/serve.py --seconds 15 --minutes 1        # short

The claims (docs/benchmarks.md), each measured in this one run on the same proteins:

  efficiency   tokens per CPU-second of the engine's process, saturated by 64 clients of 16 sequences (Arrow),
               against the offline predictor's with as many threads: >= 90 % (goal 97 %); wall-clock ratio beside it
  latency      p50 of one short request, over the p50 of a no-op FastAPI -> handle -> replica chain on the same Ray
               and the engine's own time: <= 8 ms (goal 3 ms). The two kinds of request take turns.
  overload     requests at three times the measured capacity, not waiting for answers: no 5xx, 429 for the rest, and
               the p99 of the accepted within the configured queue time
  memory       resident memory of engine and ingress under steady load
  curve        throughput and latency percentiles at 1 to 64 clients; a PNG beside the result

The clients run on the same cores as the service, in a process of their own. Answers are checked against the
offline predictor's in every part.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing as mp
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
from _common import host, read_proteins, versions, write_result
from fastapi import Body

ARROW = {"Accept": "application/vnd.apache.arrow.stream"}


def offline(model: str, sequences: list[str], threads: int, seconds: float, queue: Any) -> None:
    """Tokens per wall and per CPU second of `Predictor.run` in a process of its own, and the answers."""
    from bioseq.backbones.pooling import EmbedOptions
    from bioseq.inference.loading import load

    predictor = load(model, threads=threads)
    queries = [predictor.prepare(s, embed=EmbedOptions()) for s in sequences]
    predictor.run(queries[:32])
    tokens = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        answers = predictor.run(queries)
        tokens += sum(w.tokens for w in queries)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    short = predictor.prepare(sequences[0][:50], embed=EmbedOptions())
    times = []
    for _ in range(50):
        start = time.perf_counter()
        predictor.run([short])
        times.append(time.perf_counter() - start)
    queue.put(
        {
            "tokens_per_s": tokens / wall,
            "tokens_per_cpu_s": tokens / cpu,
            "short_ms": 1000 * float(np.median(times)),
            "answers": np.stack([a.embedding for a in answers]),
        }
    )


def apart(function: Any, *args: Any) -> Any:
    """The result of `function(*args, queue)` in a fresh process."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*args, queue))
    process.start()
    result = answer_of(process, queue)
    process.join()
    return result


def answer_of(process: Any, queue: Any) -> Any:
    """What the process puts; a process that dies first ends the benchmark."""
    while True:
        try:
            return queue.get(timeout=1)
        except Empty:
            if not process.is_alive() and queue.empty():
                raise SystemExit(f"a part failed with exit code {process.exitcode}") from None


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    if not values:
        return {}
    named = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
    return {k: round(1000 * float(np.percentile(values, q)), 2) for k, q in named.items()}


def check(content: bytes, want: np.ndarray) -> float:
    """Relative error of an Arrow answer."""
    import pyarrow as pa

    column = pa.ipc.open_stream(content).read_all()["embedding"].combine_chunks()
    got = column.flatten().to_numpy(zero_copy_only=False).reshape(want.shape)
    return float((np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).max())


def closed_loop(
    url: str, sequences: list[str], answers: np.ndarray, clients: int, each: int, seconds: float, queue: Any
) -> None:
    """`clients` that each ask for `each` sequences, again and again."""
    queue.put(asyncio.run(_closed(url, sequences, answers, clients, each, seconds)))


async def _closed(
    url: str, sequences: list[str], answers: np.ndarray, clients: int, each: int, seconds: float
) -> dict[str, Any]:
    import httpx

    out: dict[str, Any] = {"latencies": [], "statuses": {}, "error": 0.0, "tokens": 0}
    until = time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def client(number: int) -> None:
            dice = random.Random(number)
            while time.perf_counter() < until:
                at = dice.randrange(len(sequences) - each + 1)
                body = {"sequences": sequences[at : at + each]}
                start = time.perf_counter()
                r = await http.post("/v1/embed", json=body, headers=ARROW)
                now = time.perf_counter()
                out["statuses"][r.status_code] = out["statuses"].get(r.status_code, 0) + 1
                if r.status_code == 200:
                    out["error"] = max(out["error"], check(r.content, answers[at : at + each]))
                    out["latencies"].append(now - start)
                    out["tokens"] += sum(len(s) + 2 for s in body["sequences"])

        began = time.perf_counter()
        await asyncio.gather(*(client(i) for i in range(clients)))
        out["seconds"] = time.perf_counter() - began  # with the answers that were still to come
    return out


def open_loop(
    url: str, sequences: list[str], answers: np.ndarray, rate: float, each: int, seconds: float, queue: Any
) -> None:
    """Requests at `rate` a second, whether answered or not."""
    queue.put(asyncio.run(_open(url, sequences, answers, rate, each, seconds)))


async def _open(
    url: str, sequences: list[str], answers: np.ndarray, rate: float, each: int, seconds: float
) -> dict[str, Any]:
    import httpx

    out: dict[str, Any] = {"latencies": [], "statuses": {}, "error": 0.0, "broken": 0}
    dice = random.Random(1)
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)
    ) as http:

        async def one(at: int) -> None:
            start = time.perf_counter()
            try:
                r = await http.post("/v1/embed", json={"sequences": sequences[at : at + each]}, headers=ARROW)
            except httpx.TransportError:
                out["broken"] += 1
                return
            out["statuses"][r.status_code] = out["statuses"].get(r.status_code, 0) + 1
            if r.status_code == 200:
                out["latencies"].append(time.perf_counter() - start)
                out["error"] = max(out["error"], check(r.content, answers[at : at + each]))
            elif r.status_code == 429:
                assert int(r.headers["retry-after"]) >= 1

        tasks = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            tasks.append(asyncio.create_task(one(dice.randrange(len(sequences) - each + 1))))
            await asyncio.sleep(dice.expovariate(rate))
        await asyncio.gather(*tasks)
    return out


def turns(url: str, sequence: str, count: int, queue: Any) -> None:
    """A no-op request and a short one, in turns over one connection each; seconds."""
    import httpx

    times: dict[str, list[float]] = {"noop": [], "short": []}
    with httpx.Client(base_url=url, timeout=60) as http:
        for i in range(count + 20):
            for kind, path, body in (
                ("noop", "/noop/", {"sequences": [sequence]}),
                ("short", "/v1/embed", {"sequences": [sequence]}),
            ):
                start = time.perf_counter()
                r = http.post(path, json=body)
                r.raise_for_status()
                if i >= 20:
                    times[kind].append(time.perf_counter() - start)
    queue.put(times)


def noop_app() -> Any:
    """FastAPI -> handle -> replica, doing nothing."""
    from fastapi import FastAPI
    from ray import serve

    app = FastAPI()

    @serve.deployment(name="noop-engine", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    class Engine:
        async def answer(self, body: dict) -> dict:
            return body

    @serve.deployment(name="noop-api", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    @serve.ingress(app)
    class Api:
        def __init__(self, engine: Any):
            self.engine = engine

        # Only built-in names in the annotations: FastAPI reads them where this function was sent to.
        @app.post("/")
        async def post(self, body: dict = Body()) -> dict:  # noqa: B008
            return {"size": len(await self.engine.answer.remote(body))}

    return Api.bind(Engine.bind())


class Gauge:
    """The engine's own counters, from /metrics."""

    def __init__(self, url: str):
        self.url = url

    def read(self) -> dict[str, float]:
        import httpx

        found: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if line.startswith("bioseq_engine_") and 'process="engine' in line:
                name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
                found[name] = found.get(name, 0.0) + value
        return found

    def settled(self) -> dict[str, float]:
        """After the engines have reported again."""
        time.sleep(2.5)
        return self.read()


def processes() -> dict[str, Any]:
    """psutil processes of the engine and the ingress."""
    import psutil

    found = {}
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        for name in ("engine", "api"):
            if f"ServeReplica:bioseq:{name}" in title:
                found[name] = process
    return found


def memory(url: str, sequences: list[str], answers: np.ndarray, minutes: float) -> dict[str, Any]:
    """Resident memory of engine and ingress over `minutes` of steady load by 8 clients."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    load = context.Process(target=closed_loop, args=(url, sequences, answers, 8, 8, 60 * minutes, queue))
    load.start()
    samples: dict[str, list[float]] = {"engine": [], "api": []}
    start = time.perf_counter()
    while time.perf_counter() - start < 60 * minutes:
        time.sleep(5)
        for name, process in processes().items():
            samples[name].append(process.memory_info().rss / 2**20)
    result = answer_of(load, queue)
    load.join()
    out: dict[str, Any] = {
        "minutes": minutes,
        "requests": sum(result["statuses"].values()),
        "statuses": result["statuses"],
    }
    for name, values in samples.items():
        # The first fifth warms caches up.
        rest = values[len(values) // 5 :]
        third = max(1, len(rest) // 3)
        out[f"{name}_mib"] = {
            "first_third": round(float(np.mean(rest[:third])), 1),
            "last_third": round(float(np.mean(rest[-third:])), 1),
            "highest": round(max(values), 1),
        }
    return out


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.5))
    x = [r["requests_per_s"] for r in rows]
    for name in ("p50", "p95", "p99"):
        ax.plot(x, [r[name] for r in rows], marker="o", label=name)
    for r in rows:
        ax.annotate(
            str(r["clients"]), (r["requests_per_s"], r["p50"]), textcoords="offset points", xytext=(4, -12)
        )
    ax.set(
        xlabel="requests per second",
        ylabel="latency, ms",
        yscale="log",
        title="One short sequence a request; clients beside the points",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="default")
    p.add_argument("--seconds", type=float, default=60.0, help="of each part")
    p.add_argument("--minutes", type=float, default=10.0, help="of the memory part; 0 leaves it out")
    p.add_argument("--only", choices=("timed", "memory"), help="leave the other part out")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--max-queue", type=float, default=10.0, help="seconds, for the overload part")
    p.add_argument("--proteins", type=int, default=256)
    p.add_argument("--fasta")
    p.add_argument("--out", help="result file (default: a dated one in benchmarks/results)")
    args = p.parse_args()
    timed, args.minutes = args.only != "memory", 0.0 if args.only == "timed" else args.minutes
    sequences = read_proteins(args.proteins, args.fasta)
    print("offline predictor ...", file=sys.stderr, flush=True)
    alone = apart(offline, args.model, sequences, args.threads, args.seconds if timed else 1.0)
    answers = alone.pop("answers")
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]]),
        "model": args.model,
        "threads": args.threads,
        "proteins": len(sequences),
        "offline": {k: round(v, 3) for k, v in alone.items()},
    }
    with tempfile.TemporaryDirectory(prefix="bioseq-bench-") as folder:
        serve_parts(args, Path(folder), sequences, answers, result)
    if timed:
        again = apart(offline, args.model, sequences, args.threads, args.seconds)
        again.pop("answers")
        result["offline_after"] = {k: round(v, 3) for k, v in again.items()}
        both = (alone["tokens_per_cpu_s"] + again["tokens_per_cpu_s"]) / 2
        wall = (alone["tokens_per_s"] + again["tokens_per_s"]) / 2
        e = result["efficiency"]
        e["ratio_per_cpu_s"] = round(e["tokens_per_cpu_s"] / both, 4)
        e["ratio_wall"] = round(e["tokens_per_s"] / wall, 4)
    result["host"], result["versions"] = host(), versions()
    path = write_result("serve" if timed else "serve-memory", result, args.out)
    print(path)
    if timed:
        plot(result["curve"], path.with_suffix(".png"))
    for part in ("efficiency", "latency", "overload", "memory"):
        print(part, result.get(part))
    return 0


def serve_parts(
    args: argparse.Namespace, folder: Path, sequences: list[str], answers: np.ndarray, result: dict[str, Any]
) -> None:
    """Everything that needs the running service; fills `result`."""
    from serving.cluster.running import ray_session
    from serving.settings import Settings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    common = {
        "port": port, "model": args.model, "threads": args.threads, "home": str(folder),
        "database": f"sqlite:///{folder / 's.sqlite'}", "homologs": "none", "log_file": str(folder / "access.jsonl"),
    }  # fmt: skip
    with ray_session(Settings(**common), None, None):
        from ray import serve
        from ray.serve.config import HTTPOptions
        from ray.serve.schema import LoggingConfig

        from serving.cluster.deployment import build

        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=port),
            logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        )
        try:
            serve.run(build(Settings(**common, max_queue_s=600.0)), name="bioseq", route_prefix="/")
            if args.only != "memory":
                told("latency")
                serve.run(noop_app(), name="noop", route_prefix="/noop")
                result["latency"] = latency(url, sequences[0][:50], max(50, int(args.seconds * 5)))
                serve.delete("noop")
                told("efficiency")
                result["efficiency"] = efficiency(url, sequences, answers, args.seconds)
                told("curve")
                result["curve"] = curve(args, url, sequences)
            if args.minutes:
                told("memory")
                result["memory"] = memory(url, sequences, answers, args.minutes)
            if args.only != "memory":
                told("overload")
                serve.run(
                    build(Settings(**common, max_queue_s=args.max_queue)), name="bioseq", route_prefix="/"
                )
                mean = float(np.mean([len(s) + 2 for s in sequences]))
                capacity = result["efficiency"]["tokens_per_s"] / (4 * mean)
                load = apart(open_loop, url, sequences, answers, 3 * capacity, 4, args.seconds)
                result["overload"] = {
                    "times_capacity": 3, "requests_per_s": round(3 * capacity, 2), "max_queue_s": args.max_queue,
                    "statuses": load["statuses"], "broken": load["broken"], "error": load["error"],
                    **percentiles(load["latencies"]),
                }  # fmt: skip
        finally:
            serve.shutdown()


def told(part: str) -> None:
    print(f"{part} ...", file=sys.stderr, flush=True)


def latency(url: str, short: str, count: int) -> dict[str, Any]:
    gauge = Gauge(url)
    before = gauge.settled()
    times = apart(turns, url, short, count)
    after = gauge.settled()
    batches = after["bioseq_engine_batches_total"] - before["bioseq_engine_batches_total"]
    busy = after["bioseq_engine_busy_seconds_total"] - before["bioseq_engine_busy_seconds_total"]
    own = 1000 * busy / batches
    noop, full = percentiles(times["noop"]), percentiles(times["short"])
    return {
        "noop_ms": noop,
        "short_ms": full,
        "engine_ms": round(own, 2),
        "over_noop_and_engine_ms": round(full["p50"] - noop["p50"] - own, 2),
    }


def efficiency(url: str, sequences: list[str], answers: np.ndarray, seconds: float) -> dict[str, Any]:
    gauge = Gauge(url)
    before = gauge.settled()
    load = apart(closed_loop, url, sequences, answers, 64, 16, seconds)
    after = gauge.settled()

    def more(name: str) -> float:
        return after[f"bioseq_engine_{name}"] - before[f"bioseq_engine_{name}"]

    return {
        "clients": 64,
        "sequences_a_request": 16,
        "tokens_per_cpu_s": round(more("tokens_total") / more("cpu_seconds_total"), 1),
        "tokens_per_s": round(load["tokens"] / load["seconds"], 1),
        "batch_fill": round(more("batch_fill_sum") / more("batch_fill_count"), 3),
        "statuses": load["statuses"],
        "error": load["error"],
        **percentiles(load["latencies"]),
    }


def curve(args: argparse.Namespace, url: str, sequences: list[str]) -> list[dict[str, Any]]:
    rows = []
    small = [s[:200] for s in sequences]
    answers = apart(embed_small, args.model, small, args.threads)
    seconds = max(5.0, args.seconds / 6)
    for clients in (1, 2, 4, 8, 16, 32, 64):
        load = apart(closed_loop, url, small, answers, clients, 1, seconds)
        row = {"clients": clients, "requests_per_s": round(len(load["latencies"]) / load["seconds"], 2)}
        rows.append({**row, "error": load["error"], **percentiles(load["latencies"])})
    return rows


def embed_small(model: str, sequences: list[str], threads: int, queue: Any) -> None:
    from bioseq.inference.loading import load

    queue.put(load(model, threads=threads).embed(sequences))


if __name__ == "__main__":
    sys.exit(main())

"""`make demo`: the main job on real proteins that the repository ships, under five minutes on a laptop.

1. embed 300 proteins and find each one's nearest neighbours: a ranked table and a report with a picture;
2. screen a library with duplicates and faulty records, with the shipped heads, by a drug hunter's question: a ranked
   table and a report that says why each hit is one;
3. start the service, ask it for predictions of the same proteins by HTTP, stop it.

Everything is written into ./demo, the registry home of this run too; no process is left behind.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import neighbours

import bioseq
from bioseq.bundles.registry import Registry
from serving.screening.tables.reasons import reason

OUT = Path("demo")
MARK = OUT / ".made-by-make-demo"
SAMPLE = Path(bioseq.__file__).parent / "sample"
HEADS = "localization,target_class"
# what a drug hunter would ask: reachable from outside the cell, and no extrapolation
WHERE = "(extracellular > 0.5 or plasma_membrane > 0.5) and target_class.ood_percentile < 0.95"
RANK = "target_class.peptidase"


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def fresh_folder() -> None:
    if OUT.exists() and not MARK.exists():
        sys.exit(f"{OUT.resolve()} exists and was not made by this demo: move it away first.")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    MARK.touch()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def find_neighbours() -> None:
    title("1. Nearest neighbours of 300 real proteins, by embedding")
    done = neighbours.run(SAMPLE / "proteins.fasta", OUT)
    for row in done["rows"][:5]:
        same = {True: "same family", False: "another family", None: "family not known here"}[row["same"]]
        print(f"  {row['id']:<10} nearest {row['names'][0]:<10} cosine {row['scores'][0]:.3f}  ({same})")
    rates = done["rates"]
    print(
        f"  The nearest neighbour is a relative for {rates['embedding']:.0%} of {rates['count']} proteins "
        f"(composition alone {rates['composition']:.0%}, chance {rates['chance']:.1%})."
    )
    print(f"  table:  {done['table'].resolve()}\n  report: {done['report'].resolve()}")


def screen_library(environment: dict[str, str]) -> None:
    title("2. Screening a library: which secreted or membrane proteins are likely peptidases?")
    run = OUT / "screen"
    command = [sys.executable, "-m", "bioseq", "screen", str(SAMPLE / "library.fasta"), "--heads", HEADS]
    question = ["--where", WHERE, "--rank", RANK]
    print(f"  of all records where {WHERE}, those with the highest {RANK}", flush=True)
    subprocess.run([*command, *question, "-o", str(run)], check=True, env=environment)
    heads = json.loads((run / "summary.json").read_text())["manifest_heads"]
    with open(run / "hits.csv", newline="") as handle:
        rows = list(itertools.islice(csv.DictReader(handle), 3))
    for row in rows:
        print(f"  {row['rank']}. {row['id']}: peptidase {float(row[RANK]):.0%}. {reason(row, heads)}")
    print(f"  table:  {(run / 'hits.csv').resolve()}\n  report: {(run / 'report.html').resolve()}")


def ask_service(environment: dict[str, str]) -> None:
    title("3. The same proteins, by HTTP")
    import httpx

    port = free_port()
    log = OUT / "serve.log"
    with open(log, "w") as handle:
        server = subprocess.Popen(
            [sys.executable, "-m", "bioseq", "serve", "--port", str(port)],
            env=environment,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        started = time.monotonic()
        while True:
            if server.poll() is not None or time.monotonic() - started > 180:
                sys.exit(f"the service did not come up; see {log.resolve()}")
            try:
                if httpx.get(f"{url}/health/ready", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        print(f"  ready after {time.monotonic() - started:.0f} s at {url}")
        records = list(bioseq.read_fasta(SAMPLE / "proteins.fasta"))[:3]
        body = {"sequences": [r.sequence for r in records], "heads": HEADS.split(",")}
        print(f"  POST /v1/predict with {len(records)} proteins and the heads {HEADS}")
        answer = httpx.post(f"{url}/v1/predict", json=body, timeout=120)
        answer.raise_for_status()
        (OUT / "predictions.json").write_text(json.dumps(answer.json(), indent=1))
        for record, row in zip(records, answer.json()["data"]):
            for head, p in row["predictions"].items():
                best = max(p["probabilities"], key=p["probabilities"].get)
                print(
                    f"  {record.id:<10} {head:<14} {', '.join(p['value']) or 'none':<24} "
                    f"most likely {best} ({p['probabilities'][best]:.2f}), "
                    f"further out than {p['ood_percentile']:.0%} of the training set"
                )
                told = p["nearest"][0]["text"] if p["nearest"] else "none"
                print(
                    f"  {'':<10} {p['homologs']['number']} relatives among its training proteins; nearest {told}"
                )
        print(f"  answer: {(OUT / 'predictions.json').resolve()}")
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            raise
    print("  stopped.")


def main() -> int:
    started = time.monotonic()
    fresh_folder()
    with tempfile.TemporaryDirectory(prefix="bioseq-") as scratch:  # Ray's sockets need a short path
        environment = os.environ | {
            "BIOSEQ_HOME": str((OUT / "home").resolve()),
            "RAY_TMPDIR": scratch,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        os.environ["BIOSEQ_HOME"] = environment["BIOSEQ_HOME"]
        backbone = Registry().resolve("default")
        print(f"bioseq {bioseq.__version__} with the backbone {backbone.manifest.name}")
        find_neighbours()
        screen_library(environment)
        ask_service(environment)
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. To look: {(OUT / 'screen' / 'report.html').resolve()}"
    )
    print("To do the same in a browser: .venv/bin/bioseq serve, then open http://127.0.0.1:8000/")
    return 0


if __name__ == "__main__":
    sys.exit(main())

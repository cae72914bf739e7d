"""Bodies that outrun their reader: a 2 GiB upload and a 0.7 GiB answer that nobody reads, each process that a body passes
held to 512 MiB.

    python benchmarks/backpressure.py [--mib 2048]

`bioseq serve` as a user starts it, around a tiny random model. Serve's HTTP proxy and the ingress get a limit of their
writable memory (RLIMIT_DATA) that leaves each what is missing to 512 MiB: to take more is to die. Measured is the private
memory (resident, without what is shared) of both at its highest; the upload's checksum and the answer's size are checked.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from _common import host, versions, write_result

LIMIT = 512 << 20
PARTS = {"proxy": "ProxyActor", "ingress": "ServeReplica:bioseq:api"}


def backbone(folder: Path) -> None:
    """A tiny random model, in the registry at `folder`."""
    import torch

    from bioseq.backbones.packed.config import CONFIGS
    from bioseq.backbones.packed.encoder import PackedEncoder
    from bioseq.backbones.storage import save_backbone
    from bioseq.bundles.registry import Registry

    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(0))
    save_backbone(folder / "bundle", encoder, name="tiny", card="# random", evidence={}, licence="CC0-1.0")
    Registry(folder).register(folder / "bundle")
    Registry(folder).alias("default", "tiny@1")


class Watch:
    """The processes of a service that bodies pass, and the most memory that each had."""

    def __init__(self, home: Path):
        self.parts: dict[str, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get("BIOSEQ_HOME") == str(home):
                    title = " ".join(process.cmdline())
                    self.parts |= {name: process for name, text in PARTS.items() if text in title}
            except (psutil.Error, OSError):
                continue
        assert set(self.parts) == set(PARTS), self.parts
        self.most = dict.fromkeys(PARTS, 0)
        threading.Thread(target=self._run, daemon=True).start()

    def hold(self) -> None:
        for process in self.parts.values():
            status = Path(f"/proc/{process.pid}/status").read_text()
            data = int(status.split("VmData:")[1].split()[0]) << 10
            limit = data + LIMIT - self._private(process)
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))

    @staticmethod
    def _private(process: psutil.Process) -> int:
        memory = process.memory_info()
        return memory.rss - memory.shared

    def _run(self) -> None:
        while all(p.is_running() for p in self.parts.values()):
            for name, process in self.parts.items():
                try:
                    self.most[name] = max(self.most[name], self._private(process))
                except psutil.Error:
                    return
            time.sleep(0.1)

    def lap(self) -> dict[str, float]:
        """The highest since the last lap, in MiB."""
        found, self.most = self.most, dict.fromkeys(PARTS, 0)
        return {f"{name}_mib": round(value / 2**20, 1) for name, value in found.items()}


def upload(url: str, mib: int) -> dict[str, Any]:
    piece, digest = os.urandom(1 << 20), hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for _ in range(mib):
            digest.update(piece)
            yield piece

    start = time.perf_counter()
    answer = httpx.post(
        f"{url}/v1/files?name=a.fasta", content=pieces(), timeout=3600,
        headers={"content-type": "application/octet-stream"},
    )  # fmt: skip
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert made["bytes"] == mib << 20 and made["sha256"] == digest.hexdigest()
    return {"id": made["id"], "seconds": round(time.perf_counter() - start, 1)}


def stalled(stream: Any, seconds: float, least: int) -> dict[str, Any]:
    """Nothing is read for so long; then all of it."""
    with stream as answer:
        assert answer.status_code == 200
        time.sleep(seconds)
        size = sum(len(part) for part in answer.iter_raw())
    assert size >= least, f"{size} bytes came, {least} were due"
    return {"stalled_s": seconds, "bytes": size}


def measure(url: str, home: Path, mib: int) -> dict[str, Any]:
    watch = Watch(home)
    watch.hold()
    time.sleep(1)
    found: dict[str, Any] = {"before": watch.lap()}
    sent = upload(url, mib)
    found["upload"] = {"mib": mib, "seconds": sent["seconds"], **watch.lap()}
    path = f"{url}/v1/files/{sent['id']}/content"
    found["download, reader stalls"] = {
        **stalled(httpx.stream("GET", path, timeout=3600), 20, mib << 20),
        **watch.lap(),
    }
    body = {"sequences": ["ACDEFGHIKLMNPQRSTVWY" * 50] * 1000, "per_residue": True, "layers": [0, 1, -1]}
    accept = {"Accept": "application/vnd.apache.arrow.stream"}
    stream = httpx.stream("POST", f"{url}/v1/embed", json=body, headers=accept, timeout=3600)
    found["answer, reader stalls"] = {**stalled(stream, 20, 700 << 20), **watch.lap()}
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mib", type=int, default=2048, help="of the upload")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="bsb-", dir="/tmp") as name:
        home = Path(name)
        backbone(home)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {**os.environ, "BIOSEQ_HOME": name, "RAY_TMPDIR": name, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bioseq", "serve", "--port", str(port), "--homologs", "none"]
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert process.poll() is None, "the service did not start"
                time.sleep(0.3)
            found = measure(url, home, args.mib)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    print(
        write_result(
            "backpressure", {"host": host(), "versions": versions(), "limit_mib": LIMIT >> 20, **found}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

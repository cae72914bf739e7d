"""`bioseq serve` as a process of its own, with real Ray, around a tiny backbone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Live:
    """Start, stop, kill. `home` outlives the service; `close` removes it."""

    def __init__(self, bundle: Path, **environment: str):
        from bioseq.bundles.registry import Registry

        self.root = Path(tempfile.mkdtemp(prefix="bsl-", dir="/tmp"))  # short: Ray's sockets lie below
        self.home = self.root / "home"
        registry = Registry(self.home)
        registry.register(bundle)
        registry.alias("default", "tiny@1")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ, "BIOSEQ_HOME": str(self.home), "RAY_TMPDIR": str(self.root), "OMP_NUM_THREADS": "1",
            "RAY_AUTH_TOKEN_PATH": str(self.home / "ray_token"), "RAY_AUTH_MODE": "token",
            "BIOSEQ_SERVER": self.url, **environment,
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, seconds: float = 240) -> float:
        """Returns the seconds until it was ready."""
        from serving.cluster.running import token_file

        token_file(str(self.home))
        began = time.monotonic()
        with open(self.root / "serve.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bioseq", "serve", "--port", str(self.port), "--threads", "1", "--homologs", "none", *arguments],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.root,
            )  # fmt: skip
        while time.monotonic() - began < seconds:
            assert self.process.poll() is None, (self.root / "serve.log").read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return time.monotonic() - began
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError((self.root / "serve.log").read_text()[-3000:])

    def below(self) -> list[psutil.Process]:
        """All processes of the service: Ray starts new sessions, so they are found by the environment too."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("BIOSEQ_HOME") == str(self.home):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)

    def kill(self) -> None:
        """As a power cut: everything at once, nobody says goodbye."""
        victims = self.below()
        for process in victims:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(victims, 30)
        assert self.process is not None
        self.process.wait(30)

    def bioseq(self, *arguments: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """The command line against it."""
        return subprocess.run(
            [sys.executable, "-m", "bioseq", *arguments], env=self.environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=seconds, cwd=self.root,
        )  # fmt: skip

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()
        for process in self.below():
            process.kill()
        shutil.rmtree(self.root, ignore_errors=True)


class Steps:
    """Prints what each step took."""

    def __init__(self, title: str):
        self.title, self.rows, self._at = title, [], time.monotonic()  # type: ignore[var-annotated]

    def done(self, what: str) -> None:
        now = time.monotonic()
        self.rows.append((what, now - self._at))
        self._at = now

    def show(self) -> None:
        print(f"\n{self.title}")
        for what, seconds in self.rows:
            print(f"  {what:<44} {seconds:7.1f} s")


LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def listening(processes: list[psutil.Process]) -> dict[tuple[str, int], Any]:
    """(address, port) to process of every TCP port that these processes listen on."""
    out = {}
    for process in processes:
        try:
            for c in process.net_connections("tcp"):
                if c.status == psutil.CONN_LISTEN:
                    out[c.laddr.ip, c.laddr.port] = process
        except psutil.Error:
            continue
    return out

"""`python -m serving.jobs.runner FOLDER ATTEMPT`: one attempt of a job, started by an executor.

Runs the plan's commands, each `python -m bioseq ...`, into the job's log, and writes how they ended. It ends
early, and its command with it, when it is told to (SIGTERM), when the process that started it is gone, and
when the folder's fence names a later attempt. Before it starts it takes the folder's lock, which its command
inherits: while either of them lives, no other attempt begins.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from serving.jobs.folder import HIDDEN, JobFolder

MAX_LOG = 64 << 20  # bytes; what a command prints beyond is dropped
MAX_LINE = 1 << 16
LOCK_S = 180.0
GRACE_S = 10.0
LOOK_S = 2.0  # between two looks at memory and disk


class Runner:
    def __init__(self, path: Path, attempt: int):
        self.folder = JobFolder(path.parent.parent, path.name)
        self.attempt = attempt
        self.parent = os.getppid()
        self.why: str | None = None  # why it was told to end
        self.over: str | None = None  # the limit that it passed
        self.limits: dict[str, float] = {}
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        signal.signal(signal.SIGTERM, lambda *_: self.stop("stopped"))
        signal.signal(signal.SIGINT, lambda *_: self.stop("stopped"))
        began = time.time()
        lock = os.open(self.folder.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o640)
        threading.Thread(target=self._watch, daemon=True).start()
        if not self._lock(lock):
            return self._exit(began, 1, self.why or "an earlier attempt is still running")
        if self.folder.exit(self.attempt) is not None:
            return 0  # this attempt ran already
        plan = self.folder.read("plan.json")
        if plan is None or plan["attempt"] != self.attempt:
            return self._exit(began, 1, "superseded")
        self.limits = plan.get("limits", {})
        self.folder.write(f"begun-{self.attempt}.json", {"attempt": self.attempt, "began": round(began, 3)})
        threading.Thread(target=self._bound, args=(time.monotonic(),), daemon=True).start()
        os.set_inheritable(lock, True)
        code, error = 0, None
        for command in plan["commands"]:
            code, error = self._run(command, plan["env"], lock)
            if code or self.why:
                break
        if code and self.why is None:
            self._cut_off(plan["env"].get("RAY_ADDRESS", ""))
        return self._exit(began, code, error)

    def _lock(self, fd: int) -> bool:
        until = time.monotonic() + LOCK_S
        while self.why is None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.2)
        return False

    def _run(self, command: list[str], env: dict[str, str], lock: int) -> tuple[int, str | None]:
        inherited = {k: v for k, v in os.environ.items() if k not in HIDDEN}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "bioseq", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**inherited, **env},
            cwd=self.folder.path,
            pass_fds=(lock,),
            preexec_fn=_die_with_parent,
        )
        error = None
        with open(self.folder.log, "ab", buffering=0) as log:
            size = log.tell()
            assert self.child.stdout is not None
            while line := self.child.stdout.readline(MAX_LINE):
                text = self.folder.without_paths(line.decode("utf-8", "replace"))
                if "error:" in text:  # the last such line is the run's: `bioseq: error: ...`
                    error = text.strip().split("error:", 1)[1].strip()[:2000] or text.strip()[:2000]
                if size < MAX_LOG:
                    size += log.write(text.encode())
                    if size >= MAX_LOG:
                        log.write(b"\n[job] the log is full; the job goes on\n")
        return self.child.wait(), error

    def stop(self, why: str) -> None:
        if self.why is not None:
            return
        self.why = why
        child = self.child
        if child is not None and child.poll() is None:
            child.terminate()
            threading.Thread(target=self._kill_later, args=(child,), daemon=True).start()

    def _kill_later(self, child: subprocess.Popen[bytes]) -> None:
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            if os.getppid() != self.parent:
                self.stop("orphaned")
            elif self.folder.fence() > self.attempt:
                self.stop("superseded")

    def _bound(self, began: float) -> None:
        """End the run when it passes a limit. Memory is that of this process and its children: what workers of a
        cluster take elsewhere is bounded by the nodes."""
        hours, memory, disk = (self.limits.get(k) or float("inf") for k in ("hours", "memory", "disk"))
        while self.over is None and self.why is None:
            time.sleep(min(LOOK_S, max(0.1, hours * 3600)))
            if time.monotonic() - began > hours * 3600:
                self.over = f"it ran longer than this server's limit of {hours:g} hours"
            elif memory < float("inf") and (used := _memory()) > memory:
                self.over = (
                    f"it took {used >> 20} MiB of memory; this server's limit is {int(memory) >> 20} MiB"
                )
            elif disk < float("inf") and (used := self.folder.size()) > disk:
                self.over = f"it wrote {used >> 20} MiB; this server's limit is {int(disk) >> 20} MiB"
        if self.over is not None:
            self.stop("over a limit")

    def _cut_off(self, address: str) -> None:
        """A command that failed because its cluster is going down is not at fault. We hear of that a moment
        later than it does."""
        time.sleep(1.5)
        host, _, port = address.rpartition(":")
        if self.why is None and host and port.isdigit():
            try:
                socket.create_connection((host, int(port)), 5).close()
            except OSError:
                self.why = "cut off from the cluster"

    def _exit(self, began: float, code: int, error: str | None) -> int:
        state: dict[str, Any] = {
            "attempt": self.attempt, "code": code, "error": error, "why": self.why, "over": self.over,
            "began": round(began, 3), "ended": round(time.time(), 3),
        }  # fmt: skip
        self.folder.write(f"exit-{self.attempt}.json", state)
        return 0 if code == 0 and self.why is None else 1


def _memory() -> int:
    """Resident bytes of this process and all its children."""
    import psutil

    me, total = psutil.Process(), 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(argv: list[str]) -> int:
    if len(argv) != 2 or not argv[1].isdigit():
        print(json.dumps({"error": "usage: FOLDER ATTEMPT"}), file=sys.stderr)
        return 2
    return Runner(Path(argv[0]), int(argv[1]))()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

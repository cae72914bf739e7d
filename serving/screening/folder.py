"""The run folder: what is in it, who owns it, and which parts count.

    manifest.json       what decides the result: inputs, model, heads, settings; compared when a run resumes
    lock.json           the owner (host, process, start) and the attempt number; held by flock while it lives
    predictions/        every record, by row, in Parquet
    hits.csv hits.fasta summary.json     the result; byte-equal however often the run was killed
    run.json report.html map.parquet     times and machine; the report and its map
    work/               parts and plans of the run; removed when it is complete

Concept: a worker's part file counts only once the driver has written its name, size and hash to the commit
log of its own attempt. A new attempt begins by copying what was committed so far into a log of its own, and
never looks back: a worker of an older attempt that is still alive may write files, but no log will name them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bioseq.errors import OutputError, SpecError
from bioseq.output import atomic_file

FORMAT = 1
HEARTBEAT_S = 15.0
STALE_S = 120.0


def write_json(path: Path, data: Any) -> None:
    """Atomic and synced; sorted keys, so that equal data are equal bytes."""
    with atomic_file(path, force=True) as temporary:
        temporary.write_text(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} cannot be read ({type(error).__name__}).", hint="Start again with another run folder."
        ) from error


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class Receipt:
    """One computed shard: its part file and what was counted while it was made. `seconds` is all of it, `busy`
    the engine's share, `cpu` the processor time without loading the model."""

    shard: int
    file: str
    bytes: int
    sha256: str
    sequences: int
    tokens: int
    records: int
    quarantined: int
    seconds: float
    busy: float
    cpu: float = 0.0
    embeddings: str = ""


class Lock:
    """The single owner of a run folder.

    flock tells on one host whether the owner lives (the kernel drops it with the process, however it dies).
    Network filesystems may keep flock to one host: an owner elsewhere counts as alive while it touches the
    file, at least every 15 s, and as dead 120 s after. A job of the service has a fencing token, its attempt
    (`fence`, by default $BIOSEQ_FENCE): a later one takes over at once, because its scheduler gave the earlier up, and
    what the earlier still writes is not committed.
    """

    def __init__(self, path: Path, fence: int | None = None):
        self.path, self.attempt, self._fd = path, 0, -1
        told = os.environ.get("BIOSEQ_FENCE", "")
        self.fence = fence if fence is not None else int(told) if told.isdigit() else 0
        self._stop = threading.Event()

    def acquire(self, least: int) -> int:
        """Take the lock and return this attempt's number, above `least`. Raises `OutputError` if it is held."""
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}.") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = self._read()
            os.close(self._fd)
            raise self._held(owner) from None
        owner = self._read()
        elsewhere = owner and owner.get("host") != socket.gethostname() and not owner.get("released")
        superseded = self.fence > int(owner.get("fence", 0)) > 0
        if elsewhere and not superseded and time.time() - os.fstat(self._fd).st_mtime < STALE_S:
            os.close(self._fd)
            raise self._held(owner)
        self.attempt = max(least, int(owner.get("attempt", 0))) + 1
        self._write(released=False)
        threading.Thread(target=self._beat, daemon=True).start()
        return self.attempt

    def check(self) -> None:
        """Raise `OutputError` if another attempt has taken the folder over."""
        owner = self._read()
        if owner and owner.get("attempt") != self.attempt:
            raise OutputError(
                f"this run was taken over by attempt {owner.get('attempt')} on {owner.get('host')}.",
                code="screen.taken_over",
            )

    def release(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self._write(released=True)
            os.close(self._fd)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._fd)

    def _read(self) -> dict[str, Any]:
        try:
            text = os.pread(self._fd, 65536, 0)
            data = json.loads(text)
            return data if isinstance(data, dict) else {}
        except (OSError, ValueError):
            return {}

    def _write(self, *, released: bool) -> None:
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "attempt": self.attempt,
            "fence": self.fence,
            "released": released,
        }
        data = (json.dumps(owner) + "\n").encode()
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))
        os.fsync(self._fd)

    def _held(self, owner: dict[str, Any]) -> OutputError:
        who = f"process {owner.get('pid')} on {owner.get('host')} (attempt {owner.get('attempt')})"
        return OutputError(
            f"{self.path.parent} is being written by {who if owner else 'another run'}.",
            code="screen.locked",
            hint="Wait for it, stop it, or choose another run folder with -o.",
        )


class RunFolder:
    """Paths and state of one run. `start` takes it, `release` gives it back."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.work = self.path / "work"
        self.manifest_path = self.path / "manifest.json"
        self.predictions = self.path / "predictions"
        self.lock = Lock(self.path / "lock.json")
        self._log = -1
        self.committed: dict[int, Receipt] = {}

    # ---------------------------------------------------------------- opening

    def manifest(self) -> dict[str, Any]:
        return read_json(self.manifest_path)

    @property
    def complete(self) -> bool:
        return (self.path / "summary.json").is_file()

    def look(self, manifest: dict[str, Any]) -> None:
        """Refuse a folder that is not this run's, before anything is started or written."""
        if self.manifest_path.is_file():
            changed = list(differences(self.manifest(), manifest))
            if changed:
                raise SpecError(
                    f"{self.path} holds another run: {'; '.join(changed[:8])}.",
                    field="output",
                    hint="Give the same command to resume it, or choose another run folder with -o.",
                )
        elif self.path.exists():
            if not self.path.is_dir():
                raise OutputError(f"{self.path} is a file.", hint="Choose another run folder with -o.")
            others = sorted(p.name for p in self.path.iterdir() if p.name not in ("lock.json", "work"))
            if [n for n in others if not n.endswith(".part")]:
                raise OutputError(
                    f"{self.path} exists and is not a run folder (it holds {others[0]!r}).",
                    hint="Choose a new folder with -o.",
                )

    def start(self, manifest: dict[str, Any]) -> int:
        """Take the folder for this manifest; returns the attempt number, 1 for a new run."""
        self.look(manifest)
        try:
            (self.work / "commits").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}.", hint="Choose another run folder with -o."
            ) from error
        logs = self._logs()
        attempt = self.lock.acquire(max((int(p.stem.split("-")[1]) for p in logs), default=0))
        self.look(manifest)  # again: another run may have begun between the look and the lock
        if not self.manifest_path.is_file():
            write_json(self.manifest_path, manifest)
        return attempt

    def release(self) -> None:
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        self.lock.release()

    # ---------------------------------------------------------------- commits

    def _logs(self) -> list[Path]:
        folder = self.work / "commits"
        return sorted(folder.glob("attempt-*.jsonl")) if folder.is_dir() else []

    def inherit(self) -> dict[int, Receipt]:
        """Read what older attempts committed, keep the parts that are whole, and open this attempt's log."""
        logs = self._logs()
        for receipt in _read_log(logs[-1]) if logs else ():
            part = self.work / "parts" / receipt.file
            if (
                part.is_file()
                and part.stat().st_size == receipt.bytes
                and file_sha256(part) == receipt.sha256
            ):
                self.committed[receipt.shard] = receipt
        path = self.work / "commits" / f"attempt-{self.lock.attempt:06d}.jsonl"
        with atomic_file(path, force=True) as temporary:
            temporary.write_text("".join(_line(r) for r in self.committed.values()), "utf-8")
        self._log = os.open(path, os.O_WRONLY | os.O_APPEND)
        return dict(self.committed)

    def commit(self, receipts: list[Receipt]) -> None:
        """Make these parts count. Raises `OutputError` if the folder was taken over or the disk is full."""
        self.lock.check()
        try:
            os.write(self._log, "".join(_line(r) for r in receipts).encode())
            os.fsync(self._log)
        except OSError as error:
            raise OutputError(
                f"cannot write {self.work}: {error.strerror}.",
                hint="Free some space and give the same command again: the run resumes.",
            ) from error
        for receipt in receipts:
            self.committed[receipt.shard] = receipt


def _line(receipt: Receipt) -> str:
    return json.dumps(asdict(receipt)) + "\n"


def _read_log(path: Path) -> Iterator[Receipt]:
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            yield Receipt(**json.loads(line))
        except (ValueError, TypeError):
            continue  # the torn last line of a killed driver: its part was never committed


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """What changed between two manifests, in words. Values are settings, names and hashes; no sequences."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, f"{at}[{i}]")
    elif old != new:
        yield f"{at} was {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."

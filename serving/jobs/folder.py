"""A job's folder: all that a run reads and writes.

fence.json     the attempt that counts; a runner of an older one stops when it sees a higher number
plan.json      the commands of the attempt and their environment
spec.json      the job's spec with real paths
run.lock       held by flock by the runner and its command, so that no two run at a time
log.txt        what the commands printed, all attempts one after another
progress.json  {"label", "done", "total", "unit", "fraction"}
begun-N.json   written when attempt N begins its commands: without it nothing ran
exit-N.json    how attempt N ended; written once, atomically
work/          prepared corpus, embeddings
output/        the result
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bioseq.output import atomic_file

SKIPPED = ("checkpoints", "ray", "work")  # state of a run, not its result
STATE = ("lock.json", "spec.json")  # files of it, which name the server's folders and hosts
MAX_RESULTS = 10_000
HIDDEN = ("BIOSEQ_DATABASE", "BIOSEQ_API_KEY")  # of the service's environment; a job needs neither


# The folders of an absolute path, but not those of a URL.
_FOLDERS = re.compile(r"""(?<![\w.:/~])/(?:[^\s/"'`,;:()<>|]+/)+""")


class JobFolder:
    def __init__(self, data: str | Path, job_id: str):
        self.path = Path(data) / "jobs" / job_id
        self.log = self.path / "log.txt"
        self.work = self.path / "work"
        self.output = self.path / "output"
        self.progress_file = self.path / "progress.json"

    def write(self, name: str, data: Any) -> None:
        with atomic_file(self.path / name, force=True) as temporary:
            temporary.write_text(json.dumps(data, indent=1) + "\n", "utf-8")

    def read(self, name: str) -> Any:
        """None if it is not there."""
        try:
            return json.loads((self.path / name).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def without_paths(self, text: str) -> str:
        """What a job's user is shown of a text: files of the job by their place in its folder, others by name. Where the
        server keeps them is the operator's."""
        return _FOLDERS.sub("", text.replace(f"{self.path}/", ""))

    def fence(self) -> int:
        return int((self.read("fence.json") or {}).get("attempt", 0))

    def exit(self, attempt: int) -> dict[str, Any] | None:
        return self.read(f"exit-{attempt}.json")

    def began(self, attempt: int) -> bool:
        return self.read(f"begun-{attempt}.json") is not None

    def size(self) -> int:
        """Bytes of all its files."""
        total = 0
        for parent, _, names in os.walk(self.path):
            for name in names:
                try:
                    total += os.lstat(os.path.join(parent, name)).st_size
                except OSError:
                    continue
        return total

    def progress(self) -> dict[str, Any] | None:
        found = self.read("progress.json")
        keys = ("label", "done", "total", "unit", "fraction")
        return {k: found[k] for k in keys} if isinstance(found, dict) and set(keys) <= set(found) else None

    def note(self, text: str) -> None:
        """A line of ours in the log."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out:
            out.write(f"[job] {self.without_paths(text)}\n".encode())

    def results(self) -> Iterator[tuple[str, int]]:
        """Relative path and bytes of every plain file of the result; links and hidden files left out."""
        count = 0
        for parent, folders, names in os.walk(self.output):
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in SKIPPED)
            for name in sorted(names):
                path = Path(parent, name)
                state = parent == str(self.output) and name in STATE
                if state or name.startswith(".") or path.is_symlink() or not path.is_file():
                    continue
                count += 1
                if count > MAX_RESULTS:
                    return
                yield path.relative_to(self.output).as_posix(), path.stat().st_size

    def result(self, name: str) -> Path | None:
        """The file of that name, if `results` would list it."""
        parts = Path(name).parts
        if not parts or name.startswith("/") or "\\" in name or "\0" in name:
            return None
        if (
            name in STATE
            or any(p in ("..", ".") or p.startswith(".") for p in parts)
            or any(p in SKIPPED for p in parts[:-1])
        ):
            return None
        path = self.output
        for part in parts:
            path = path / part
            if path.is_symlink():
                return None
        return path if path.is_file() else None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

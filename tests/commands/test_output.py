"""Nothing half-written: exceptions, full disks, kills, existing files."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bioseq import output
from bioseq.errors import OutputError
from bioseq.output import atomic_file, atomic_folder, check_free


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_whole_and_only_at_the_end(tmp_path):
    target = tmp_path / "deep" / "er" / "a.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.parent == target.parent  # a rename across file systems is a copy
    assert target.read_text() == "whole"
    assert left(target.parent) == ["a.txt"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_folder_appears_whole_and_only_at_the_end(tmp_path):
    target = tmp_path / "run"
    with atomic_folder(target) as temporary:
        (temporary / "in").mkdir()
        (temporary / "in" / "a.txt").write_text("whole")
        assert not target.exists()
    assert (target / "in" / "a.txt").read_text() == "whole"
    assert left(tmp_path) == ["run"]


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, atomic, error):
    with pytest.raises(error):
        with atomic(tmp_path / "out" / "a") as temporary:
            (temporary / "x" if temporary.is_dir() else temporary).write_text("half")
            raise error
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_nothing_is_replaced_unasked(tmp_path, atomic):
    target = tmp_path / "a"
    target.write_text("mine")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        with atomic(target):
            pytest.fail("the body must not run")
    assert target.read_text() == "mine"
    assert left(tmp_path) == ["a"]


def test_force_replaces_files_and_folders_whole(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "run"
    file.write_text("old")
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with atomic_file(file, force=True) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    with atomic_folder(folder, force=True) as temporary:
        (temporary / "new.txt").write_text("new")
        assert left(folder) == ["old.txt"]
    assert file.read_text() == "new"
    assert left(folder) == ["new.txt"]
    assert left(tmp_path) == ["a.txt", "run"]


def test_force_that_fails_keeps_the_old(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with pytest.raises(RuntimeError):
        with atomic_folder(folder, force=True) as temporary:
            (temporary / "new.txt").write_text("new")
            raise RuntimeError
    assert (folder / "old.txt").read_text() == "old"
    assert left(tmp_path) == ["run"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "a.txt", tmp_path / "file" / "b" / "a.txt"):
        with pytest.raises(OutputError, match="cannot write into"):
            check_free(target, force=False)
        with pytest.raises(OutputError):
            with atomic_file(target):
                pytest.fail("the body must not run")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        with atomic_file(tmp_path / "folder", force=True) as temporary:
            temporary.write_text("a file never replaces a folder")
    assert left(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot write into"):
            check_free(tmp_path / "a.txt", force=False)
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_never_replaces_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OutputError, match="a file has this name"):
        with atomic_folder(tmp_path / "run", force=True) as temporary:
            (temporary / "a").write_text("new")
    assert (tmp_path / "run").read_text() == "mine"
    assert left(tmp_path) == ["run"]


def test_a_failing_swap_brings_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    real = os.replace

    def replace(source, target):
        if Path(target) == folder and Path(source).suffix == ".part":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(output, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputError, match="No space left"):
        with atomic_folder(folder, force=True) as temporary:
            (temporary / "new.txt").write_text("new")
    assert (folder / "old.txt").read_text() == "old"
    assert left(tmp_path) == ["run"]


# A limit on file size makes the kernel refuse writes half-way, as a full disk does.
FULL = """
import resource, sys
from bioseq.errors import OutputError
from bioseq.output import atomic_file, atomic_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    if sys.argv[2] == "file":
        with atomic_file(sys.argv[1]) as temporary:
            with open(temporary, "wb") as handle:
                handle.write(b"x" * 4000)
    else:
        with atomic_folder(sys.argv[1]) as temporary:
            (temporary / "whole").write_bytes(b"x")
            (temporary / "a").write_bytes(b"x" * 4000)
except OutputError as error:
    print(error)
    sys.exit(1)
"""

KILLED = """
import os, signal, sys
from bioseq.output import atomic_file, atomic_folder
with (atomic_file if sys.argv[2] == "file" else atomic_folder)(sys.argv[1]) as temporary:
    (temporary / "a" if temporary.is_dir() else temporary).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


# Dies before or after each step that gives folders their names.
SWAPPED = """
import os, signal, sys
from bioseq import output
at, calls = int(sys.argv[3]), []
def count():
    calls.append(1)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
def dying(real):
    def step(*args):
        count()
        found = real(*args)
        count()
        return found
    return step
os.replace = dying(os.replace)
output._exchange = dying(output._exchange) if sys.argv[2] == "exchange" else lambda a, b: False
with output.atomic_folder(sys.argv[1], force=True) as temporary:
    (temporary / "new").write_bytes(b"x")
"""


@pytest.mark.parametrize(
    ("way", "at"), [("exchange", 1), ("exchange", 2), *(("renames", n) for n in (1, 2, 3, 4))]
)
def test_a_kill_during_the_swap_leaves_one_of_the_two_folders(tmp_path, way, at):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "old").write_bytes(b"x")
    done = subprocess.run([sys.executable, "-c", SWAPPED, str(folder), way, str(at)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    if way == "exchange":
        assert left(folder) in (["old"], ["new"])
    with pytest.raises(RuntimeError), atomic_folder(folder, force=True):
        raise RuntimeError  # the next run, which fails too: one of the two is there nevertheless
    assert left(folder) in (["old"], ["new"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, kind):
    target = tmp_path / "out" / "a"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(target), kind], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert f"cannot write {target}: File too large." in done.stdout
    assert left(target.parent) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_leaves_nothing_under_the_final_name(tmp_path, kind):
    target = tmp_path / "a"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), kind], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    with (atomic_file if kind == "file" else atomic_folder)(target) as temporary:  # and nothing is in the way
        (temporary / "a" if kind == "folder" else temporary).write_bytes(b"whole")
    assert target.exists()

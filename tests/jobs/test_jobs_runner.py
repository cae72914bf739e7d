"""The runner: one attempt at a time, an exit that is told, and nothing left running. Real processes, no Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.jobs.folder import JobFolder

# A command that takes a minute: it asks a server that is not there, again and again.
SLOW = ["jobs", "--server", "http://127.0.0.1:9", "show", "x"]


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    made = JobFolder(tmp_path, "a" * 24)
    made.path.mkdir(parents=True)
    return made


def plan(
    folder: JobFolder, attempt: int, *commands: list[str], env: dict[str, str] | None = None, **limits: float
) -> None:
    made = {"attempt": attempt, "commands": list(commands), "env": env or {}, "limits": limits}
    folder.write("plan.json", made)
    folder.write("fence.json", {"attempt": attempt})


def start(folder: JobFolder, attempt: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "serving.jobs.runner", str(folder.path), str(attempt)])


def wait(what: Any, seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)
    return found


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def test_commands_run_in_turn_into_the_log_and_the_exit_is_told(folder):
    plan(folder, 1, ["--version"], ["models", "list"], env={"BIOSEQ_HOME": str(folder.path / "home")})
    assert start(folder, 1).wait(120) == 0
    told = folder.exit(1)
    assert told["code"] == 0 and told["why"] is None and told["began"] <= told["ended"]
    assert folder.log.read_text().startswith("bioseq 0.")


def test_a_failing_command_ends_the_plan_with_its_message(folder):
    plan(folder, 1, ["models", "show", "no-such-model"], ["--version"])
    assert start(folder, 1).wait(120) == 1
    told = folder.exit(1)
    assert told["code"] == 1 and "no-such-model" in told["error"]
    assert "bioseq 0." not in folder.log.read_text()


def test_the_services_secrets_are_not_handed_on(folder, monkeypatch):
    monkeypatch.setenv("BIOSEQ_DATABASE", "postgresql://user:secret@db/x")
    plan(folder, 1, SLOW)
    runner = start(folder, 1)
    child = wait(lambda: children(runner))[0]
    wait(lambda: "bioseq" in " ".join(child.cmdline()))
    environment = child.environ()
    runner.terminate()
    runner.wait(60)
    assert "BIOSEQ_DATABASE" not in environment and "PATH" in environment


def test_told_to_stop_it_ends_its_command_and_says_so(folder):
    plan(folder, 1, SLOW)
    runner = start(folder, 1)
    (child,) = wait(lambda: children(runner))
    runner.terminate()
    assert runner.wait(60) == 1
    assert folder.exit(1)["why"] == "stopped"
    wait(lambda: not child.is_running())


def test_a_command_dies_with_its_runner(folder):
    plan(folder, 1, SLOW)
    runner = start(folder, 1)
    (child,) = wait(lambda: children(runner))
    wait(lambda: "bioseq" in " ".join(child.cmdline()))
    runner.kill()
    runner.wait(60)
    wait(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert folder.exit(1) is None


def test_a_killed_command_is_told_by_its_signal(folder):
    plan(folder, 1, SLOW)
    runner = start(folder, 1)
    (child,) = wait(lambda: children(runner))
    wait(lambda: "bioseq" in " ".join(child.cmdline()))
    os.kill(child.pid, signal.SIGKILL)
    assert runner.wait(60) == 1
    assert folder.exit(1)["code"] == -9


def test_a_later_attempt_ends_the_earlier_one_before_it_begins(folder):
    plan(folder, 1, SLOW)
    first = start(folder, 1)
    (child,) = wait(lambda: children(first))
    wait(lambda: "bioseq" in " ".join(child.cmdline()))
    plan(folder, 2, ["--version"])
    second = start(folder, 2)
    assert second.wait(120) == 0
    assert first.wait(60) == 1
    assert folder.exit(1)["why"] == "superseded" and folder.exit(2)["code"] == 0
    assert folder.exit(1)["ended"] <= folder.exit(2)["ended"]
    assert not child.is_running()


def test_an_attempt_that_is_started_twice_runs_once(folder):
    plan(folder, 1, ["--version"])
    both = [start(folder, 1), start(folder, 1)]
    assert [p.wait(120) for p in both] == [0, 0]
    assert folder.log.read_text().count("bioseq 0.") == 1


def test_an_older_attempt_that_comes_late_runs_nothing(folder):
    plan(folder, 2, ["--version"])
    assert start(folder, 1).wait(120) == 1
    assert not folder.log.exists()
    assert folder.exit(1)["error"] == "superseded" or folder.exit(1)["why"] == "superseded"


def test_without_the_process_that_started_it_it_ends(folder):
    plan(folder, 1, SLOW)
    code = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-m', 'serving.jobs.runner', {str(folder.path)!r}, '1']); time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait(lambda: len(children(parent)) == 2)
    below = children(parent)
    parent.kill()
    parent.wait(60)
    wait(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below))
    assert folder.exit(1)["why"] == "orphaned"


def test_a_log_without_end_is_cut(folder, monkeypatch):
    from serving.jobs import runner as room

    monkeypatch.setattr(room, "MAX_LOG", 10)
    plan(folder, 1, ["--help"])
    made = room.Runner(folder.path, 1)
    lock = os.open(folder.path / "run.lock", os.O_RDWR | os.O_CREAT)
    assert made._run(["--help"], {}, lock)[0] == 0
    os.close(lock)
    assert folder.log.read_text().endswith("the log is full; the job goes on\n")


@pytest.mark.parametrize(
    ("limit", "word"),
    [({"hours": 1 / 3600}, "hours"), ({"memory": 1 << 20}, "memory"), ({"disk": 10}, "wrote")],
)
def test_a_run_over_a_limit_is_ended_and_says_which(folder, limit, word):
    sequence = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 30
    (folder.path / "in.fasta").write_text("".join(f">s{i}\n{sequence}\n" for i in range(3000)))
    plan(folder, 1, ["embed", str(folder.path / "in.fasta"), "-o", str(folder.path / "o.npz")], **limit)
    assert start(folder, 1).wait(120) == 1
    told = folder.exit(1)
    assert told["why"] == "over a limit" and word in told["over"]
    assert folder.began(1)


def test_a_log_and_a_reason_show_no_folder_of_the_server(folder):
    """Neither the job's own, nor an upload's, nor where Python stands; a file is told by its name."""
    folder.output.mkdir()
    upload = folder.path.parents[1] / "files" / ("f" * 24)
    upload.mkdir(parents=True)
    (upload / "bad.fasta").write_text(">a\nMK1\n")
    work = folder.work / "corpus"
    plan(
        folder,
        1,
        ["homologs", "build", str(upload / "bad.fasta"), "-o", str(folder.output / "set")],
        env={"BIOSEQ_HOME": str(folder.path / "home")},
    )
    assert start(folder, 1).wait(120) == 1
    told, log = folder.exit(1), folder.log.read_text()
    assert told["error"].startswith("bad.fasta:") and "bad.fasta:" in log
    plan(
        folder,
        2,
        ["pretrain", "prepare", str(folder.path / "none.fasta"), "-o", str(work), "--engine", "local"],
    )
    assert start(folder, 2).wait(120) == 1
    log += folder.log.read_text() + folder.exit(2)["error"]
    assert "none.fasta" in log
    for place in (str(folder.path.parents[1]), sys.prefix, str(Path.cwd())):
        assert place not in log


@pytest.mark.parametrize(
    "text, shown",
    [
        (
            "{here}/output/hits.csv; report: {here}/output/report.html",
            "output/hits.csv; report: output/report.html",
        ),
        ('  File "/opt/bioseq/lib/python3.11/x.py", line 3', '  File "x.py", line 3'),
        ("/data/files/0f/a b.csv:3: bad", "a b.csv:3: bad"),
        ("s3://bucket/a/b.fasta, http://h:80/x/y and 1/3 steps", None),
        ("(raylet) see /tmp/ray/session_1/logs/gcs.out", "(raylet) see gcs.out"),
        ("key=/etc/x/y.pem", "key=y.pem"),
        ("N/A, a/b and 5 / 6", None),
    ],
)
def test_paths_are_cut_and_nothing_else_is(folder, text, shown):
    given = text.replace("{here}", str(folder.path))
    assert folder.without_paths(given) == (text if shown is None else shown)

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bioseq.errors import OutputError, SpecError
from serving.screening.folder import Lock, Receipt, RunFolder, differences, file_sha256

MANIFEST = {"inputs": [{"name": "a.fasta", "sha256": "1"}], "model": {"hash": "x"}, "settings": {"top": None}}


def receipt(folder: RunFolder, shard: int, content: bytes = b"part") -> Receipt:
    parts = folder.work / "parts"
    parts.mkdir(exist_ok=True)
    name = f"shard-{shard:06d}.a{folder.lock.attempt}.parquet"
    (parts / name).write_bytes(content)
    return Receipt(shard, name, len(content), file_sha256(parts / name), 1, 1, 1, 0, 0.1, 0.1)


def test_committed_parts_are_inherited_and_others_are_not(tmp_path):
    first = RunFolder(tmp_path / "run")
    assert first.start(MANIFEST) == 1
    first.inherit()
    first.commit([receipt(first, 0), receipt(first, 1), receipt(first, 2)])
    receipt(first, 3)  # written, but its driver died before the commit
    (first.work / "parts" / first.committed[1].file).write_bytes(b"p")  # torn by a power cut
    (first.work / "parts" / first.committed[2].file).write_bytes(b"PART")  # same size, other bytes
    first.release()
    second = RunFolder(tmp_path / "run")
    assert second.start(MANIFEST) == 2
    assert set(second.inherit()) == {0}
    second.release()


def test_a_torn_last_line_of_the_log_is_passed_over(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(MANIFEST)
    folder.inherit()
    folder.commit([receipt(folder, 0), receipt(folder, 1)])
    folder.release()
    log = next((folder.work / "commits").iterdir())
    log.write_bytes(log.read_bytes()[:-20])
    again = RunFolder(tmp_path / "run")
    again.start(MANIFEST)
    assert set(again.inherit()) == {0}
    again.release()


def test_a_second_live_run_is_refused_and_told_who_holds_it(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(MANIFEST)
    with pytest.raises(OutputError, match=f"process {os.getpid()} on") as caught:
        RunFolder(tmp_path / "run").start(MANIFEST)
    assert caught.value.code == "screen.locked"
    folder.release()
    RunFolder(tmp_path / "run").start(MANIFEST)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import sys, time, json; from serving.screening.folder import RunFolder\n"
        "f = RunFolder(sys.argv[1]); f.start(json.loads(sys.argv[2])); print('held', flush=True); time.sleep(99)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run"), json.dumps(MANIFEST)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(OutputError):
        RunFolder(tmp_path / "run").start(MANIFEST)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = RunFolder(tmp_path / "run")
    assert folder.start(MANIFEST) == 2
    folder.release()


def test_an_owner_on_another_host_is_alive_while_it_touches_the_lock(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(MANIFEST)
    folder.release()
    path = folder.lock.path
    owner = {"host": "elsewhere", "pid": 1, "attempt": 7, "released": False}
    path.write_text(json.dumps(owner))
    with pytest.raises(OutputError, match="process 1 on elsewhere"):
        RunFolder(tmp_path / "run").start(MANIFEST)
    old = time.time() - 1000
    os.utime(path, (old, old))
    taken = RunFolder(tmp_path / "run")
    assert taken.start(MANIFEST) == 8
    taken.release()


def test_an_old_attempt_that_still_lives_cannot_commit(tmp_path):
    old = RunFolder(tmp_path / "run")
    old.start(MANIFEST)
    old.inherit()
    # A takeover seen by the old driver, as over a network filesystem that does not share flock
    old.lock.path.write_text(json.dumps({"host": "other", "attempt": 2}))
    with pytest.raises(OutputError, match="taken over by attempt 2"):
        old.commit([receipt(old, 0)])
    os.close(old.lock._fd)


def test_parts_that_an_old_attempt_commits_late_are_not_seen(tmp_path):
    old = RunFolder(tmp_path / "run")
    old.start(MANIFEST)
    old.inherit()
    old.commit([receipt(old, 0)])
    os.close(old.lock._fd)  # its lock is lost, it lives on
    new = RunFolder(tmp_path / "run")
    assert new.start(MANIFEST) == 2
    assert set(new.inherit()) == {0}
    late = dataclasses.asdict(receipt(old, 5))
    os.write(old._log, (json.dumps(late) + "\n").encode())
    new.release()
    third = RunFolder(tmp_path / "run")
    third.start(MANIFEST)
    assert set(third.inherit()) == {0}
    third.release()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"inputs": [{"name": "a.fasta", "sha256": "2"}]}, 'inputs[0].sha256 was "1", now "2"'),
        ({"model": {"hash": "y"}}, 'model.hash was "x", now "y"'),
        ({"settings": {"top": 5}}, "settings.top was null, now 5"),
    ],
)
def test_another_run_is_refused_saying_what_changed(tmp_path, change, says):
    folder = RunFolder(tmp_path / "run")
    folder.start(MANIFEST)
    folder.release()
    with pytest.raises(SpecError) as caught:
        RunFolder(tmp_path / "run").look({**MANIFEST, **change})
    assert says in str(caught.value)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"not a run folder \(it holds 'thesis.tex'\)"):
        RunFolder(tmp_path).look(MANIFEST)
    with pytest.raises(OutputError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").look(MANIFEST)


def test_differences_name_every_change():
    assert list(differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 2}, "c": [1, 2]})) == [
        "a.b was 1, now 2",
        "c was [1], now [1, 2]",
    ]


def test_a_later_attempt_of_a_job_takes_a_run_over_from_another_host_at_once(tmp_path, monkeypatch):
    """Its host died with it, a moment ago."""
    path = tmp_path / "lock.json"
    monkeypatch.setattr("socket.gethostname", lambda: "lost-host")
    old = Lock(path, fence=1)
    assert old.acquire(0) == 1
    fcntl.flock(old._fd, fcntl.LOCK_UN)  # a lock that is kept to one host
    monkeypatch.setattr("socket.gethostname", lambda: "new-host")
    for fence in (0, 1):  # by hand, or the same attempt
        with pytest.raises(OutputError, match="being written"):
            Lock(path, fence=fence).acquire(0)
    monkeypatch.setenv("BIOSEQ_FENCE", "2")
    new = Lock(path)
    assert new.acquire(0) == 2
    with pytest.raises(OutputError, match="taken over"):
        old.check()
    old._stop.set()
    new.release()

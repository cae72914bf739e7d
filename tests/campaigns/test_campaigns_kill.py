"""SIGKILL before every sync and rename of `propose`, `ingest` and `mark`: the campaign goes on to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the extra [train] is not installed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

# One process imports once and forks for every moment at which it may be killed.
SCRIPT = '''
import csv, os, shutil, signal, sys
from pathlib import Path
import numpy as np
from bioseq.campaigns.campaign import Campaign, Settings
from bioseq.campaigns.ingest import ingest
from bioseq.errors import BioseqError
from training.campaigns.propose import propose

work = Path(sys.argv[1])
WILD = "MKTAYIAKQRQISFVKSHFSRQ"

def results(campaign, number):
    path = work / f"{number}.csv"
    rows = csv.DictReader(open(campaign.round_folder(number) / "plate.csv"))
    lines = [f"{r['variant']},{r['well']},{sum(map(ord, r['variant'])) % 17}" for r in rows]
    path.write_text("\\n".join(["variant,well,activity", *lines]) + "\\n")
    return path

def committed(folder):
    """What counts: the files under their names, and the ledger up to its last seal."""
    ledger = Campaign(folder).ledger
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
             if p.is_file() and not p.name.startswith(".") and p.name != "lock"}
    return files | {"ledger.csv": files.get("ledger.csv", b"")[: ledger.read()[1]]}

def check(name, verb, start):
    """Kill `verb` on a copy of `start` before its first, second, ... sync or rename. Returns the finished copy."""
    whole = work / f"{name}-whole"
    shutil.copytree(start, whole)
    verb(Campaign(whole))
    want, before = committed(whole), committed(start)
    number = 0
    while True:
        number += 1
        copy = work / f"{name}-{number}"
        shutil.copytree(start, copy)
        child = os.fork()
        if not child:
            calls = [0]
            def dying(real):
                def call(*a, **k):
                    calls[0] += 1
                    if calls[0] == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*a, **k)
                return call
            os.fsync, os.replace = dying(os.fsync), dying(os.replace)
            verb(Campaign(copy))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0 and committed(copy) == want, f"{name}: an uninterrupted run differs"
            print(f"{name}: {number - 1} kills survived")
            assert number > 2, f"{name} was never killed"
            return whole
        left = committed(copy)["ledger.csv"]
        assert left in (before["ledger.csv"], want["ledger.csv"]), f"{name}: half a batch is in the ledger"
        if left != want["ledger.csv"]:
            verb(Campaign(copy))
        assert committed(copy) == want, f"{name}: killed at call {number}, it went on to other bytes"

start = Campaign.create(
    work / "c", Settings(wild_type=WILD, objectives=("activity:max",), sites=(4, 7), batch=24),
    prior=np.random.default_rng(0).normal(size=(len(WILD), 20)),
).folder
one = check("propose", propose, start)
table = results(Campaign(one), 1)
two = check("ingest", lambda c: ingest(c, table), one)
three = check("propose again", propose, two)
check("mark", lambda c: c.mark("ordered", []), three)
'''


def test_a_kill_before_any_sync_or_rename_is_survived(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kills survived") == 4, done.stdout

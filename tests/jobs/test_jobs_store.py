"""What the store keeps, to whom it shows it, and for how long."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from serving.database.base import now
from serving.jobs.finish import Finished
from serving.jobs.tables import PENDING
from serving.problems import Problem


def test_old_jobs_and_their_folders_are_removed(rig, monkeypatch):
    r = rig(job_days=30)
    row = r.submit()
    r.finish_all()
    folder = r.scheduler.settings.data
    assert Path(folder, "jobs", row.id).is_dir()
    later = now() + datetime.timedelta(days=31)
    monkeypatch.setattr("serving.jobs.scheduler.now", lambda: later)
    r.scheduler._swept = 0.0
    r.scheduler.tick()
    assert not Path(folder, "jobs", row.id).exists()
    with pytest.raises(Problem):
        r.store.get(row.id)


def test_a_job_is_seen_by_its_owner_only(rig):
    r = rig()
    row = r.submit("a")
    assert r.store.get(row.id, "a").id == row.id and r.store.get(row.id, None).id == row.id
    for act in (r.store.get, r.store.cancel):
        with pytest.raises(Problem) as hidden:
            act(row.id, "b")
        assert (hidden.value.status, hidden.value.code) == (404, "job.not_found")
    assert r.store.list("b") == [] and r.state(row) == PENDING


def test_filters_and_pages(rig):
    r = rig()
    rows = [r.submit("a", kind=kind, spec={}) for kind in ("screen", "finetune", "screen", "screen")]
    newest = r.store.list("a", kind="screen", limit=2)
    assert [x.id for x in newest] == [rows[3].id, rows[2].id]
    assert [x.id for x in r.store.list("a", kind="screen", before=newest[-1].number)] == [rows[0].id]
    assert r.store.list("a", state="RUNNING") == []
    assert r.store.list("a", state="' OR 1=1 --") == []  # a parameter, never SQL
    assert [r.store.place(x) for x in rows] == [0, 1, 2, 3]


def test_the_key_whose_job_registered_a_name_owns_it(rig):
    r = rig()
    r.scheduler = r.new_scheduler(finisher=lambda *_: Finished(registered="kinase@1"))
    r.submit("a", register="kinase")
    assert r.store.owner_of("kinase") is None
    r.finish_all()
    assert r.store.owner_of("kinase") == "a"

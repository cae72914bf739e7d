"""The scheduler: order, fairness, quotas, fencing, the lease, and truth after every kind of loss."""

from __future__ import annotations

import datetime
import threading
from collections import Counter
from typing import Any

import pytest

from bioseq.errors import RegistryError
from serving.database.base import now
from serving.database.keys import Keys
from serving.jobs.executors import job_of, run_name
from serving.jobs.finish import Finished
from serving.jobs.lease import LeaseLost
from serving.jobs.tables import CANCELLED, FAILED, PENDING, RUNNING, SUCCEEDED
from serving.problems import Problem

FINETUNE: dict[str, Any] = {
    "labels": "/roots/x.csv", "targets": ["t"], "base": "m@1", "residue_labels": None, "residue_mask": None,
    "wild_type": None,
}  # fmt: skip


def owners(rig: Any) -> list[str]:
    """Owners in the order in which their jobs were started."""
    return [rig.store.get(job_of(run)[0]).owner for run in rig.executor.order]


def test_two_hundred_jobs_at_once_are_queued_in_order_and_none_is_lost(rig):
    r = rig(max_running_jobs=7, max_running_jobs_per_key=5, max_jobs_per_key=100)
    rows, lock = [], threading.Lock()

    def send(owner: str) -> None:
        for i in range(50):
            row = r.submit(owner, name=f"{owner}{i}")
            with lock:
                rows.append(row)

    threads = [threading.Thread(target=send, args=(owner,)) for owner in "abcd"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({row.id for row in rows}) == 200
    assert r.store.counts() == {PENDING: 200}
    r.finish_all()
    assert r.store.counts() == {SUCCEEDED: 200}
    assert r.executor.most == 7
    started = [job_of(run) for run in r.executor.order]
    assert len(started) == 200 and all(attempt == 1 for _, attempt in started)
    for owner in "abcd":  # inside a key in the order of submission
        numbers = [r.store.get(job).number for job, _ in started if r.store.get(job).owner == owner]
        assert numbers == sorted(numbers)
    assert set(Counter(owners(r)[:40]).values()) == {10}  # and taking turns between keys


def test_a_key_with_a_long_queue_does_not_keep_another_waiting(rig):
    r = rig(max_running_jobs=2, max_running_jobs_per_key=2)
    for _ in range(20):
        r.submit("greedy")
    r.scheduler.tick()
    late = r.submit("modest")
    for run in list(r.executor.running())[:1]:
        r.executor.finish(run)
    r.scheduler.tick()
    assert r.state(late) == RUNNING


def test_a_key_never_passes_its_running_limit_though_there_is_room(rig):
    r = rig(max_running_jobs=10, max_running_jobs_per_key=2)
    for _ in range(6):
        r.submit("a")
    r.submit("b")
    r.scheduler.tick()
    assert Counter(owners(r)) == {"a": 2, "b": 1}


def test_a_key_over_its_quota_is_refused_and_may_go_on_when_jobs_have_ended(rig):
    r = rig(max_jobs_per_key=3)
    first = [r.submit("a") for _ in range(3)]
    with pytest.raises(Problem) as refused:
        r.submit("a")
    assert (refused.value.status, refused.value.code) == (429, "quota.jobs")
    assert refused.value.extra == {"limit": 3, "given": 3}
    r.submit("b")
    r.store.cancel(first[0].id, "a")
    r.submit("a")


def test_quota_holds_against_submissions_side_by_side(rig):
    r = rig(max_jobs_per_key=10)
    refused = []

    def send() -> None:
        for _ in range(5):
            try:
                r.submit("a")
            except Problem as problem:
                refused.append(problem.code)

    threads = [threading.Thread(target=send) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert r.store.counts() == {PENDING: 10} and len(refused) == 20


def test_the_same_idempotency_key_gives_the_same_job(rig):
    r = rig()
    first = r.submit("a", idempotency_key="k")
    assert r.submit("a", idempotency_key="k").id == first.id
    assert r.submit("b", idempotency_key="k").id != first.id
    with pytest.raises(Problem) as refused:
        r.submit("a", idempotency_key="k", name="other")
    assert (refused.value.status, refused.value.code) == (409, "job.idempotency_conflict")
    assert r.store.counts() == {PENDING: 2}


def test_the_same_idempotency_key_sent_side_by_side_makes_one_job(rig):
    r = rig()
    ids = []
    threads = [
        threading.Thread(target=lambda: ids.append(r.submit("a", idempotency_key="k").id)) for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(ids) == 8 and len(set(ids)) == 1


def test_only_the_holder_of_the_lease_acts(rig):
    r = rig()
    r.submit()
    assert r.scheduler.tick()
    other = r.new_scheduler()
    assert not other.tick()
    assert len(r.executor.order) == 1


def test_an_old_holder_can_write_nothing_once_another_has_taken_over(rig):
    clock = {"now": now()}
    r = rig()
    row = r.submit()
    old = r.new_scheduler(lease=r.lease(seconds=5, clock=lambda: clock["now"]))
    assert old.tick() and r.state(row) == RUNNING
    running = r.store.running()[0]
    clock["now"] += datetime.timedelta(seconds=6)  # it hangs
    new = r.new_scheduler(lease=r.lease(seconds=5, clock=lambda: clock["now"]))
    assert new.tick()
    assert new.lease.token == old.lease.token + 1
    with pytest.raises(LeaseLost):
        r.store.end(old.lease, running, FAILED, "a late word")
    with pytest.raises(LeaseLost):
        old.lease.token = new.lease.token - 1
        r.store.start_next(old.lease, max_running=9, max_running_per_key=9)
    assert r.state(row) == RUNNING
    assert not old.tick()


def test_a_lease_that_was_given_back_is_taken_at_once(rig):
    r = rig()
    assert r.scheduler.tick()
    r.scheduler.close()
    assert r.new_scheduler().tick()


def test_a_restarted_scheduler_finds_running_jobs_and_starts_none_twice(rig):
    r = rig(max_running_jobs=4, max_running_jobs_per_key=3)
    rows = [r.submit() for _ in range(5)]
    r.scheduler.tick()
    r.scheduler.close()
    r.scheduler = r.new_scheduler()
    r.scheduler.tick()
    assert len(r.executor.order) == 3  # NoOp.start refuses a second start of one attempt
    r.finish_all()
    assert [r.state(row) for row in rows] == [SUCCEEDED] * 5
    assert all(r.store.get(row.id).attempt == 1 for row in rows)


def test_a_run_that_ended_while_no_scheduler_looked_is_concluded(rig):
    r = rig()
    good, bad = r.submit("a"), r.submit("b")
    r.scheduler.tick()
    r.scheduler.close()
    r.executor.finish(r.run_of(good))
    r.executor.finish(r.run_of(bad), code=1, error="rows 3 and 4 contradict each other")
    for row in (good, bad):  # Ray itself has forgotten them
        r.executor.vanish(r.run_of(row))
    r.scheduler = r.new_scheduler()
    r.scheduler.tick()
    assert r.state(good) == SUCCEEDED and r.state(bad) == FAILED
    assert r.store.get(bad.id).reason == "rows 3 and 4 contradict each other"


def test_a_lost_run_is_resumed_as_a_new_attempt(rig):
    r = rig()
    row = r.submit()
    r.scheduler.tick()
    r.executor.vanish(r.run_of(row))
    r.scheduler.tick()
    again = r.store.get(row.id)
    assert (again.state, again.attempt, again.failures) == (RUNNING, 2, 1)
    assert r.executor.running() == [run_name(row.id, 2)]
    assert r.scheduler.folder(r.store.running()[0]).fence() == 2
    r.finish_all()
    assert r.state(row) == SUCCEEDED


def test_a_job_that_is_lost_again_and_again_fails_with_the_reason(rig):
    r = rig(job_attempts=3)
    row = r.submit()
    for _ in range(5):
        r.scheduler.tick()
        for run in r.executor.running():
            r.executor.vanish(run)
    ended = r.store.get(row.id)
    assert ended.state == FAILED and ended.attempt == 3
    assert "attempt 3 of 3" in ended.reason


def test_a_kind_that_cannot_resume_fails_with_the_reason(rig):
    r = rig()
    lora = r.submit(kind="finetune", spec={**FINETUNE, "method": "lora"})
    frozen = r.submit("b", kind="finetune", spec={**FINETUNE, "method": "frozen"})
    r.scheduler.tick()
    for row in (lora, frozen):
        r.executor.vanish(r.run_of(row))
    r.scheduler.tick()
    assert r.state(lora) == FAILED and "cannot resume" in r.store.get(lora.id).reason
    assert r.state(frozen) == RUNNING


@pytest.mark.parametrize("end", [{"code": 0, "why": "orphaned"}, {"code": -9}, {"code": 1, "why": "cut off"}])
def test_a_run_that_was_killed_is_lost_and_not_failed(rig, end):
    r = rig()
    row = r.submit()
    r.scheduler.tick()
    r.executor.finish(r.run_of(row), **end)
    r.scheduler.tick()
    assert r.state(row) == RUNNING and r.store.get(row.id).attempt == 2


def test_what_an_older_attempt_leaves_counts_for_nothing(rig):
    r = rig()
    row = r.submit()
    r.scheduler.tick()
    r.executor.vanish(run_name(row.id, 1))
    r.scheduler.tick()
    folder, _ = r.executor.folders[run_name(row.id, 1)]
    folder.write("exit-1.json", {"attempt": 1, "code": 0, "error": None, "why": None})
    r.scheduler.tick()
    assert r.state(row) == RUNNING and r.store.get(row.id).attempt == 2


def test_a_run_given_up_as_lost_that_comes_back_is_stopped(rig):
    r = rig()
    row = r.submit()
    r.scheduler.tick()
    r.executor.vanish(run_name(row.id, 1))
    r.scheduler.tick()
    r.executor.runs[run_name(row.id, 1)] = "running"
    r.scheduler.tick()
    assert r.executor.stopped == [run_name(row.id, 1)]
    assert r.executor.running() == [run_name(row.id, 2)]


def test_runs_of_others_on_the_cluster_are_left_alone(rig):
    r = rig()
    r.executor.runs["raysubmit_123"] = "running"
    r.scheduler.tick()
    assert r.executor.stopped == []


def test_a_pending_job_is_cancelled_at_once_and_never_started(rig):
    r = rig(max_running_jobs=1)
    first, second = r.submit(), r.submit()
    r.scheduler.tick()
    assert r.store.cancel(second.id, "a").state == CANCELLED
    r.finish_all()
    assert r.state(first) == SUCCEEDED and r.state(second) == CANCELLED and len(r.executor.order) == 1


def test_a_running_job_is_cancelled_when_its_run_has_ended(rig):
    r = rig()
    row = r.submit()
    r.scheduler.tick()
    assert r.store.cancel(row.id, "a").state == RUNNING  # not before it has really ended
    r.scheduler.tick()
    assert r.executor.stopped == [r.run_of(row)]
    r.scheduler.tick()
    ended = r.store.get(row.id)
    assert ended.state == CANCELLED and ended.ended is not None
    assert r.store.cancel(row.id, "a").state == CANCELLED


def test_a_cancelled_job_whose_run_was_lost_is_not_resumed(rig):
    r = rig()
    row = r.submit()
    r.scheduler.tick()
    r.store.cancel(row.id, "a")
    r.executor.vanish(r.run_of(row))
    r.scheduler.tick()
    assert r.state(row) == CANCELLED and r.executor.running() == []


def test_a_job_that_finished_before_its_cancellation_was_seen_has_succeeded(rig):
    r = rig()
    row = r.submit()
    r.scheduler.tick()
    r.executor.finish(r.run_of(row))
    r.store.cancel(row.id, "a")
    r.scheduler.tick()
    assert r.state(row) == SUCCEEDED


def test_a_job_whose_file_is_gone_fails_and_the_next_one_starts(rig):
    r = rig(max_running_jobs=1)
    bad = r.submit(spec={"inputs": ["file:" + "0" * 24], "heads": ["h@1"], "model": "m@1"})
    good = r.submit("b")
    r.scheduler.tick()
    assert r.state(bad) == FAILED and "no such file" in r.store.get(bad.id).reason
    assert r.state(good) == RUNNING


def test_a_result_that_the_registry_refuses_fails_the_job(rig):
    def refuse(*_: Any) -> Finished:
        raise RegistryError("'kinase' is a backbone, this bundle a head.")

    r = rig()
    r.scheduler = r.new_scheduler(finisher=refuse)
    row = r.submit()
    r.finish_all()
    assert r.state(row) == FAILED and "is a backbone" in r.store.get(row.id).reason


def test_a_scheduler_that_dies_while_registering_registers_again(rig):
    calls = []

    def finisher(*_: Any) -> Finished:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return Finished(registered="kinase@1")

    r = rig()
    r.scheduler = r.new_scheduler(finisher=finisher)
    row = r.submit()
    r.scheduler.tick()
    r.executor.finish(r.run_of(row))
    with pytest.raises(MemoryError):
        r.scheduler.tick()
    assert r.state(row) == RUNNING
    r.scheduler.close()
    r.new_scheduler(finisher=finisher).tick()
    assert r.store.get(row.id).registered == "kinase@1"


def test_nothing_is_concluded_while_the_cluster_does_not_answer(rig):
    r = rig()
    row = r.submit()
    r.scheduler.tick()
    states, r.executor.states = r.executor.states, lambda: (_ for _ in ()).throw(ConnectionError())
    with pytest.raises(ConnectionError):
        r.scheduler.tick()
    assert r.state(row) == RUNNING
    r.executor.states = states
    r.finish_all()
    assert r.state(row) == SUCCEEDED


def test_a_run_that_is_missing_for_a_moment_is_not_given_up(rig):
    r = rig()
    r.scheduler = r.new_scheduler(lost_s=60)
    row = r.submit()
    r.scheduler.tick()
    run = r.run_of(row)
    r.executor.vanish(run)
    r.scheduler.tick()
    r.executor.runs[run] = "running"
    r.scheduler.tick()
    assert r.store.get(row.id).attempt == 1
    r.finish_all()
    assert r.state(row) == SUCCEEDED


def test_a_start_that_fails_is_tried_again_and_is_no_lost_attempt(rig):
    """As while a cluster has just started, and takes no jobs yet."""
    r = rig()
    start, r.executor.start = r.executor.start, lambda *a, **k: (_ for _ in ()).throw(RuntimeError())
    row = r.submit()
    for _ in range(10):
        r.scheduler.tick()
    r.executor.start = start
    r.scheduler.tick()
    found = r.store.get(row.id)
    assert (found.attempt, found.failures) == (1, 0) and r.executor.running() == [run_name(row.id, 1)]
    r.finish_all()
    assert r.state(row) == SUCCEEDED


def test_what_cannot_be_started_for_too_long_is_lost(rig, monkeypatch):
    monkeypatch.setattr("serving.jobs.scheduler.UNSENT_S", -1)
    r = rig(job_attempts=2)
    r.executor.start = lambda *a, **k: (_ for _ in ()).throw(RuntimeError())
    row = r.submit()
    for _ in range(4):
        r.scheduler.tick()
    assert r.state(row) == FAILED


def test_a_job_whose_scheduler_died_before_sending_it_is_started_though_it_cannot_resume(rig):
    r = rig()
    lora = r.submit(kind="finetune", spec={**FINETUNE, "method": "lora"})
    r.scheduler.lease.acquire()
    assert r.store.start_next(r.scheduler.lease, max_running=2, max_running_per_key=2)
    r.scheduler.lease.release()  # it dies here: nothing was written or sent
    assert r.state(lora) == RUNNING and not r.executor.runs
    other = r.new_scheduler()
    other.tick()
    other.tick()
    assert r.state(lora) == RUNNING and len(r.executor.running()) == 1
    r.executor.finish(r.run_of(lora))
    other.tick()
    assert r.state(lora) == SUCCEEDED


def test_a_limit_that_was_passed_fails_the_job_and_is_not_tried_again(rig):
    r = rig(max_job_hours=1.5, max_job_memory_bytes=1 << 30, max_job_bytes=None)
    row = r.submit()
    r.scheduler.tick()
    folder, _ = r.executor.folders[r.run_of(row)]
    assert folder.read("plan.json")["limits"] == {"hours": 1.5, "memory": 1 << 30, "disk": None}
    folder.write(
        "exit-1.json",
        {
            "attempt": 1,
            "code": -15,
            "error": None,
            "why": "over a limit",
            "over": "it ran longer than allowed",
        },
    )
    r.scheduler.tick()
    assert r.state(row) == FAILED and r.store.get(row.id).reason == "it ran longer than allowed."


def test_one_keys_jobs_leave_a_place_for_another(rig):
    r = rig(max_running_jobs=3, max_running_jobs_per_key=3)
    for _ in range(5):
        r.submit("a")
    r.scheduler.tick()
    assert len(r.executor.running()) == 2
    other = r.submit("b")
    r.scheduler.tick()
    assert r.state(other) == RUNNING


def test_a_name_belongs_to_the_key_that_asked_first_and_is_never_forgotten(rig):
    r = rig()
    r.scheduler = r.new_scheduler(finisher=lambda *_: Finished(registered="head@1"))
    assert r.store.claim("a", "head")
    first = r.submit("a", register="head")
    assert not r.store.claim("b", "head")
    r.finish_all()
    assert r.state(first) == SUCCEEDED
    r.store.forget(first.id)  # as the sweep does after 90 days
    assert r.store.owner_of("head") == "a" and not r.store.claim("b", "head")
    # A name that nothing was registered under is free again.
    assert r.store.claim("a", "other") and r.store.claim("b", "other")


def test_a_name_under_which_nothing_was_registered_is_not_kept(rig):
    r = rig()
    r.scheduler = r.new_scheduler(finisher=lambda *_: Finished(note="weaker than its baseline"))
    r.submit("a", register="weak")
    r.finish_all()
    assert r.store.owner_of("weak", registered=True) is None and r.store.claim("b", "weak")


def test_a_job_does_not_register_under_a_name_that_is_anothers_by_then(rig):
    r = rig()
    row = r.submit("a", register="head")
    r.scheduler.tick()
    assert r.store.claim("boss", "head", "some job", take=True)
    r.executor.finish(r.run_of(row))
    r.scheduler.tick()
    assert r.state(row) == FAILED and "another" in r.store.get(row.id).reason


def test_old_usage_is_folded_and_its_sum_kept(rig):
    import datetime

    from serving.database.base import now
    from serving.database.keys import Keys, Usage

    r = rig()
    keys = Keys(r.database)
    info, _ = keys.create("alice")
    minute = int(now().timestamp() // 60)
    keys.add_usage(
        {(info.id, minute - 200_000 + i): (1, 10) for i in range(50)} | {(info.id, minute): (1, 1)}
    )
    assert keys.fold(now() - datetime.timedelta(days=90)) == 50
    with r.database.session() as session:
        assert session.query(Usage).count() == 2
    assert keys.used(info.id) == (51, 501) and keys.used(info.id, since_minute=minute) == (1, 1)
    assert keys.fold(now() - datetime.timedelta(days=90)) == 0


def test_what_a_screen_computed_is_counted_to_its_key(rig):
    r = rig()
    info, _ = Keys(r.database).create("a", ("train",))
    rows = [r.submit(info.id), r.submit("anonymous")]
    for row in rows:
        assert r.scheduler.tick()
        run = r.run_of(row)
        folder, _ = r.executor.folders[run]
        folder.output.mkdir(parents=True)
        (folder.output / "summary.json").write_text('{"tokens": 1234}')
        r.executor.finish(run)
        assert r.scheduler.tick() and r.scheduler.tick()
        assert r.state(row) == "SUCCEEDED"
    assert Keys(r.database).used(info.id) == (0, 1234)

"""The batcher: every item once, in order, no starvation, cancelled ones dropped, one item's error its own."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.batcher import Engine
from serving.engine.queueing import EngineDead, Overloaded


@dataclass
class Job:
    name: int
    tokens: int
    poison: bool = False


class Fake:
    """A runner that can be held, and remembers its batches."""

    def __init__(self, budget: int = 100, seconds_per_token: float = 0.0):
        self.budget, self.rate = budget, seconds_per_token
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def run(self, works):
        self.batches.append([w.name for w in works])
        self.entered.release()
        assert self.gate.wait(30)
        if self.rate:
            time.sleep(self.rate * sum(w.tokens for w in works))
        if any(w.poison for w in works):
            raise ValueError("MKTAYIAKQR is a secret sequence")
        return [w.name * 10 for w in works]


def go(scenario, **options):
    engine = Engine(**{"max_queue_s": None, "max_queued_tokens": None, **options}).start()
    try:
        return asyncio.run(scenario(engine))
    finally:
        engine.stop()


async def entered(fake: Fake, times: int = 1) -> None:
    for _ in range(times):
        assert await asyncio.to_thread(fake.entered.acquire, timeout=30)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(1, 150), min_size=1, max_size=8), min_size=1, max_size=8),
    lanes=st.integers(1, 3),
    budget=st.integers(1, 120),
)
def test_every_item_once_and_in_order(requests, lanes, budget):
    fake = Fake(budget)

    async def scenario(engine):
        number = iter(range(10_000))
        jobs = [[Job(next(number), t) for t in request] for request in requests]
        answers = await asyncio.gather(*(engine.submit(fake, works) for works in jobs))
        assert answers == [[j.name * 10 for j in works] for works in jobs]
        return jobs

    jobs = go(scenario, lanes=lanes)
    tokens = {j.name: j.tokens for works in jobs for j in works}
    ran = [name for batch in fake.batches for name in batch]
    assert sorted(ran) == sorted(tokens)
    for batch in fake.batches:
        assert batch
        assert len(batch) == 1 or sum(tokens[n] for n in batch) <= budget


def test_sealed_late():
    """What comes while the engine is busy is one batch, not one batch each."""
    fake = Fake(100)

    async def scenario(engine):
        fake.gate.clear()
        tasks = [asyncio.create_task(engine.submit(fake, [Job(0, 10)]))]
        await entered(fake)
        tasks += [asyncio.create_task(engine.submit(fake, [Job(i, 10)])) for i in range(1, 9)]
        await asyncio.sleep(0.05)
        fake.gate.set()
        await asyncio.gather(*tasks)

    go(scenario)
    assert fake.batches == [[0], [1, 2, 3, 4, 5, 6, 7, 8]]


def test_short_requests_pass_a_large_one_and_it_still_ends():
    fake = Fake(100, seconds_per_token=2e-5)

    async def scenario(engine):
        await engine.submit(fake, [Job(-1, 100)])  # so that the speed is known
        large = asyncio.create_task(engine.submit(fake, [Job(i, 50) for i in range(100)]))
        await entered(fake, 2)
        at = []
        for i in range(1000, 1005):
            assert await engine.submit(fake, [Job(i, 10)]) == [i * 10]
            at.append(large.done())
        assert await large == [i * 10 for i in range(100)]
        return at

    assert not any(go(scenario))


def test_nothing_starves_under_a_flood_of_short_requests():
    """A long item is overtaken only by what came before it was due."""
    fake = Fake(100, seconds_per_token=1e-5)

    async def scenario(engine):
        stop = asyncio.Event()

        async def flood(start: int) -> None:
            i = start
            while not stop.is_set():
                await engine.submit(fake, [Job(i, 30)])
                i += 1

        floods = [asyncio.create_task(flood(10_000 * k)) for k in range(1, 9)]
        await asyncio.sleep(0.02)
        before = len(fake.batches)
        answers = await asyncio.wait_for(engine.submit(fake, [Job(1, 100), Job(2, 99)]), 20)
        after = len(fake.batches)
        stop.set()
        await asyncio.gather(*floods)
        assert answers == [10, 20]
        return after - before

    assert go(scenario) < 60


def test_long_item_runs_alone_and_fills_nothing():
    fake = Fake(100)

    async def scenario(engine):
        assert await engine.submit(fake, [Job(1, 500), Job(2, 10)]) == [10, 20]

    go(scenario)
    assert fake.batches == [[1], [2]]


def test_cancelled_items_are_dropped():
    fake = Fake(100)

    async def scenario(engine):
        fake.gate.clear()
        first = asyncio.create_task(engine.submit(fake, [Job(0, 100)]))
        await entered(fake)
        gone = asyncio.create_task(engine.submit(fake, [Job(i, 100) for i in range(1, 5)]))
        kept = asyncio.create_task(engine.submit(fake, [Job(9, 100)]))
        await asyncio.sleep(0.05)
        assert engine.status()["queued_tokens"] == 500
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert engine.status()["queued_tokens"] == 100
        fake.gate.set()
        assert await kept == [90]
        await first

    go(scenario)
    assert fake.batches == [[0], [9]]


def test_one_items_error_costs_no_other():
    fake = Fake(100)

    async def scenario(engine):
        fake.gate.clear()
        block = asyncio.create_task(engine.submit(fake, [Job(0, 100)]))
        await entered(fake)
        good = [asyncio.create_task(engine.submit(fake, [Job(i, 10)])) for i in range(1, 5)]
        bad = asyncio.create_task(engine.submit(fake, [Job(7, 10), Job(8, 10, poison=True)]))
        await asyncio.sleep(0.05)
        fake.gate.set()
        await block
        assert [await t for t in good] == [[10], [20], [30], [40]]
        fine, failed = await bad
        assert fine == 70
        assert isinstance(failed, RuntimeError)
        assert "MKT" not in str(failed)

    go(scenario)


def test_full_queue_is_refused_and_an_empty_one_takes_anything():
    fake = Fake(100)

    async def scenario(engine):
        assert await engine.submit(fake, [Job(0, 400)]) == [0]
        fake.gate.clear()
        first = asyncio.create_task(engine.submit(fake, [Job(1, 100)]))
        await entered(fake, 2)
        second = asyncio.create_task(engine.submit(fake, [Job(2, 200)]))
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded) as caught:
            await engine.submit(fake, [Job(3, 200)])
        assert caught.value.retry_after >= 1
        later = asyncio.create_task(engine.submit(fake, [Job(4, 200)], admitted=True))
        await asyncio.sleep(0.02)
        fake.gate.set()
        assert [await first, await second, await later] == [[10], [20], [40]]

    go(scenario, max_queued_tokens=300)


def test_wait_is_predicted_and_bounded():
    clock = [0.0]
    fake = Fake(100)

    async def scenario(engine):
        run = fake.run

        def slow(works):
            answers = run(works)
            clock[0] += sum(w.tokens for w in works) * 0.01
            return answers

        fake.run = slow
        await engine.submit(fake, [Job(0, 100)])  # 10 ms a token
        fake.gate.clear()
        first = asyncio.create_task(engine.submit(fake, [Job(1, 100)]))
        await entered(fake, 2)
        assert engine.status()["wait_s"] == pytest.approx(1.0)
        tasks = [asyncio.create_task(engine.submit(fake, [Job(i, 100)])) for i in range(2, 4)]
        await asyncio.sleep(0.02)
        with pytest.raises(Overloaded):
            await engine.submit(fake, [Job(9, 10)])
        fake.gate.set()
        await asyncio.gather(first, *tasks)

    go(scenario, max_queue_s=3.4, clock=lambda: clock[0])


def test_what_waited_too_long_is_refused_when_its_turn_comes():
    clock = [0.0]
    fake = Fake(100)

    async def scenario(engine):
        fake.gate.clear()
        first = asyncio.create_task(engine.submit(fake, [Job(0, 100)]))
        await entered(fake)
        late = asyncio.create_task(engine.submit(fake, [Job(1, 10)]))
        await asyncio.sleep(0.05)
        clock[0] = 99.0
        fake.gate.set()
        await first
        with pytest.raises(Overloaded):
            await late

    go(scenario, max_queue_s=5.0, clock=lambda: clock[0])
    assert fake.batches == [[0]]


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_is_accepted_is_answered_within_the_limit(lanes):
    """A burst of many times what the engine can do: the whole of an accepted request is in time, not its beginning."""
    clock = [0.0]
    lock = threading.Lock()
    fake = Fake(100)

    async def scenario(engine):
        run = fake.run

        def slow(works):
            answers = run(works)
            with lock:
                clock[0] += sum(w.tokens for w in works) * 0.01 / lanes
            return answers

        fake.run = slow
        engine._rates.add(fake, 1000, 10.0)  # 10 ms a token, of one lane
        fake.gate.clear()
        statuses = {"in time": 0, "late": 0, "refused": 0}

        async def one(i: int) -> None:
            try:
                await engine.submit(fake, [Job(10 * i + k, 20) for k in range(4)])
            except Overloaded:
                statuses["refused"] += 1
            else:
                statuses["in time" if clock[0] <= 5.0 else "late"] += 1

        tasks = [asyncio.create_task(one(i)) for i in range(60)]
        await entered(fake, lanes)
        fake.gate.set()
        await asyncio.gather(*tasks)
        return statuses

    statuses = go(scenario, max_queue_s=5.0, lanes=lanes, clock=lambda: clock[0])
    assert statuses["late"] == 0 and statuses["refused"] > 30 and statuses["in time"] >= 2 * lanes, statuses


def test_runners_do_not_share_batches_and_calls_run_between():
    one, two = Fake(100), Fake(100)
    seen = []

    async def scenario(engine):
        one.gate.clear()
        first = asyncio.create_task(engine.submit(one, [Job(0, 10)]))
        await entered(one)
        called = asyncio.wrap_future(engine.call(lambda: seen.append((len(one.batches), len(two.batches)))))
        tasks = [
            asyncio.create_task(engine.submit(f, [Job(i, 10)])) for i, f in enumerate([one, two, one, two], 1)
        ]
        await asyncio.sleep(0.05)
        assert not seen
        one.gate.set()
        await asyncio.gather(first, called, *tasks)

    go(scenario, lanes=2)
    assert seen == [(1, 0)]
    assert sorted(n for batch in one.batches for n in batch) == [0, 1, 3]
    assert sorted(n for batch in two.batches for n in batch) == [2, 4]


def test_dead_engine_says_so():
    class Dying(Fake):
        def run(self, works):
            raise SystemExit

    fake = Dying()

    async def scenario(engine):
        with pytest.raises(EngineDead):
            await engine.submit(fake, [Job(0, 1)])
        with pytest.raises(EngineDead):
            await engine.submit(fake, [Job(0, 1)])
        with pytest.raises(EngineDead):
            engine.check()

    threading.excepthook, before = (lambda args: None), threading.excepthook
    try:
        go(scenario)
    finally:
        threading.excepthook = before


def test_hanging_batch_fails_the_health_check():
    clock = [0.0]
    fake = Fake()

    async def scenario(engine):
        fake.gate.clear()
        task = asyncio.create_task(engine.submit(fake, [Job(0, 1)]))
        await entered(fake)
        engine.check()
        clock[0] = 700.0
        with pytest.raises(EngineDead):
            engine.check()
        fake.gate.set()
        await task

    go(scenario, clock=lambda: clock[0])


def test_random_storm_of_cancellations_loses_nothing():
    fake = Fake(64, seconds_per_token=1e-6)
    dice = random.Random(3)

    async def scenario(engine):
        async def one(i: int) -> bool:
            works = [Job(i * 100 + k, dice.randint(1, 80)) for k in range(dice.randint(1, 6))]
            task = asyncio.create_task(engine.submit(fake, works))
            if dice.random() < 0.4:
                await asyncio.sleep(dice.random() * 0.01)
                task.cancel()
            try:
                assert await task == [w.name * 10 for w in works]
            except asyncio.CancelledError:
                return False
            return True

        results = await asyncio.gather(*(one(i) for i in range(150)))
        assert any(results)
        await asyncio.sleep(0.05)
        status = engine.status()
        assert (status["queued_tokens"], status["queued_requests"]) == (0, 0)

    go(scenario, lanes=2)


def test_no_lane_begins_a_batch_while_a_call_changes_the_model():
    """A head whose adapter is being loaded must not be answered without it."""
    fake = Fake(100)
    calling, end = threading.Event(), threading.Event()

    def change() -> list[list[int]]:
        calling.set()
        assert end.wait(30)
        return list(fake.batches)

    async def scenario(engine):
        called = asyncio.wrap_future(engine.call(change))
        assert await asyncio.to_thread(calling.wait, 30)
        answers = [asyncio.create_task(engine.submit(fake, [Job(i, 10)])) for i in range(4)]
        await asyncio.sleep(0.2)  # time for a free lane to begin them
        end.set()
        assert await called == []
        assert [await a for a in answers] == [[i * 10] for i in range(4)]

    go(scenario, lanes=3)


def test_what_is_shed_leaves_nothing_in_the_count_of_queued_tokens():
    fake, now = Fake(100), [0.0]

    async def scenario(engine):
        fake.gate.clear()
        first = asyncio.create_task(engine.submit(fake, [Job(0, 100)]))
        await entered(fake)
        late = [
            asyncio.create_task(engine.submit(fake, [Job(i, 900), Job(i + 10, 900)])) for i in range(1, 6)
        ]
        await asyncio.sleep(0.05)
        now[0] = 1000.0
        fake.gate.set()
        await first
        refused = await asyncio.gather(*late, return_exceptions=True)
        assert all(isinstance(r, Overloaded) for r in refused)
        assert engine.status()["queued_tokens"] == 0
        await engine.submit(fake, [Job(50, 100)])
        assert engine.status()["queued_tokens"] == 0

    go(scenario, max_queue_s=10.0, clock=lambda: now[0], stuck_s=1e9)


def test_small_batches_of_a_runner_with_a_fixed_cost_do_not_make_it_look_slow():
    """Twenty that come after a lone one are not refused for the time that the lone one took."""
    fake, now = Fake(10_000), [0.0]

    async def scenario(engine):
        fake.gate.clear()
        lone = asyncio.create_task(engine.submit(fake, [Job(0, 100)]))
        await entered(fake)
        now[0] = 1.0
        fake.gate.set()
        await lone
        fake.gate.clear()
        tasks = [asyncio.create_task(engine.submit(fake, [Job(i, 100)])) for i in range(1, 21)]
        await asyncio.sleep(0.1)
        fake.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    refused = go(scenario, max_queue_s=10.0, clock=lambda: now[0])
    assert any(isinstance(r, Overloaded) for r in refused)
    assert go(scenario, max_queue_s=10.0, clock=lambda: now[0], floor_tokens=4000) == [
        [i * 10] for i in range(1, 21)
    ]


def test_one_callers_thousand_requests_do_not_keep_another_waiting():
    fake = Fake(10)

    async def scenario(engine):
        fake.gate.clear()
        flood = [asyncio.create_task(engine.submit(fake, [Job(i, 10)], caller="a")) for i in range(1000)]
        await entered(fake)
        one = asyncio.create_task(engine.submit(fake, [Job(5000, 10)], caller="b"))
        await asyncio.sleep(0)
        fake.gate.set()
        await one
        ahead = fake.batches.index([5000])
        await asyncio.gather(*flood)
        return ahead

    assert go(scenario, lanes=1) <= 3


def test_callers_that_wait_get_equal_shares_of_tokens_whatever_they_send():
    fake = Fake(10)

    async def scenario(engine):
        fake.gate.clear()
        first = asyncio.create_task(engine.submit(fake, [Job(-1, 10)]))
        await entered(fake)
        tasks = [asyncio.create_task(engine.submit(fake, [Job(i, 10)], caller="a")) for i in range(60)]
        tasks += [
            asyncio.create_task(engine.submit(fake, [Job(1000 + i, 1) for i in range(300)], caller="b"))
        ]
        await asyncio.sleep(0.05)
        fake.gate.set()
        await asyncio.gather(first, *tasks)

    go(scenario, lanes=1)
    done = {"a": 0, "b": 0}
    for name in [n for batch in fake.batches[1:] for n in batch]:
        done["b" if name >= 1000 else "a"] += 1 if name >= 1000 else 10
        if done["b"] < 290:  # while both wait
            assert abs(done["a"] - done["b"]) <= 20


def test_a_callers_full_queue_refuses_that_caller_and_not_another():
    fake = Fake(10)

    async def filled(engine):
        fake.gate.clear()
        tasks = [asyncio.create_task(engine.submit(fake, [Job(-1, 10)], caller="a"))]
        await entered(fake)
        tasks += [asyncio.create_task(engine.submit(fake, [Job(i, 10)], caller="a")) for i in range(10)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):
            await engine.submit(fake, [Job(50, 10)], caller="a")
        other = asyncio.create_task(engine.submit(fake, [Job(51, 10)], caller="b"))
        await asyncio.sleep(0.05)
        assert not other.done()
        fake.gate.set()
        assert await other == [510]
        await asyncio.gather(*tasks)

    go(filled, max_queued_tokens=100)


def test_a_callers_long_wait_refuses_that_caller_and_not_another():
    fake, now = Fake(10), [0.0]

    async def scenario(engine):
        fake.gate.clear()
        tasks = [asyncio.create_task(engine.submit(fake, [Job(0, 10)], caller="a"))]
        await entered(fake)
        now[0] = 10.0
        fake.gate.set()
        await tasks[0]  # a second a token
        fake.gate.clear()
        tasks = [asyncio.create_task(engine.submit(fake, [Job(i, 10)], caller="a")) for i in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):  # 30 s are due before it
            await engine.submit(fake, [Job(3, 10)], caller="a")
        other = asyncio.create_task(engine.submit(fake, [Job(4, 10)], caller="b"))
        await asyncio.sleep(0.05)
        assert not other.done()
        fake.gate.set()
        assert await other == [40]
        await asyncio.gather(*tasks, return_exceptions=True)

    go(scenario, lanes=1, max_queue_s=40.0, clock=lambda: now[0])


def test_an_error_of_the_device_ends_the_engine_and_is_no_items_fault():
    fake, told = Fake(), []

    async def scenario(engine):
        with pytest.raises(EngineDead):
            await engine.submit(fake, [Job(1, 10), Job(2, 10, poison=True)])
        with pytest.raises(EngineDead):
            engine.check()
        with pytest.raises(EngineDead):
            await engine.submit(fake, [Job(3, 10)])

    go(scenario, fatal=lambda e: isinstance(e, ValueError), on_death=lambda: told.append(1))
    assert told == [1]


def test_an_engine_that_is_stopped_is_not_dead():
    told = []

    async def scenario(engine):
        await engine.submit(Fake(), [Job(1, 10)])

    go(scenario, on_death=lambda: told.append(1))
    assert told == []


def test_a_busy_engine_without_a_queue_says_that_it_is_busy():
    fake, now = Fake(), [0.0]

    async def scenario(engine):
        fake.gate.clear()
        task = asyncio.create_task(engine.submit(fake, [Job(1, 10)]))
        await entered(fake)
        assert engine.status()["queued_tokens"] == 0 and engine.status()["running_tokens"] == 10
        now[0] = 10.0
        assert engine.busy_since() == 1.0
        fake.gate.set()
        await task
        now[0] = 20.0
        assert engine.busy_since() == 0.0

    go(scenario, lanes=1, clock=lambda: now[0])

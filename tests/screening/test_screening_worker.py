from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from standin import StandIn

from serving.screening.isolation import Screened, isolate
from serving.screening.units import SHARD_SCHEMA
from serving.screening.worker import ShardWorker


class Death(BaseException):
    """Stands for SIGKILL: nothing in the worker catches it."""


class Killer:
    """An engine that dies on some sequences; `calls` counts what it was asked for."""

    def __init__(self, poison, real):
        self.poison, self.real, self.calls = poison, real, []

    def run(self, sequences, embed):
        self.calls.append(len(sequences))
        if any(s in self.poison for s in sequences):
            raise Death
        return self.real.run(sequences, embed)


@pytest.fixture
def work(tmp_path):
    for name in ("shards", "parts", "vectors", "trails"):
        (tmp_path / name).mkdir()
    return tmp_path


def shard(work, sequences):
    import pyarrow as pa

    table = pa.table({"unit": range(len(sequences)), "sequence": sequences}, schema=SHARD_SCHEMA)
    pq.write_table(table, work / "shards" / "shard-000000.parquet")


def survive(work, poison, attempt=1, limit=60):
    """New workers until one lives, as Ray starts them; returns its receipt and the number of deaths."""
    for deaths in range(limit):
        worker = ShardWorker(StandIn(), str(work), attempt, stride=1)
        worker.engine = Killer(poison, StandIn().build())
        try:
            return worker.compute(0, "shard-000000.parquet", 1), deaths
        except Death:
            continue
    raise AssertionError("never finished")


def part(work, receipt):
    return pq.read_table(work / "parts" / receipt.file).to_pylist()


SEQUENCES = ["ACDEFGHIKL"[i % 7 :] + "MNPQRSTVWY"[: i % 9 + 1] + "A" * i for i in range(33)]


@pytest.mark.parametrize("places", [[0], [32], [17], [3, 4], [0, 16, 32], []])
def test_exactly_the_killing_records_are_quarantined(work, places):
    shard(work, SEQUENCES)
    receipt, deaths = survive(work, {SEQUENCES[i] for i in places})
    rows = part(work, receipt)
    assert [r["unit"] for r in rows if r["error"]] == places
    assert all(r["error"].startswith("worker.killed: ") for r in rows if r["error"])
    assert receipt.quarantined == len(places)
    assert deaths == 0 if not places else deaths >= 4  # two of the shard, then its halves


def test_the_rest_of_a_poisoned_shard_equals_a_clean_one(work):
    shard(work, SEQUENCES)
    poisoned, _ = survive(work, {SEQUENCES[5]})
    clean, _ = survive(work, set())
    a, b = part(work, poisoned), part(work, clean)
    assert a[:5] + a[6:] == b[:5] + b[6:]


def test_two_deaths_that_were_not_the_shards_fault_change_nothing(work):
    shard(work, SEQUENCES)
    clean, _ = survive(work, set())
    for _ in range(2):
        worker = ShardWorker(StandIn(), str(work), 1, stride=1)
        worker.engine = Killer(set(SEQUENCES), None)
        with pytest.raises(Death):
            worker.compute(0, "shard-000000.parquet", 1)
    again, _ = survive(work, set())
    assert (work / "parts" / clean.file).read_bytes() == (work / "parts" / again.file).read_bytes()


def test_deaths_of_an_older_attempt_do_not_count_but_its_verdicts_do(work):
    shard(work, SEQUENCES)
    worker = ShardWorker(StandIn(), str(work), 1, stride=1)
    worker.engine = Killer({SEQUENCES[2]}, None)
    with pytest.raises(Death):
        worker.compute(0, "shard-000000.parquet", 1)
    _, deaths = survive(work, set(), attempt=2)
    assert deaths == 0


def test_a_shard_that_only_kills_whole_is_an_error_not_a_loop(work):
    shard(work, SEQUENCES)

    class Together(Killer):
        def run(self, sequences, embed):
            if len(sequences) == len(SEQUENCES):
                raise Death
            return self.real.run(sequences, embed)

    for _ in range(20):
        worker = ShardWorker(StandIn(), str(work), 1, stride=1)
        worker.engine = Together(set(), StandIn().build())
        try:
            answer = worker({"shard": [0], "file": ["shard-000000.parquet"], "tokens": [1]})
        except Death:
            continue
        assert answer["code"] == ["worker.killed"]
        return
    raise AssertionError("never gave up")


def test_out_of_memory_halves_down_to_the_record_that_does_not_fit():
    engine = StandIn(fits=40).build()
    sequences = ["A" * 10] * 7 + ["C" * 50] + ["D" * 30]
    found = engine.run(sequences, [False] * len(sequences))
    assert [r.error is not None for r in found] == [False] * 7 + [True, False]
    assert found[7].error.startswith("resource.insufficient: ")


def test_one_record_that_raises_costs_no_other():
    engine = StandIn(trip="WWW").build()
    found = engine.run(["ACDE", "AWWWA", "AC"], [True] * 3)
    assert [r.error is None for r in found] == [True, False, True]
    assert "AWWWA" not in found[1].error  # sequences are confidential


def test_isolate_raises_what_concerns_the_run():
    def compute(places: list[int]) -> list[Screened]:
        raise FileNotFoundError(2, "No such file", "/model")

    with pytest.raises(FileNotFoundError):
        isolate(compute, [1, 2, 3])


def test_a_full_disk_is_told_not_raised(work, monkeypatch):
    import errno
    import os

    shard(work, SEQUENCES)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    answer = ShardWorker(StandIn(), str(work), 1, 1)(
        {"shard": [0], "file": ["shard-000000.parquet"], "tokens": [1]}
    )
    assert "No space left" in answer["fatal"][0] and answer["receipt"] == [""]
    assert list((work / "parts").iterdir()) == []

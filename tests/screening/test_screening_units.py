from __future__ import annotations

import random

import pyarrow.parquet as pq
import pytest

from serving.screening import source, units
from serving.screening.index import IndexJob
from serving.screening.source import Piece


def library(tmp_path, count=4000, distinct=900, seed=3):
    random.seed(seed)
    pool = ["".join(random.choices("ACDEFGHIKLMNPQRSTVWY", k=random.randint(5, 60))) for _ in range(distinct)]
    records = [random.choice(pool) if random.random() > 0.01 else "AC1" for _ in range(count)]
    path = tmp_path / "many.fasta"
    path.write_text("".join(f">r{i}\n{s if i % 3 else s.lower()}\n" for i, s in enumerate(records)))
    return path, records


def index(tmp_path, path, split_bytes):
    work = tmp_path / f"work-{split_bytes}"
    (work / "index").mkdir(parents=True)
    job = IndexJob(str(work / "index"), "protein", 1000)
    splits = source.cut((str(path),), [path.stat().st_size], split_bytes)
    return work, [Piece(**p) for split in splits for p in job(split)]


def shards(work, plan):
    return [pq.read_table(work / "shards" / s["file"]).to_pylist() for s in plan.shards]


@pytest.mark.parametrize("split_bytes", [3000, 1 << 30])
def test_units_are_the_distinct_sequences_by_first_row(tmp_path, split_bytes):
    path, records = library(tmp_path)
    work, pieces = index(tmp_path, path, split_bytes)
    plan = units.cut_shards(work, pieces, budget=64, keep_all=False)
    wanted = list(dict.fromkeys(s for s in records if "1" not in s))
    found = [row for shard in shards(work, plan) for row in shard]
    assert [row["sequence"] for row in found] == wanted
    assert [row["unit"] for row in found] == list(range(len(wanted)))
    assert plan.records == 4000 and plan.faulty == records.count("AC1") and plan.units == len(wanted)
    assert len(plan.shards) > 5
    assert max(s["tokens"] for s in plan.shards) <= 16 * 64


def test_shards_do_not_depend_on_how_the_file_was_cut(tmp_path):
    path, _ = library(tmp_path)
    made = []
    for split_bytes in (1000, 50_000):
        work, pieces = index(tmp_path, path, split_bytes)
        made.append(shards(work, units.cut_shards(work, pieces, budget=64, keep_all=False)))
    assert made[0] == made[1]


def test_a_sequence_over_the_bound_has_a_shard_of_its_own(tmp_path):
    path = tmp_path / "l.fasta"
    path.write_text(">a\nACDE\n>b\n" + "A" * 900 + "\n>c\nACD\n")
    work, pieces = index(tmp_path, path, 1 << 20)
    plan = units.cut_shards(work, pieces, budget=4, keep_all=False)
    assert [s["units"] for s in plan.shards] == [1, 1, 1]


def test_a_library_without_one_good_record_has_no_shards(tmp_path):
    path = tmp_path / "l.fasta"
    path.write_text(">a\nA1\n>b\n")
    work, pieces = index(tmp_path, path, 1 << 20)
    plan = units.cut_shards(work, pieces, budget=64, keep_all=False)
    assert (plan.units, plan.shards, plan.faulty) == (0, [], 2)


def test_deduplication_spills_instead_of_failing(tmp_path, monkeypatch):
    path, records = library(tmp_path, count=60_000, distinct=40_000)
    work, pieces = index(tmp_path, path, 1 << 20)
    monkeypatch.setattr(units, "DATABASE_MEMORY", "40MiB")
    monkeypatch.setattr(units.connect, "__kwdefaults__", {"threads": 1, "memory": "40MiB"})
    rows = pq.read_table(units.deduplicate(work, pieces))["row"].to_pylist()
    first = {}
    for i, s in enumerate(records):
        if "1" not in s:
            first.setdefault(s, i)
    assert rows == sorted(first.values())

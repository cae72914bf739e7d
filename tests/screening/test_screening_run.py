"""Whole runs with the stand-in engine, in one Ray."""

from __future__ import annotations

import gzip
import json
import os
import shutil

import pytest
from screening_helpers import LIBRARY, committed, hits, make_spec, reference, results, table
from standin import StandIn

from bioseq.errors import BioseqError, ExpressionError, FastaError, OutputError, ResourceError, SpecError
from serving.screening import run as room
from serving.screening.run import screen

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "run"
    engine = StandIn(budget=256)
    return screen(make_spec(folder), engine=engine, progress=False)


def test_the_table_is_the_plain_loops_table(done):
    engine = StandIn().build()
    wanted = reference(LIBRARY, lambda s: engine.run([s], [False])[0].cells)
    found = table(done.path)
    assert len(found) == len(wanted) == LIBRARY.read_text().count(">")
    for got, want in zip(found, wanted):
        code = want.pop("code", None)
        assert {k: got[k] for k in want} == want
        assert (got["error"] or "").startswith(f"{code}: " if code else "")


def test_hits_are_ranked_and_their_sequences_are_beside_them(done):
    rows = hits(done.path)
    assert [int(r["rank"]) for r in rows] == list(range(1, len(rows) + 1))
    assert all(float(r["place.nucleus"]) > 0.1 and r["status"] == "ok" for r in rows)
    scores = [float(r["score"]) for r in rows]
    assert scores == sorted(scores) and len(rows) == done.summary["counts"]["hits"] <= 100
    text = (done.path / "hits.fasta").read_text().split(">")[1:]
    assert [t.split()[0] for t in text] == [r["id"] for r in rows]
    assert [len("".join(t.splitlines()[1:])) for t in text] == [int(r["length"]) for r in rows]
    assert not {"stop-inside", "illegal", "no-residues"} & {r["id"] for r in rows}


def test_the_summary_counts_everything_and_holds_no_time(done):
    s = done.summary
    assert (s["records"], s["ok"], s["quarantined"]) == (318, 315, 3)
    assert s["distinct"] + s["duplicates"] == s["ok"]
    assert s["reasons"] == {"sequence.empty": 1, "sequence.illegal_residue": 2}
    assert sum(s["length"]["bins"]) == s["ok"]
    assert "seconds" not in str(s) and "host" not in s
    assert not (done.path / "work").exists()


def test_what_a_run_leaves_names_no_folder_and_no_host(done):
    """A result travels; its lock, which is the run's own, stays with the server."""
    for path in done.path.rglob("*"):
        if path.suffix in (".json", ".html", ".csv", ".fasta") and path.name != "lock.json":
            text = path.read_text()
            assert str(done.path.parent) not in text and str(LIBRARY.parent) not in text, path.name
    assert {"began", "attempts", "workers"} <= set(json.loads((done.path / "run.json").read_text()))


def test_the_report_stands_alone_and_shows_no_sequence(done):
    page = (done.path / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") >= 5
    assert "sequence.illegal_residue" in page and hits(done.path)[0]["id"] in page
    first = next(t for t in LIBRARY.read_text().split(">")[1:])
    assert first.splitlines()[1][:30] not in page


def test_workers_shards_in_gzip_and_resumption_change_no_byte(done, tmp_path):
    packed = tmp_path / "library.fasta"  # gzip is told by its bytes, not its name
    packed.write_bytes(gzip.compress(LIBRARY.read_bytes()))
    one = screen(make_spec(tmp_path / "one", workers=1), engine=StandIn(budget=256), progress=False)
    assert results(one.path) == results(done.path)
    other = screen(
        make_spec(tmp_path / "gz", inputs=(str(packed),)), engine=StandIn(budget=256), progress=False
    )
    for name in ("hits.csv", "hits.fasta", "map.parquet"):
        assert (other.path / name).read_bytes() == (done.path / name).read_bytes()


def test_the_same_command_again_computes_nothing(done):
    before = {p: p.stat().st_mtime_ns for p in done.path.rglob("*")}
    again = screen(make_spec(done.path), engine=StandIn(budget=256), progress=False)
    assert not again.fresh and again.summary == done.summary
    assert {p: p.stat().st_mtime_ns for p in done.path.rglob("*")} == before


@pytest.mark.parametrize(
    "changes, engine, says",
    [
        ({"top": 5}, {}, "settings.top was 100, now 5"),
        ({"inputs": (str(LIBRARY.with_name("proteins.fasta")),)}, {}, "inputs[0].bytes was"),
        ({}, {"name": "another"}, 'model.name was "stand-in", now "another"'),
    ],
)
def test_a_changed_command_refuses_the_folder(done, changes, engine, says):
    with pytest.raises(SpecError) as caught:
        screen(make_spec(done.path, **changes), engine=StandIn(**{"budget": 256, **engine}), progress=False)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "changes, error, says",
    [
        ({"where": "nucleus >"}, ExpressionError, "breaks off"),
        ({"rank": "nothing.value"}, ExpressionError, "Columns: id, row, length"),
        ({"inputs": ("/nowhere.fasta",)}, FastaError, "No such file"),
        ({"output": "/proc/nowhere/run"}, OutputError, "cannot write"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        screen(make_spec(tmp_path / "run", **changes), engine=StandIn(), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, says",
    [
        (b"\x7fELF\x01\x02\x00" * 50, "first line"),
        (gzip.compress(b">a\nACDE\n" * 2000, mtime=0)[:-30], "breaks off"),
    ],
)
def test_a_broken_library_is_an_error_and_the_folder_can_be_used_again(tmp_path, content, says):
    path = tmp_path / "bad.fasta"
    path.write_bytes(content)
    with pytest.raises(BioseqError, match=says):
        screen(make_spec(tmp_path / "run", inputs=(str(path),)), engine=StandIn(), progress=False)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_library_that_ends_in_the_middle_of_a_record_keeps_the_rest(tmp_path):
    path = tmp_path / "half.fasta"
    path.write_text(">a\nACDEF\n>b\nACDEG\n>c")
    done = screen(
        make_spec(tmp_path / "run", inputs=(str(path),), where=None), engine=StandIn(), progress=False
    )
    assert [(r["id"], r["status"]) for r in table(done.path)] == [
        ("a", "ok"),
        ("b", "ok"),
        ("c", "quarantined"),
    ]


def test_a_library_without_a_good_record_gives_empty_results(tmp_path):
    path = tmp_path / "bad.fasta"
    path.write_text(">a\nAC1\n>b\n\n")
    done = screen(make_spec(tmp_path / "run", inputs=(str(path),)), engine=StandIn(), progress=False)
    assert done.summary["quarantined"] == 2 and hits(done.path) == []
    assert "No record passed" in (done.path / "report.html").read_text()


def test_a_model_removed_in_mid_run_is_told_and_the_run_resumes(done, tmp_path):
    model = tmp_path / "model.safetensors"
    model.touch()
    spec, engine = make_spec(tmp_path / "run"), StandIn(budget=256, fatal=str(model))
    real = room._Run._receipts

    def remove_after_three(self, waiting, plan):
        for i, receipt in enumerate(real(self, waiting, plan)):
            if i == 3:
                model.unlink()
            yield receipt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room._Run, "_receipts", remove_after_three)
        with pytest.raises(BioseqError, match=r"model\.safetensors: No such file"):
            screen(spec, engine=engine, progress=False)
    assert committed(tmp_path / "run") >= 3
    model.touch()
    again = screen(spec, engine=engine, progress=False)
    assert again.resumed and results(again.path) == results(done.path)


def test_a_record_that_kills_its_worker_is_quarantined_alone(tmp_path):
    path = tmp_path / "poison.fasta"
    path.write_text(
        "".join(f">r{i}\n{'ACDEFGHIKL' * 3}{'A' * i}{'WYWYW' if i == 1 else ''}\n" for i in range(3))
    )
    spec = make_spec(tmp_path / "run", inputs=(str(path),), where=None, diverse=None, workers=1)
    done = screen(spec, engine=StandIn(budget=2048, poison="WYWYW"), progress=False)
    rows = table(done.path)
    assert [r["id"] for r in rows if r["status"] != "ok"] == ["r1"]
    assert rows[1]["error"].startswith("worker.killed: ")


def test_no_memory_is_told_before_anything_starts(tmp_path):
    with pytest.raises(ResourceError, match=r"2 engines need about .* MiB are free"):
        screen(make_spec(tmp_path / "run"), engine=StandIn(memory_bytes=1 << 60), progress=False)


def test_embeddings_are_kept_on_request_in_portable_types(tmp_path):
    import pyarrow.parquet as pq

    done = screen(make_spec(tmp_path / "run", keep_embeddings=True), engine=StandIn(), progress=False)
    kept = pq.read_table(done.path / "embeddings")
    assert kept["row"].to_pylist() == [r["row"] for r in table(done.path) if r["status"] == "ok"]
    assert str(
        kept.schema.field("embedding").type
    ) == "fixed_size_list<element: float>[8]" or "fixed_size_list" in str(kept.schema.field("embedding").type)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="needs a small mounted disk: root"
)
def test_a_full_disk_is_told_and_the_run_resumes_elsewhere_unharmed(tmp_path):
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(BioseqError, match=r"(?i)no space left|cannot write|out of"):
            screen(make_spec(disk / "run"), engine=StandIn(budget=256), progress=False)
        assert not (disk / "run" / "summary.json").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert (
            screen(make_spec(disk / "run"), engine=StandIn(budget=256), progress=False).summary["records"]
            == 318
        )
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)

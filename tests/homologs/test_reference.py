from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bioseq.errors import OutputError, ReferenceSetError, SequenceError
from bioseq.homologs.database import open_database
from bioseq.homologs.hits import encode
from bioseq.homologs.reference import SHIPPED, ReferenceSet, build_reference, open_reference
from bioseq.homologs.search import search
from bioseq.sequences.fasta import Record


@pytest.mark.parametrize("pack", ["gz", "xz"])
def test_a_set_reads_back_what_was_put_in(families: list[Record], tmp_path: Path, pack: str) -> None:
    made = build_reference(iter(families), tmp_path / "set", pack=pack, name="mine", licence="CC0")
    again = open_reference(tmp_path / "set")
    assert [(r.id, r.sequence) for r in again.records()] == [(r.id, r.sequence) for r in families]
    assert again.hash == made.hash and again.name == "mine" and len(again) == len(families)


def test_its_identity_is_its_sequences_alone(families: list[Record], tmp_path: Path) -> None:
    one = build_reference(families, tmp_path / "a", pack="gz", name="one")
    two = build_reference(families, tmp_path / "b", pack="xz", name="two", licence="secret")
    less = build_reference(families[1:], tmp_path / "c")
    assert one.hash == two.hash != less.hash


def test_the_shipped_set_is_whole_small_and_credited() -> None:
    shipped = open_reference("default")
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) <= 24 << 20
    assert len(shipped) > 100_000 and shipped.manifest.licence and shipped.manifest.citation


def changed(folder: Path, **keys: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"hash": "0" * 64}, "does not match the hash"),
        ({"file_sha256": "0" * 64}, "does not match the file_sha256"),
        ({"alphabet": "dna"}, "holds dna sequences"),
        ({"format": 9}, "format 9"),
        ({"colour": "red"}, "colour: unknown key"),
        ({"file": "../../etc/passwd"}, "it must be"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(
    families: list[Record], tmp_path: Path, keys: dict[str, object], told: str
) -> None:
    build_reference(families, tmp_path / "set")
    changed(tmp_path / "set", **keys)
    with pytest.raises(ReferenceSetError, match=told):
        open_reference(tmp_path / "set")


def test_half_a_set_is_refused(families: list[Record], tmp_path: Path) -> None:
    made = build_reference(families, tmp_path / "set")
    file = tmp_path / "set" / made.manifest.file
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ReferenceSetError, match="does not match"):
        open_reference(tmp_path / "set")
    file.unlink()
    with pytest.raises(ReferenceSetError, match="cannot be read"):
        open_reference(tmp_path / "set")
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(ReferenceSetError, match=r"no manifest\.json"):
        open_reference(tmp_path / "set")
    with pytest.raises(ReferenceSetError, match="does not exist"):
        open_reference(tmp_path / "nowhere")


def test_a_bad_record_leaves_nothing(families: list[Record], tmp_path: Path) -> None:
    with pytest.raises(SequenceError, match="bad"):
        build_reference([*families, Record("bad", "MK1LV")], tmp_path / "set")
    with pytest.raises(ReferenceSetError, match="no sequence"):
        build_reference([], tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    build_reference(families, tmp_path / "set")
    with pytest.raises(OutputError, match="exists"):
        build_reference(families, tmp_path / "set")


def test_the_database_knows_ids_and_residues(reference: ReferenceSet, families: list[Record]) -> None:
    database = open_database(reference, quiet=True)
    for key in (0, 7, len(families) - 1):
        assert database.id(key) == families[key].id
        start, end = database.offsets[key], database.offsets[key + 1]
        assert (database.codes[start:end] == encode(families[key].sequence)).all()


def test_wrong_sequences_never_become_a_database(families: list[Record], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))
    made = build_reference(families, tmp_path / "set")
    other = build_reference(families[5:], tmp_path / "other")
    wrong = ReferenceSet(tmp_path / "set", made.manifest)
    (tmp_path / "set" / made.manifest.file).write_bytes(
        (tmp_path / "other" / other.manifest.file).read_bytes()
    )
    with pytest.raises(ReferenceSetError, match="do not match"):
        open_database(wrong, quiet=True)
    assert not [p for p in (tmp_path / "home" / "homologs").iterdir() if p.is_dir()]


BUILD = (
    "import sys; from bioseq.homologs.database import open_database; "
    "from bioseq.homologs.reference import open_reference; "
    "d = open_database(open_reference(sys.argv[1])); print(d.folder, len(d.offsets))"
)
SLOW = "import bioseq.homologs.database as d, time; d.run_mmseqs = lambda *a, **k: time.sleep(600); "


def start(code: str, folder: Path, home: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "BIOSEQ_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_concurrent_starts_build_one_database(families: list[Record], tmp_path: Path) -> None:
    build_reference(families, tmp_path / "set")
    running = [start(BUILD, tmp_path / "set", tmp_path / "home") for _ in range(3)]
    told = [p.communicate(timeout=200) for p in running]
    assert [p.returncode for p in running] == [0, 0, 0], told
    assert len({out for out, _ in told}) == 1
    assert sum("this happens once" in err for _, err in told) == 1
    folders = [p for p in (tmp_path / "home" / "homologs").iterdir() if p.is_dir()]
    assert len(folders) == 1


def test_a_build_that_was_killed_is_made_again(
    families: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_reference(families, tmp_path / "set")
    killed = start(SLOW + BUILD, tmp_path / "set", tmp_path / "home")
    homologs = tmp_path / "home" / "homologs"
    deadline = time.monotonic() + 100
    while not list(homologs.glob("*.part-*/offsets.npy")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(homologs.glob("*.part-*")) and not list(homologs.glob("*/ready.json"))
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))
    reference = open_reference(tmp_path / "set")
    (hits,) = search([families[0]], reference, quiet=True)
    assert hits.ids[0] == families[0].id
    assert not list(homologs.glob("*.part-*"))

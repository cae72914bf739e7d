from __future__ import annotations

import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_helpers import proteins

from bioseq.errors import InputError, OutputError, SequenceError
from training.corpus import staging
from training.corpus.corpus import open_corpus
from training.corpus.prepare import Prepare, prepare


def _make(folder: Path, **options):
    return prepare(Prepare(**options), folder, progress=False)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_text_gzip_xz_and_fasta_give_the_same_records(tmp_path):
    lines = proteins(50, 3)
    text = "\n".join(lines)
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "a.txt.gz", "wt") as handle:
        handle.write(text)
    with lzma.open(tmp_path / "a.txt.xz", "wt") as handle:
        handle.write(text + "\n")
    fasta = "".join(f">p{i} cluster=c{i // 2}\n{s[:11]}\n{s[11:]}\n" for i, s in enumerate(lines))
    with gzip.open(tmp_path / "a.fasta.gz", "wt") as handle:
        handle.write(fasta)
    (tmp_path / "c").write_text("\n".join(str(i // 2) for i in range(50)))
    tokens = set()
    for name in ("a.txt", "a.txt.gz", "a.txt.xz", "a.fasta.gz"):
        clusters = (str(tmp_path / "c"),) if "fasta" not in name else ()
        manifest = _make(tmp_path / f"{name}.corpus", sources=(str(tmp_path / name),), clusters=clusters)
        assert (manifest["records"], manifest["clusters"]) == (50, 25)
        tokens.add(
            manifest["files"]["tokens-00000.bin"]["sha256"] + manifest["files"]["offsets.npy"]["sha256"]
        )
    assert len(tokens) == 1
    opened = open_corpus(tmp_path / "a.txt.corpus")
    from bioseq.sequences.alphabet import protein

    assert [protein().decode(opened.residues(i)) for i in range(50)] == lines
    assert protein().decode(opened.residues(7, 3, 5)) == lines[7][3:8]


def test_duplicates_bounds_validation_and_bad_records_are_counted_apart(tmp_path):
    keep, valid = proteins(20, 5), proteins(3, 6)
    lines = [*keep, keep[0], keep[0].lower(), valid[1], "MK", "ACD1EF"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "v.txt").write_text("\n".join(valid))
    options = {
        "sources": (str(tmp_path / "a.txt"),),
        "valid": {"v": str(tmp_path / "v.txt")},
        "min_length": 3,
    }
    with pytest.raises(SequenceError, match=r"a\.txt:25.*position 4") as caught:
        _make(tmp_path / "c", **options)
    assert "ACD1EF" not in str(caught.value) and not (tmp_path / "c").exists()
    left = _make(tmp_path / "c", **options, on_error="skip")["left_out"]
    assert left == {
        "bad": 1,
        "outside_length_bounds": 1,
        "duplicates": 2,
        "in_validation_sets": 1,
        "held_out": 0,
    }
    corpus = open_corpus(tmp_path / "c")
    assert len(corpus) == 20 and len(corpus.sets()["v"]) == 3


def test_held_out_takes_whole_clusters(tmp_path):
    lines, clusters = proteins(200, 8), [i // 4 for i in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "c").write_text("\n".join(map(str, clusters)))
    manifest = _make(
        tmp_path / "out", sources=(str(tmp_path / "a.txt"),), clusters=(str(tmp_path / "c"),), held_out=0.3
    )
    corpus = open_corpus(tmp_path / "out")
    held = {ids.tobytes() for ids in corpus.sets()["held_out"]}
    from bioseq.sequences.alphabet import protein

    where = {protein().encode(s).ids.tobytes(): c for s, c in zip(lines, clusters)}
    held_clusters = {where[h] for h in held}
    trained = {where[np.asarray(corpus.residues(i)).tobytes()] for i in range(len(corpus))}
    assert 5 < len(held_clusters) < 30 and not held_clusters & trained
    assert manifest["left_out"]["held_out"] == len(held) == 4 * len(held_clusters)


def test_a_killed_preparation_resumes_to_the_same_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(proteins(3000, 9)))
    code = """
import sys
from training.corpus import prepare as p, staging as s
s.CHUNK_RESIDUES = 10_000
write = s._write_chunk
def slow(*args):
    write(*args)
    import time; time.sleep(0.2)
s._write_chunk = slow
p.prepare(p.Prepare(sources=(sys.argv[1],)), sys.argv[2], progress=False)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / "killed")]
    child = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob(".killed.*.staging/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    staged = list(tmp_path.glob(".killed.*.staging/*.json"))
    assert len(staged) >= 3 and not (tmp_path / "killed").exists()
    oldest = min(staged, key=lambda p: p.name)
    stamp = oldest.stat().st_mtime_ns
    seen = []
    original = staging._write_chunk
    staging._write_chunk = lambda *a: (seen.append(oldest.stat().st_mtime_ns), original(*a))[1]
    try:
        _make(tmp_path / "killed", sources=(str(tmp_path / "a.txt"),))
    finally:
        staging._write_chunk = original
    assert seen and set(seen) == {stamp}, "a finished chunk was made again"
    _make(tmp_path / "whole", sources=(str(tmp_path / "a.txt"),))
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")
    assert not list(tmp_path.glob(".*staging"))


def test_damage_is_named(tmp_path, corpus_path):
    import shutil

    for name, change, message in (
        ("tokens-00000.bin", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "does not match its hash"),
        ("lengths.npy", lambda b: b[:-4], "lengths.npy is missing or not"),
    ):
        copy = tmp_path / name
        shutil.copytree(corpus_path, copy)
        (copy / name).write_bytes(change((copy / name).read_bytes()))
        with pytest.raises(InputError, match=message):
            open_corpus(copy)
    copy = tmp_path / "manifest"
    shutil.copytree(corpus_path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["hash"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: the hash does not match"):
        open_corpus(copy)
    with pytest.raises(InputError, match="not a prepared corpus"):
        open_corpus(tmp_path)


def test_refusals(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "a.txt").write_text("MKV\nMKL\n")
    (tmp_path / "short").write_text("1\n")
    (tmp_path / "long").write_text("1\n2\n3\n")
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"MKV\n" * 1000)[:-12])
    a = str(tmp_path / "a.txt")
    with pytest.raises(InputError, match="no sequence is left"):
        _make(tmp_path / "o", sources=(str(tmp_path / "empty.txt"),))
    with pytest.raises(InputError, match="ends before line 2"):
        _make(tmp_path / "o", sources=(a,), clusters=(str(tmp_path / "short"),))
    with pytest.raises(InputError, match="more lines than"):
        _make(tmp_path / "o", sources=(a,), clusters=(str(tmp_path / "long"),))
    with pytest.raises(InputError, match="damaged"):
        _make(tmp_path / "o", sources=(str(tmp_path / "bad.gz"),))
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        _make(tmp_path / "o", sources=(str(tmp_path / "nowhere"),))
    assert not (tmp_path / "o").exists()
    _make(tmp_path / "o", sources=(a,))
    with pytest.raises(OutputError, match="exists already"):
        _make(tmp_path / "o", sources=(a,))


def test_the_text_path_and_the_loop_need_neither_ray_nor_biopython():
    code = """
import sys
for name in ("ray", "Bio", "matplotlib", "sklearn", "scipy", "transformers", "peft"):
    sys.modules[name] = None
import training.corpus.prepare, training.pretrain.run, training.pretrain.loop, training.pretrain.finish, training.pretrain.command
import training.pretrain.records.plots, training.pretrain.records.card
"""
    subprocess.run([sys.executable, "-c", code], check=True)

"""Stores of vectors: nothing twice, nothing committed is lost, nothing damaged is handed out."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bioseq
from bioseq.errors import OutputError, VectorStoreError
from bioseq.vectors.settings import VectorSettings
from bioseq.vectors.store import VectorStore, sequence_key

SETTINGS = VectorSettings(weights_hash="sha256:a", width=8)
RESIDUES = replace(SETTINGS, per_residue=True, stored="float16")

WRITER = """
import sys
import numpy as np
from bioseq.vectors.settings import VectorSettings
from bioseq.vectors.store import VectorStore, sequence_key
store = VectorStore(sys.argv[1], VectorSettings(weights_hash="sha256:a", width=8))
n = int(sys.argv[2])
while True:
    store.add([sequence_key(f"{i}") for i in range(n, n + 5)],
              [np.full(8, i, np.float32) for i in range(n, n + 5)], [f"id{i}" for i in range(n, n + 5)])
    n += 5
    print(n, flush=True)
"""


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)


def keys(n: int) -> list[bytes]:
    return [sequence_key(str(i)) for i in range(n)]


def test_vectors_come_back_in_place_and_by_key(tmp_path: Path) -> None:
    store, given = VectorStore(tmp_path / "s", SETTINGS), rows(20)
    assert store.add(keys(20), list(given), [f"p{i}" for i in range(20)]) == 20
    again = bioseq.vectors(tmp_path / "s")
    assert len(again) == 20 and again.check() == 20
    np.testing.assert_array_equal(again.matrix(), given)
    found = again.get([keys(20)[7], sequence_key("other"), keys(20)[0]])
    assert found[1] is None
    np.testing.assert_array_equal(found[0], given[7])
    np.testing.assert_array_equal(found[2], given[0])
    assert again.names([7]) == [("p7",)] and again.places([keys(20)[7], b"x"]) == [7, None]


def test_a_key_is_stored_once_and_may_have_several_names(tmp_path: Path) -> None:
    store, given = VectorStore(tmp_path, SETTINGS), rows(3)
    key = keys(2)
    assert store.add([key[0], key[0], key[1]], list(given), ["a", "b", "c"]) == 2
    size = (tmp_path / "vectors.bin").stat().st_size
    assert store.add(key, list(rows(2, seed=9)), ["d", "c"]) == 0
    assert (tmp_path / "vectors.bin").stat().st_size == size
    assert store.names([0, 1]) == [("a", "b", "d"), ("c",)]
    np.testing.assert_array_equal(store.matrix(), given[[0, 2]])


def test_residues_are_kept_ragged_in_half_precision(tmp_path: Path) -> None:
    store = VectorStore(tmp_path, RESIDUES)
    given = [rows(n, seed=n).astype(np.float16) for n in (3, 1, 11)]
    store.add(keys(3), given)
    for a, b in zip(store.get(keys(3)), given):
        assert a is not None and a.dtype == np.float16
        np.testing.assert_array_equal(a, b)
    with pytest.raises(VectorStoreError, match="not searched"):
        store.matrix()


@pytest.mark.parametrize("n", range(3))
def test_a_kill_at_a_random_moment_loses_no_committed_vector(tmp_path: Path, n: int) -> None:
    """What the writer reported as added is there after each of several kills, whole and in order."""
    draw, done = random.Random(n), 0
    for _ in range(3):
        env = os.environ | {"PYTHONPATH": str(Path(bioseq.__file__).parent.parent)}
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(done)],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.random() / 5)
            process.send_signal(signal.SIGKILL)
            told = [int(line) for line in process.stdout.read().split("\n") if line]
        store = VectorStore(tmp_path)
        assert store.check() == len(store) >= max(told, default=done + 5)
        assert len(store) % 5 == 0  # an `add` is there whole or not at all
        done = len(store)
        np.testing.assert_array_equal(store.matrix()[:, 0], np.arange(done, dtype=np.float32))
        assert store.names([done - 1]) == [(f"id{done - 1}",)]


def test_bytes_of_a_writer_that_died_before_its_commit_are_written_over(tmp_path: Path) -> None:
    store, given = VectorStore(tmp_path, SETTINGS), rows(4)
    store.add(keys(2), list(given[:2]))
    with open(tmp_path / "vectors.bin", "ab") as handle:
        handle.write(b"\xff" * 45)  # a row and a piece of one
    assert len(VectorStore(tmp_path)) == 2
    np.testing.assert_array_equal(store.matrix(), given[:2])
    store.add(keys(4)[2:], list(given[2:]))
    np.testing.assert_array_equal(VectorStore(tmp_path).matrix(), given)


def _add_some(path: str, first: int) -> None:
    store = VectorStore(path, SETTINGS)
    for i in range(first, first + 40, 4):
        store.add([sequence_key(str(j)) for j in range(i, i + 4)], [np.full(8, j) for j in range(i, i + 4)])


def test_several_processes_write_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add_some, args=(str(tmp_path), first)) for first in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    store = VectorStore(tmp_path)
    assert store.check() == len(store) == 80
    found = store.get([sequence_key(str(i)) for i in range(80)])
    assert [float(f[0]) for f in found if f is not None] == list(range(80))


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    VectorStore(tmp_path, SETTINGS)
    with pytest.raises(VectorStoreError, match=r"weights_hash 'sha256:a', asked 'sha256:b'") as caught:
        VectorStore(tmp_path, replace(SETTINGS, weights_hash="sha256:b"))
    assert caught.value.code == "vectors.other_settings"
    assert SETTINGS.hash != replace(SETTINGS, layers=(3,)).hash


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VectorStoreError, match="not a vector store"):
        bioseq.vectors(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_store_whose_maker_was_killed_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").touch()
    with pytest.raises(VectorStoreError, match="holds no settings"):
        VectorStore(tmp_path)
    assert len(VectorStore(tmp_path, SETTINGS)) == 0


def test_a_damaged_vector_is_not_handed_out(tmp_path: Path) -> None:
    store = VectorStore(tmp_path, SETTINGS)
    store.add(keys(3), list(rows(3)))
    with open(tmp_path / "vectors.bin", "r+b") as handle:
        handle.seek(40)
        handle.write(b"\x00\x01")
    assert store.get(keys(1))[0] is not None
    for fault in (lambda: store.get(keys(3)), store.check):
        with pytest.raises(VectorStoreError, match="vector 1 is damaged"):
            fault()
    os.truncate(tmp_path / "vectors.bin", 32)
    with pytest.raises(VectorStoreError, match="damaged or missing"):
        store.matrix()


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    VectorStore(tmp_path, SETTINGS)
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(VectorStoreError, match=r"index\.sqlite"):
        VectorStore(tmp_path)


def test_vectors_of_another_width_are_refused_and_nothing_is_added(tmp_path: Path) -> None:
    store = VectorStore(tmp_path, SETTINGS)
    with pytest.raises(VectorStoreError, match=r"8 numbers; the shape is \(9,\)"):
        store.add(keys(2), [rows(1)[0], np.zeros(9, np.float32)])
    with pytest.raises(VectorStoreError, match=r"\(2, 8\)"):
        store.add(keys(1), [rows(2)])
    assert len(store) == 0


def test_a_store_cannot_be_made_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        VectorStore(tmp_path / "file" / "store", SETTINGS)

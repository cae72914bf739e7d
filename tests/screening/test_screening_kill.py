"""Killed and resumed: the same bytes as a run that nobody touched."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time

import psutil
import pytest
from screening_helpers import committed, driver, make_spec, results, searching_models
from standin import StandIn

from bioseq.errors import OutputError
from serving.screening.run import screen

# 256 tokens a batch make some 20 shards of the shipped library
FAST, SLOW = {"budget": 256}, {"budget": 256, "seconds": 0.15}
LIMIT_S = 240


@pytest.fixture(scope="module")
def calm(tmp_path_factory, ray_session):
    """The uninterrupted run."""
    spec = make_spec(tmp_path_factory.mktemp("calm") / "run")
    return results(screen(spec, engine=StandIn(**FAST), progress=False).path)


def wait_for(condition, process=None):
    until = time.monotonic() + LIMIT_S
    while not condition():
        if process is not None and process.poll() is not None:
            return False
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return True


def finish(spec, engine):
    process = driver(spec, json.dumps(engine))
    assert process.wait(LIMIT_S) == 0, process.stderr.read()
    process.stderr.close()


def kill_driver(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_sigkill_of_the_driver(tmp_path, calm):
    process = driver(make_spec(tmp_path / "run", workers=2), json.dumps(SLOW))
    assert wait_for(lambda: committed(tmp_path / "run") >= 4, process), process.stderr.read()
    fewer = make_spec(tmp_path / "run", workers=1)
    with pytest.raises(OutputError, match=f"process {process.pid} on") as caught:
        screen(fewer, engine=StandIn(**FAST), progress=False)  # while the first one lives
    assert caught.value.code == "screen.locked"
    kill_driver(process)
    assert not (tmp_path / "run" / "summary.json").exists()
    done = screen(fewer, engine=StandIn(**FAST), progress=False)
    assert done.resumed and results(done.path) == calm
    assert json.loads((tmp_path / "run" / "run.json").read_text())["attempts"] == 2


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_a_library_screened_with_searches_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    """The driver is killed between two shards; the searches of what was lost are made again."""
    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))
    model, head = searching_models(tmp_path)
    given = {"model": model, "heads": (head,), "where": "kin.homologs >= 1", "rank": "kin.nearest_identity"}
    given |= {"batch_tokens": 202, "device": "cpu", "workers": 1}
    calm = results(screen(make_spec(tmp_path / "calm", **given), progress=False).path)
    assert b"kin.nearest" in calm["hits.csv"] and calm["hits.csv"].count(b"\n") > 20
    process = driver(make_spec(tmp_path / "run", **given), "null")
    assert wait_for(lambda: committed(tmp_path / "run") >= 2, process), process.stderr.read()
    kill_driver(process)
    assert not (tmp_path / "run" / "summary.json").exists()
    done = screen(make_spec(tmp_path / "run", **given), progress=False)
    assert done.resumed and results(done.path) == calm


def engine_pids() -> list[int]:
    """This test's own engine actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("MapWorker(MapBatches(ShardWorker))" in word for word in process.cmdline()):
                found.append(process.pid)
    return found


def test_sigkill_of_a_worker(tmp_path, calm):
    killed = []

    def kill():
        wait_for(lambda: committed(tmp_path / "run") >= 3 and engine_pids())
        killed.append(random.choice(engine_pids()))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    done = screen(make_spec(tmp_path / "run"), engine=StandIn(**SLOW), progress=False)
    thread.join()
    assert killed and results(done.path) == calm


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_sigkill_of_the_driver_at_ten_random_moments(tmp_path, calm):
    """Any moment: while Ray starts, while reading, computing, merging or writing the report."""
    generator = random.Random(11)
    began = time.monotonic()
    finish(make_spec(tmp_path / "timed"), SLOW)
    whole = time.monotonic() - began
    kills, rounds = 0, 0
    while kills < 10:
        folder = tmp_path / f"run{rounds}"
        rounds += 1
        for _ in range(3):  # up to three kills of the same run
            process = driver(make_spec(folder, workers=generator.choice([1, 2, 3])), json.dumps(SLOW))
            try:
                process.wait(generator.uniform(0.2, whole))
                process.stderr.close()
                break
            except subprocess.TimeoutExpired:
                kill_driver(process)
                kills += 1
        finish(make_spec(folder, workers=generator.choice([1, 2, 3])), FAST)
        assert results(folder) == calm, f"after {kills} kills"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_sigkill_of_workers_again_and_again(tmp_path, calm):
    stop = threading.Event()
    killed = []

    def kill():
        while not stop.wait(2.5):
            pids = engine_pids()
            if pids and len(killed) < 8:
                killed.append(random.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        done = screen(make_spec(tmp_path / "run"), engine=StandIn(budget=256, seconds=1.0), progress=False)
    finally:
        stop.set()
        thread.join()
    assert len(killed) >= 3 and results(done.path) == calm


@pytest.fixture
def two_nodes():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    node = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster, node
    ray.shutdown()
    cluster.shutdown()


def test_loss_of_a_whole_node(tmp_path, calm, two_nodes):
    cluster, node = two_nodes
    lost = []

    def remove():
        wait_for(lambda: committed(tmp_path / "run") >= 3)
        cluster.remove_node(node, allow_graceful=False)
        lost.append(committed(tmp_path / "run"))

    thread = threading.Thread(target=remove)
    thread.start()
    spec = make_spec(tmp_path / "run", workers=4, address=cluster.address)
    done = screen(spec, engine=StandIn(**SLOW), progress=False)
    thread.join()
    assert lost and results(done.path) == calm

"""Three nodes, serving and a screen together, one node killed: no accepted request lost, the screen's bytes
equal to an undisturbed run's, job states true."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from live_service import Live, Steps

import bioseq
from bioseq.bundles.bundle import open_bundle
from bioseq.bundles.registry import Registry

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
LIBRARY = Path(__file__).parents[1] / "data" / "proteins_30_1000.fasta"
HERE = Path(__file__).parent


class Load(threading.Thread):
    """Asks for predictions again and again by the client, whose retry hides an ingress that dies."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.answered, self.failed, self.values = url, 0, [], set()  # type: ignore[var-annotated]
        self.ended = threading.Event()

    def run(self) -> None:
        with bioseq.connect(self.url) as remote:
            while not self.ended.is_set():
                try:
                    (answer,) = remote.predict(["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"], ["stability"])
                    self.values.add(answer["stability"]["value"])
                    self.answered += 1
                except Exception as error:
                    self.failed.append(error)
                time.sleep(0.1)


@pytest.fixture
def three(tiny: dict[str, Path]) -> Any:
    live = Live(tiny["tiny"])
    Registry(live.home).register(open_bundle(tiny["stability"]))
    from serving.cluster.running import token_file

    token_file(str(live.home))
    cluster = subprocess.Popen(
        [sys.executable, str(HERE / "three_nodes.py"), "3"], env=live.environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = cluster.stdout.readline().strip()  # type: ignore[union-attr]
        assert ":" in address, "no cluster"
        live.environment["RAY_ADDRESS"] = address
        live.start("--address", address, "--engines", "2")
        yield live, cluster
    finally:
        live.close()
        cluster.stdin.close()  # type: ignore[union-attr]
        try:
            cluster.wait(60)
        except subprocess.TimeoutExpired:
            cluster.kill()


def test_a_node_dies_under_serving_and_a_screen(three, tmp_path):
    live, cluster = three
    steps = Steps("three nodes")
    spec = {"heads": ["stability"], "top": 20, "threads": 1, "workers": 2, "batch_tokens": 512}
    with bioseq.connect(live.url) as remote:
        library = f"file:{remote.upload(LIBRARY)['id']}"

        def screen() -> str:
            return remote.submit("screen", {"inputs": [library], **spec})["id"]

        calm = remote.wait(screen(), timeout=600)
        assert calm["state"] == "SUCCEEDED", calm["reason"]
        remote.result(calm["id"], tmp_path / "calm")
        steps.done("the screen undisturbed")
        load = Load(live.url)
        load.start()
        job = screen()
        until = time.monotonic() + 240
        while (found := remote.job(job))["progress"] is None and found["state"] in ("PENDING", "RUNNING"):
            assert time.monotonic() < until
            time.sleep(0.2)
        steps.done("serving and screening together")
        before = load.answered
        cluster.stdin.write("kill\n")
        cluster.stdin.flush()
        assert cluster.stdout.readline().strip() == "killed"
        steps.done("one node killed")
        ended = remote.wait(job, timeout=900)
        steps.done("the screen ended")
        until = time.monotonic() + 240
        while load.answered < before + 10 and time.monotonic() < until:
            time.sleep(0.2)
        load.ended.set()
        load.join(240)
        assert ended["state"] == "SUCCEEDED", ended["reason"]
        remote.result(job, tmp_path / "killed")
    assert not load.failed and load.answered >= before + 10, load.failed
    assert len(load.values) == 1, "an answer depends on who gave it"
    for name in ("hits.csv", "hits.fasta", "summary.json", "manifest.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes(), name
    parts = sorted(
        p.relative_to(tmp_path / "calm") for p in (tmp_path / "calm" / "predictions").rglob("*.parquet")
    )
    assert parts
    for part in parts:
        assert (tmp_path / "killed" / part).read_bytes() == (tmp_path / "calm" / part).read_bytes()
    print(f"\n{load.answered} requests, all answered; {before} before the kill")
    steps.show()

"""Engines come and go with the tokens that wait: a real Ray, minutes."""

from __future__ import annotations

import tempfile
import threading
import time

import pytest
from serving_helpers import SEQS

import bioseq
from bioseq.bundles.registry import Registry

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_engines_follow_the_queue(tmp_path, bundles):
    from test_serving_real import Service

    registry = Registry(tmp_path)
    registry.register(bundles["tiny"])
    registry.alias("default", "tiny@1")
    service = Service(
        tmp_path, tempfile.mkdtemp(prefix="r", dir="/tmp"), "--max-engines", "2", "--queued-tokens", "2000"
    )

    def engines() -> int:
        names = [" ".join(p.cmdline()) for p in service.family()]
        return sum("ServeReplica:bioseq:engine" in name for name in names)

    stop, errors = threading.Event(), []

    def ask():
        with bioseq.connect(service.url) as remote:
            while not stop.is_set():
                try:
                    remote.scan(SEQS[3] * 4)
                except Exception as error:
                    errors.append(error)
                    return

    try:
        service.wait()
        assert engines() == 1
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for t in threads:
            t.start()
        until = time.monotonic() + 300
        while engines() < 2 and time.monotonic() < until and not errors:
            time.sleep(1)
        most = engines()
        stop.set()
        for t in threads:
            t.join(300)
        assert most == 2 and not errors
    finally:
        stop.set()
        if service.process.poll() is None:
            assert service.stop() == 0

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ray_session():
    """One Ray for a file's in-process runs: a run uses the Ray that it finds."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    here = str(Path(__file__).parent)  # where Ray's workers find the stand-in engine
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves a test beside other work
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()

"""Workers on two nodes of a local cluster: the steps of one process, and checkpoints that come home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from training.pretrain.records import checkpoint as checkpoints  # noqa: E402
from training.pretrain.records.run_folder import read_metrics  # noqa: E402
from training.pretrain.run import run  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def two_nodes():
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_TMPDIR", "/tmp/ray-training-tests")
    Path(os.environ["RAY_TMPDIR"], "ray").mkdir(parents=True, exist_ok=True)
    # Room for one worker on each.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    here = str(Path(__file__).parent)
    ray.init(
        address=cluster.address, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()
    cluster.shutdown()


def test_two_nodes_equal_one_process(tiny, tmp_path, two_nodes):
    from training.pretrain.distributed.ray import run_on_ray

    local = tiny(output=str(tmp_path / "local"))
    run(local, progress=False)
    nodes = tmp_path / "nodes"
    nodes.mkdir()

    def hook(step: int) -> None:
        (nodes / ray.get_runtime_context().get_node_id()).touch()

    spec = local.override({"output": str(tmp_path / "ray"), "engine": "ray", "workers.count": 2})
    summary = run_on_ray(spec, progress=False, hook=hook)
    assert len(list(nodes.iterdir())) == 2, "both workers were on one node"
    losses = [
        {r["step"]: r["loss"] for r in read_metrics(tmp_path / side) if r["kind"] == "train"}
        for side in ("local", "ray")
    ]
    assert losses[0].keys() == losses[1].keys()
    assert max(abs(losses[0][s] - losses[1][s]) for s in losses[0]) < 1e-4
    last = checkpoints.last(tmp_path / "ray" / "checkpoints")
    assert last is not None and last.step == summary["steps"] == len(losses[0])

"""The loop under Ray Train. Slow to start: one Ray for all tests here."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from training_helpers import plan  # noqa: E402

from bioseq.errors import OutputError, ResourceError  # noqa: E402
from training.corpus import homologs  # noqa: E402
from training.corpus.corpus import open_corpus  # noqa: E402
from training.corpus.prepare import prepare  # noqa: E402
from training.pretrain.loop import DivergedError  # noqa: E402
from training.pretrain.records import checkpoint as checkpoints  # noqa: E402
from training.pretrain.records.run_folder import read_metrics  # noqa: E402
from training.pretrain.run import run  # noqa: E402

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", autouse=True)
def _ray(tmp_path_factory):
    # Ray's sockets need short paths.
    os.environ.setdefault("RAY_TMPDIR", "/tmp/ray-training-tests")
    Path(os.environ["RAY_TMPDIR"], "ray").mkdir(parents=True, exist_ok=True)
    here, home = str(Path(__file__).parent), str(tmp_path_factory.mktemp("home"))
    ray.init(
        address="local",
        num_cpus=4,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": here, "OMP_NUM_THREADS": "1", "BIOSEQ_HOME": home}},
    )
    yield
    ray.shutdown()


def _losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder) if r["kind"] == "train"}


def test_a_worker_killed_mid_run_loses_no_step(tiny, tmp_path):
    local = tiny(output=str(tmp_path / "local"), eval__every=10)
    run(local, progress=False)
    spec = local.override({"output": str(tmp_path / "ray"), "engine": "ray", "workers.count": 2})
    marker = str(tmp_path / "killed")

    def hook(step: int) -> None:
        if step == 12 and ray.train.get_context().get_world_rank() == 1 and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

    from training.pretrain.distributed.ray import run_on_ray

    summary = run_on_ray(spec, progress=False, hook=hook)
    assert os.path.exists(marker)
    a, b = _losses(tmp_path / "local"), _losses(tmp_path / "ray")
    assert b.keys() == set(range(1, 21)), "a step is missing"
    assert max(abs(a[s] - b[s]) for s in a) < 1e-4
    assert summary["steps"] == 20
    assert checkpoints.last(tmp_path / "ray" / "checkpoints").step == 20
    import bioseq

    assert bioseq.load(tmp_path / "ray" / "best", threads=1).embed(["MKV"]).shape == (1, 32)


@pytest.mark.long
def test_workers_that_read_homologs_lose_no_step_when_one_is_killed(reading, tmp_path):
    local = reading(output=str(tmp_path / "local"))
    run(local, progress=False)
    marker = str(tmp_path / "killed")

    def hook(step: int) -> None:
        if step == 12 and ray.train.get_context().get_world_rank() == 1 and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

    from training.pretrain.distributed.ray import run_on_ray

    spec = local.override({"output": str(tmp_path / "ray"), "engine": "ray", "workers.count": 2})
    run_on_ray(spec, progress=False, hook=hook)
    assert os.path.exists(marker)
    a, b = _losses(tmp_path / "local"), _losses(tmp_path / "ray")
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-4


def test_ray_goes_on_from_a_local_run_and_evaluates_on_the_workers(tiny, tmp_path, monkeypatch):
    spec = tiny(output=str(tmp_path / "run"), steps=20, eval__every=10)
    run(spec.override({"output": str(tmp_path / "reference")}), progress=False)
    run(spec.override({"steps": 15, "schedule.decay": 0}), progress=False)

    def not_here(*args, **kwargs):
        raise AssertionError("evaluated on the driver")

    monkeypatch.setattr("training.pretrain.finish.perplexity", not_here)
    summary = run(spec.override({"engine": "ray", "resume": True}), progress=False)
    a, b = _losses(tmp_path / "reference"), _losses(tmp_path / "run")
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-4
    assert summary["last"]["held"]["proteins"] == 12
    assert "1 process(es) of 1 thread(s)" in (tmp_path / "run" / "card.md").read_text()


def test_ray_and_local_go_on_from_each_other(tiny, tmp_path):
    spec = tiny(output=str(tmp_path / "run"), engine="ray", steps=20)
    reference = tiny(output=str(tmp_path / "reference"), steps=20)
    run(reference, progress=False)
    run(spec.override({"steps": 15, "schedule.decay": 0}), progress=False)
    # The first 15 steps were all stable, so the run may be prolonged, here by the other engine.
    run(spec.override({"engine": "local", "resume": True}), progress=False)
    a, b = _losses(tmp_path / "reference"), _losses(tmp_path / "run")
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-4


@pytest.mark.long
def test_an_elastic_range_runs_on_what_is_there(tiny, tmp_path):
    """Nine workers asked for, four CPUs: it starts on fewer, and its steps are those of one worker."""
    local = tiny(output=str(tmp_path / "local"))
    run(local, progress=False)
    worlds = tmp_path / "worlds"
    worlds.mkdir()

    def hook(step: int) -> None:
        (worlds / str(ray.train.get_context().get_world_size())).touch()

    from training.pretrain.distributed.ray import run_on_ray

    spec = local.override({"output": str(tmp_path / "ray"), "engine": "ray"})
    run_on_ray(spec.override({"workers.count": 9, "workers.min_count": 2}), progress=False, hook=hook)
    assert {2, 3, 4} >= {int(w.name) for w in worlds.iterdir()} != set()
    a, b = _losses(tmp_path / "local"), _losses(tmp_path / "ray")
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-4


def test_refusals_come_before_the_run(tiny, tmp_path):
    with pytest.raises(ResourceError, match=r"workers\.count: 9 worker\(s\) need 9 CPU"):
        run(tiny(engine="ray", workers__count=9), progress=False)
    with pytest.raises(OutputError, match="storage: cannot write to /proc/nothing"):
        run(tiny(engine="ray", storage="/proc/nothing", output=str(tmp_path / "b")), progress=False)
    assert not (tmp_path / "b" / "spec.json").exists()


def test_divergence_is_reported_and_not_tried_again(tiny, tmp_path):
    spec = tiny(
        engine="ray", output=str(tmp_path / "bad"), optimiser__lr=1e30, optimiser__clip=1e30, steps=10
    )
    with pytest.raises(DivergedError, match=r"step \d: the loss is (nan|inf)"):
        run(spec, progress=False)


def test_sources_staged_in_parallel_give_the_same_bytes(tmp_path):
    from training_helpers import proteins

    from training.corpus.prepare import Prepare, prepare

    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("\n".join(proteins(40, i)))
    plan = Prepare(sources=tuple(str(tmp_path / f"{i}.txt") for i in range(3)))
    for name, parallel in (("ray", True), ("plain", False)):
        prepare(plan, tmp_path / name, progress=False, parallel=parallel)
    one, two = ((tmp_path / n / "manifest.json").read_bytes() for n in ("ray", "plain"))
    assert one == two and len(open_corpus(tmp_path / "ray")) == 120


def test_searches_for_homologs_on_ray_give_the_same_bytes(sources, family_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(homologs, "_JOB", 20)
    wanted = json.loads((family_corpus / "manifest.json").read_text())["hash"]
    assert prepare(plan(sources), tmp_path / "corpus", progress=False, parallel=True)["hash"] == wanted

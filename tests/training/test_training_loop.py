from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import losses as _losses
from training_helpers import same as _same
from training_helpers import torchrun as _torchrun
from training_helpers import weights as _weights

from bioseq.errors import CheckpointError, OutputError, ResourceError, SpecError
from training.corpus.corpus import open_corpus
from training.pretrain.batches import Batches, prefetch
from training.pretrain.distributed.team import Team
from training.pretrain.loop import DivergedError, train
from training.pretrain.records import checkpoint as checkpoints
from training.pretrain.records.run_folder import RunFolder
from training.pretrain.run import run
from training.pretrain.schedule import factor


def test_loss_falls_and_the_bundle_loads(tiny):
    spec = tiny(steps=60, optimiser__lr=0.02, eval__every=30)
    summary = run(spec, progress=False)
    folder = Path(spec.output)
    losses = _losses(folder)
    assert np.mean([losses[s] for s in range(1, 6)]) > np.mean([losses[s] for s in range(55, 61)])
    import bioseq

    model = bioseq.load(folder / "best", threads=1)
    assert model.content_hash == summary["bundles"]["best"]["hash"]
    assert model.embed(["MKVLAA"]).shape == (1, 32)
    for name in ("card.md", "loss.png", "metrics.jsonl", "best/evidence.json", "last/manifest.json"):
        assert (folder / name).stat().st_size > 0
    evidence = json.loads((folder / "best/evidence.json").read_text())
    assert str(folder.parent) not in json.dumps(evidence), "a bundle travels"
    assert evidence["corpus"]["hash"] == open_corpus(spec.corpus).hash
    assert set(evidence["baselines"]["unigram"]) == {"held"} == set(evidence["perplexity"])
    assert "trained on a CPU" in (folder / "card.md").read_text()


@pytest.mark.timeout(600)
def test_a_run_killed_at_a_random_step_resumes_bit_equal(tiny, tmp_path):
    whole = tiny(output=str(tmp_path / "whole"), steps=40, sampling="cluster")
    run(whole, progress=False)
    killed = whole.override({"output": str(tmp_path / "killed")})
    file = tmp_path / "killed.json"
    file.write_text(killed.to_json())
    at = random.Random(os.getpid()).randint(6, 34)
    child = subprocess.Popen([sys.executable, "-m", "bioseq", "pretrain", "--spec", str(file), "--quiet"])
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < at):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    found = checkpoints.last(tmp_path / "killed" / "checkpoints")
    assert found is not None and found.step < 40, "the kill came too late to show anything"
    run(killed.override({"resume": True}), progress=False)
    assert _same(_weights(tmp_path / "killed"), _weights(tmp_path / "whole")), f"killed at step {at}"
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")


@pytest.mark.timeout(900)
def test_two_workers_equal_one_over_50_steps_by_ddp_and_fsdp2_and_resume_as_one(tiny, tmp_path):
    settings = {"steps": 50, "checkpoint_every": 25, "keep": 5, "schedule.warmup": 5}
    one = tiny(output=str(tmp_path / "one")).override(settings)
    run(one, progress=False)
    two = one.override({"output": str(tmp_path / "two"), "workers.count": 2})
    # Sharded on gloo: slow, so fewer steps; with an evaluation, where collectives must match too.
    few = {"steps": 6, "schedule.decay": 0, "schedule.warmup": 5, "eval.every": 3, "workers.parallel": "fsdp"}
    sharded = two.override({"output": str(tmp_path / "sharded"), **few})
    _torchrun(tmp_path, two, sharded)
    reference = _losses(tmp_path / "one")
    assert reference.keys() == _losses(tmp_path / "two").keys() == set(range(1, 51))
    assert _losses(tmp_path / "sharded").keys() == set(range(1, 7))
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000050")
    run(two.override({"output": str(tmp_path / "again"), "workers.count": 1, "resume": True}), progress=False)
    assert _losses(tmp_path / "again").keys() == reference.keys()
    for name in ("two", "sharded", "again"):
        losses = _losses(tmp_path / name)
        assert max(abs(reference[s] - losses[s]) for s in losses) < 1e-4, name
    whole = checkpoints.last(tmp_path / "sharded" / "checkpoints").model()
    assert whole["layers.0.qkv.weight"].shape == (96, 32)


def test_the_batches_of_all_workers_are_the_batch_of_one(tiny, corpus):
    batches = Batches(tiny(), corpus)
    for world in (2, 3, 8):
        for step in (0, 7):
            rows = []
            for rank in range(world):
                for micro in batches.step(step, rank, world).micros:
                    cu = micro.cu_seqlens.tolist()
                    rows += [
                        tuple(micro.tokens[a:b].tolist()) for a, b in zip(cu, cu[1:]) if len(micro.targets)
                    ]
            whole = []
            for micro in batches.step(step).micros:
                cu = micro.cu_seqlens.tolist()
                whole += [tuple(micro.tokens[a:b].tolist()) for a, b in zip(cu, cu[1:])]
            assert sorted(rows) == sorted(whole)


def test_accumulating_micro_batches_changes_nothing_but_memory(tiny, tmp_path):
    for name, micro in (("small", 128), ("large", 512)):
        run(tiny(output=str(tmp_path / name), micro_tokens=micro, crop=90), progress=False)
    a, b = _losses(tmp_path / "small"), _losses(tmp_path / "large")
    assert max(abs(a[s] - b[s]) for s in a) < 1e-4


def test_activation_checkpointing_changes_no_bit(tiny, tmp_path):
    for name, on in (("off", False), ("on", True)):
        run(tiny(output=str(tmp_path / name), steps=9, activation_checkpointing=on), progress=False)
    assert _same(_weights(tmp_path / "off"), _weights(tmp_path / "on"))


def test_a_bfloat16_run_trains_and_resumes_bit_equal(tiny, tmp_path):
    spec = tiny(output=str(tmp_path / "whole"), precision="bfloat16", steps=12)
    run(spec, progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/step-00000012")
    run(spec.override({"output": str(tmp_path / "part"), "resume": True}), progress=False)
    assert _same(_weights(tmp_path / "whole"), _weights(tmp_path / "part"))
    assert all(t.dtype == torch.float32 for t in _weights(tmp_path / "whole").values())


def test_a_loss_that_is_no_number_stops_with_step_records_and_checkpoint(tiny, corpus):
    spec = tiny()
    folder = Path(spec.output)
    RunFolder.check(folder, resume=False)
    sink = RunFolder(folder, spec, Team(), progress=False)
    sink.begin(0)
    broken = {}

    class Breaking(RunFolder):
        pass

    original = sink.checkpoint

    def checkpoint(state, trainee):
        original(state, trainee)
        if state["step"] == 10:  # as a bad device would: weights turn bad after a good checkpoint
            broken["records"] = Batches(spec, corpus).step(10).records
            with torch.no_grad():
                trainee.encoder.final_norm.bias.fill_(float("nan"))

    sink.checkpoint = checkpoint  # type: ignore[method-assign]
    with pytest.raises(DivergedError) as caught:
        train(spec, corpus, Team(), sink)
    message = str(caught.value)
    assert message.startswith("step 10: the loss is nan")
    assert ", ".join(map(str, broken["records"][:5].tolist())) in message
    assert "step-00000010" in message
    good = checkpoints.last(folder / "checkpoints")
    assert good.step == 10 and all(torch.isfinite(t).all() for t in good.model().values())


def test_a_damaged_checkpoint_is_passed_over(tiny, capsys):
    spec = tiny()
    run(spec, progress=False)
    root = Path(spec.output) / "checkpoints"
    newest = checkpoints.steps(root)[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    found = checkpoints.last(root)
    assert found.step == 15 and "does not match its hash" in capsys.readouterr().err
    (newest / "state.json").unlink()
    assert checkpoints.last(root).step == 15


def test_only_two_checkpoints_and_the_best_are_kept(tiny):
    spec = tiny(eval__every=5)
    run(spec, progress=False)
    names = sorted(p.name for p in (Path(spec.output) / "checkpoints").iterdir())
    assert names == ["best", "step-00000015", "step-00000020"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model.d_ff": 128}, "model"),
        ({"seed": 5}, "seed"),
        ({"optimiser.lr": 1e-3}, "optimiser"),
        ({"schedule.warmup": 2}, "schedule"),
    ],
)
def test_resuming_as_another_run_is_refused_and_changes_no_file(tiny, tmp_path_factory, change, word):
    spec = tiny(steps=10)
    run(spec, progress=False)
    folder = Path(spec.output)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=f"{word}: "):
        run(spec.override({**change, "resume": True}), progress=False)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_stable_phase_may_be_prolonged(tiny, tmp_path):
    long = tiny(output=str(tmp_path / "long"), steps=20)
    run(long, progress=False)
    short = tiny(output=str(tmp_path / "short"), steps=15)
    run(short, progress=False)
    shutil.rmtree(tmp_path / "short/checkpoints/step-00000015")  # step 10 lies before the decay
    run(long.override({"output": str(tmp_path / "short"), "resume": True}), progress=False)
    assert _same(_weights(tmp_path / "long"), _weights(tmp_path / "short"))


def test_places_and_devices_that_are_not_there(tiny, tmp_path):
    spec = tiny()
    run(spec, progress=False)
    with pytest.raises(OutputError, match="holds a run already"):
        run(spec, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        run(tiny(output=str(tmp_path / "file" / "run")), progress=False)
    with pytest.raises(ResourceError, match=r"workers\.count: 2 processes were asked for, 1"):
        run(tiny(output=str(tmp_path / "two"), workers__count=2), progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match=r"workers\.gpus: 1 GPU"):
            run(tiny(output=str(tmp_path / "gpu"), workers__gpus=True), progress=False)
    for field, settings in (
        ("tokens_per_step", {"tokens_per_step": 60, "micro_tokens": 256}),
        ("micro_tokens", {"tokens_per_step": 512, "micro_tokens": 60}),
    ):
        with pytest.raises(SpecError, match=f"{field}: 60 tokens do not hold the longest sequence"):
            run(tiny(output=str(tmp_path / field), crop=100, **settings), progress=False)
        assert not (tmp_path / field / "spec.json").exists()
    with pytest.raises(SpecError, match="corpus: missing"):
        run(tiny(corpus=None), progress=False)
    assert not (tmp_path / "two" / "spec.json").exists()


def test_work_made_ahead_comes_in_order_and_errors_where_they_belong():
    def make(step):
        if step == 5:
            raise RuntimeError("five")
        return step

    seen = []
    with pytest.raises(RuntimeError, match="five"):
        for item in prefetch(make, 0, 9, workers=2):
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4]


def test_schedules_at_their_corners(tiny):
    wsd = tiny(steps=100, schedule__warmup=10, schedule__decay=20, schedule__final=0.1).schedule
    rates = [factor(s, 100, wsd) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == rates[79] == 1.0
    assert rates[80] < 1.0 and rates[99] == pytest.approx(0.1) and max(rates) == 1.0
    assert all(a > b for a, b in zip(rates[80:], rates[81:]))
    cosine = tiny(schedule__kind="cosine", schedule__final=0.0, schedule__warmup=0).schedule
    assert factor(0, 20, cosine) == 1.0 and factor(10, 20, cosine) == pytest.approx(0.5)

"""A pretraining run from its spec, in this process (`--engine local`, also under torchrun) or through Ray."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from bioseq.errors import MissingExtraError, SpecError
from bioseq.specs.pretrain import PretrainSpec
from training.corpus.corpus import open_corpus
from training.pretrain.distributed.parallel import in_group, leave
from training.pretrain.distributed.team import Team, join
from training.pretrain.finish import final_perplexities, finish, kept_checkpoints
from training.pretrain.loop import Outcome, train
from training.pretrain.records import checkpoint as checkpoints
from training.pretrain.records.run_folder import RunFolder
from training.pretrain.setup import check_corpus, check_resume, load_init


def run(spec: PretrainSpec, *, progress: bool = True) -> dict[str, Any]:
    """Do the run that `spec` describes; returns its summary (see `training.pretrain.finish`).

    Raises `SpecError`, `InputError` (corpus), `CheckpointError`, `OutputError`, `ResourceError`,
    `DivergedError`; the run folder then holds whole checkpoints only.
    """
    if not spec.corpus:
        raise SpecError("missing.", field="corpus", hint="Name a prepared corpus (--corpus).")
    if not spec.output:
        raise SpecError("missing.", field="output", hint="Name the run's folder (-o).")
    if engine(spec) == "ray":
        from training.pretrain.distributed.ray import run_on_ray

        return run_on_ray(spec, progress=progress)
    return run_locally(spec, progress=progress)


def engine(spec: PretrainSpec) -> str:
    """`ray` or `local`; "auto" is Ray where it is installed. Raises `MissingExtraError`."""
    installed = importlib.util.find_spec("ray") is not None
    if spec.engine == "ray" and not installed:
        raise MissingExtraError("ray", "train")
    if spec.engine != "ray" and (spec.address or spec.storage):
        raise SpecError("goes with the Ray engine only.", field="address" if spec.address else "storage")
    return "ray" if spec.engine == "ray" or (spec.engine == "auto" and installed) else "local"


def run_locally(spec: PretrainSpec, *, progress: bool = True) -> dict[str, Any]:
    joined = in_group()
    team = join(spec.workers.gpus, spec.workers.count)
    try:
        return _run(spec, team, progress)
    finally:
        if not joined:
            leave()


def _run(spec: PretrainSpec, team: Team, progress: bool) -> dict[str, Any]:
    if spec.workers.threads:
        torch.set_num_threads(spec.workers.threads)
    folder = Path(str(spec.output))
    if team.is_main:
        RunFolder.check(folder, resume=spec.resume)
    corpus = open_corpus(str(spec.corpus), verify=team.is_main)
    check_corpus(spec, corpus)
    start = checkpoints.last(folder / "checkpoints") if spec.resume else None
    if start is not None:
        check_resume(spec, corpus.hash, start.state)
    init = load_init(spec) if start is None else None
    run_folder = RunFolder(folder, spec, team, progress=progress)
    run_folder.begin(start.step if start else 0)
    try:
        outcome: Outcome = train(spec, corpus, team, run_folder, start=start, init=init)
    finally:
        run_folder.close()
    team.wait()
    if not team.is_main:
        return {}
    kept = kept_checkpoints(folder / "checkpoints")
    return finish(spec, corpus, folder, outcome, final_perplexities(spec, corpus, kept, team.device))

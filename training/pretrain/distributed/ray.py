"""The same loop under Ray Train: workers, failures, checkpoints on any pyarrow filesystem, elastic ranges.

Ray Train may lose the last report of a killed worker, so a step may be computed again; as batches and masks
come from (seed, step), it is the same step. A checkpoint carries the metrics up to it and the best weights,
so that nothing depends on which node the main worker ran on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from pyarrow import fs
from ray.train import Checkpoint as RayCheckpoint
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from bioseq.errors import BioseqError, CheckpointError, InputError, OutputError, ResourceError, SpecError
from bioseq.output import atomic_file
from bioseq.specs.pretrain import PretrainSpec
from training.corpus.corpus import open_corpus
from training.pretrain.distributed.parallel import Trainee
from training.pretrain.distributed.team import Team
from training.pretrain.finish import final_perplexities, finish, outcome_of
from training.pretrain.loop import DivergedError, train
from training.pretrain.records import checkpoint as checkpoints
from training.pretrain.records.run_folder import RunFolder
from training.pretrain.setup import check_corpus, check_resume, load_init
from training.ray_session import ray_session

_RAY = "ray"  # folder of Ray's own storage in a run's folder
_FAILED = "failed.json"
_FINAL = "final.json"  # perplexities of the checkpoints that become bundles
_START = "start"  # the local checkpoint that a run goes on from
_NEWEST = "newest"  # the checkpoint's folder inside what Ray stores
# Every worker meets these alike, and a retry would meet them again.
_NOT_RETRIED = (DivergedError, CheckpointError, SpecError, InputError)


class RaySink(RunFolder):
    """A run folder whose checkpoints go through `ray.train.report`, which every worker must call."""

    def __init__(self, path: Path, spec: PretrainSpec, team: Team, *, progress: bool):
        super().__init__(path, spec, team, progress=progress)
        self._scratch = Path(tempfile.mkdtemp(prefix="bioseq-"))
        self._last: str | None = None

    def resume_from(self, folder: Path) -> None:
        """Take over the metrics and the best weights of a checkpoint made elsewhere."""
        if (folder / checkpoints.BEST).exists():
            shutil.copytree(folder / checkpoints.BEST, self._scratch / checkpoints.BEST, dirs_exist_ok=True)
        if self.team.is_main and (folder / "metrics.jsonl").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path / "metrics.jsonl", force=True) as file:
                shutil.copy(folder / "metrics.jsonl", file)

    def checkpoint(self, state: dict[str, Any], trainee: Trainee) -> None:
        model, optimizer = trainee.model_tensors(), trainee.optimizer_tensors()
        stored = None
        folder = self._scratch / "out"
        if self.team.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            checkpoints.write(folder / _NEWEST, state, model, optimizer)
            shutil.copy(self.path / "metrics.jsonl", folder / "metrics.jsonl")
            if (self._scratch / checkpoints.BEST).exists():
                shutil.copytree(self._scratch / checkpoints.BEST, folder / checkpoints.BEST)
            stored = RayCheckpoint.from_directory(str(folder))
        ray.train.report({"step": state["step"], "tokens": state["tokens"]}, checkpoint=stored)
        self._last = f"step {state['step']}"

    def best(self, state: dict[str, Any], trainee: Trainee) -> None:
        model = trainee.model_tensors()
        if self.team.is_main:
            checkpoints.write(self._scratch / checkpoints.BEST, state, model)

    def kept(self) -> dict[str, checkpoints.Checkpoint]:
        """The best and the last checkpoint, on the main worker at the end of a run."""
        last = checkpoints.read(self._scratch / "out" / _NEWEST)
        best = self._scratch / checkpoints.BEST
        return {"best": checkpoints.read(best) if best.exists() else last, "last": last}

    def last_good(self) -> str:
        return self._last or "none yet"

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _worker(config: dict[str, Any]) -> None:
    spec = PretrainSpec.from_dict(config["spec"])
    context = ray.train.get_context()
    # Ray sets OMP_NUM_THREADS by its own rule; the order of sums, and so the result, must be the spec's.
    torch.set_num_threads(spec.workers.threads or spec.workers.cpus)
    device = ray.train.torch.get_device() if spec.workers.gpus else torch.device("cpu")
    team = Team(context.get_world_rank(), context.get_world_size(), device)
    sink = RaySink(Path(str(spec.output)), spec, team, progress=config["progress"])
    try:
        corpus = open_corpus(str(spec.corpus), verify=False)
        start = None
        stored = ray.train.get_checkpoint() or (RayCheckpoint(config["start"]) if config["start"] else None)
        if stored is not None:
            with stored.as_directory() as folder:
                start = checkpoints.read(Path(folder) / _NEWEST)
                start.load()
                sink.resume_from(Path(folder))
            check_resume(spec, corpus.hash, start.state)
        init = load_init(spec) if start is None else None
        sink.begin(start.step if start else 0)
        train(
            spec, corpus, team, sink, start=start, init=init, hook=config.get("hook") or (lambda step: None)
        )
        if team.is_main:
            # Here, not on the driver: this process has the device.
            final = final_perplexities(spec, corpus, sink.kept(), team.device)
            _write_json(config["storage"], spec.name, _FINAL, final)
    except _NOT_RETRIED as error:
        # Not raised: Ray would try again, and keeps no metrics of a report without checkpoint.
        if team.is_main:
            failed = {"failed": error.message, "hint": error.hint, "code": error.code}
            _write_json(config["storage"], spec.name, _FAILED, failed)
    finally:
        sink.close()


def run_on_ray(spec: PretrainSpec, *, progress: bool = True, hook: Any = None) -> dict[str, Any]:
    """Run `spec` on Ray and bring the outcome home to the run's folder, in the form of a local run.

    Raises what `training.pretrain.run.run` raises; a worker's failure beyond `workers.max_failures` is a
    `ResourceError`.
    """
    folder = Path(str(spec.output)).resolve()
    spec = spec.override({"output": str(folder), "corpus": str(Path(str(spec.corpus)).resolve())})
    RunFolder.check(folder, resume=spec.resume)
    corpus = open_corpus(str(spec.corpus))
    check_corpus(spec, corpus)
    storage = _storage(spec, folder)
    local = checkpoints.last(folder / "checkpoints") if spec.resume else None
    if local is not None:
        check_resume(spec, corpus.hash, local.state)
    # One logical CPU for Ray Train's controller, on a small machine too.
    with ray_session(spec.address, spec.workers.count * spec.workers.cpus + 1):
        _check_resources(spec)
        least = spec.workers.min_count
        resources: dict[str, float] = {"CPU": spec.workers.cpus}
        if spec.workers.gpus:
            resources["GPU"] = 1
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "spec": spec.to_dict(),
                "progress": progress,
                "start": _store_start(folder, local, f"{storage}/{spec.name}/{_START}") if local else None,
                "hook": hook,
                "storage": storage,
            },
            scaling_config=ScalingConfig(
                num_workers=(least, spec.workers.count) if least else spec.workers.count,  # type: ignore[arg-type]
                use_gpu=spec.workers.gpus,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=spec.name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=spec.workers.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=spec.keep),
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            first = str(error).strip().splitlines()
            raise ResourceError(
                f"the run failed under Ray: {first[-1] if first else type(error).__name__}",
                hint=f"Checkpoints are in {storage}; pass --resume to go on.",
            ) from error
        failed = _failure(storage, spec.name)
        if result.checkpoint is not None:
            with result.checkpoint.as_directory() as stored:
                _bring_home(Path(stored), folder, spec.keep)
        if failed:
            raise failed
        last = checkpoints.last(folder / "checkpoints")
        final = _take_json(storage, spec.name, _FINAL)
        if last is None or final is None:
            raise ResourceError("Ray finished the run without a checkpoint.", hint=f"Look at {storage}.")
        perplexities = {int(step): found for step, found in final.items()}
        return finish(spec, corpus, folder, outcome_of(last), perplexities)


def _failure(storage: str, name: str) -> BioseqError | None:
    """The error that stopped the workers, to be raised on the driver."""
    stored = _take_json(storage, name, _FAILED)
    if stored is None:
        return None
    kinds = {kind.code: kind for kind in _NOT_RETRIED}
    error = kinds.get(stored["code"], BioseqError)(stored["failed"], hint=stored["hint"])
    error.code = stored["code"]
    return error


def _open_storage(storage: str) -> tuple[Any, str]:
    """(pyarrow filesystem, path in it)."""
    return fs.FileSystem.from_uri(storage) if "://" in storage else (fs.LocalFileSystem(), storage)


def _write_json(storage: str, name: str, file: str, data: dict[Any, Any]) -> None:
    system, path = _open_storage(storage)
    with system.open_output_stream(f"{path}/{name}/{file}") as handle:
        handle.write(json.dumps(data).encode())


def _take_json(storage: str, name: str, file: str) -> dict[str, Any] | None:
    """What a worker left in the run's storage, which is removed there; None if there is nothing."""
    system, path = _open_storage(storage)
    place = f"{path}/{name}/{file}"
    if system.get_file_info(place).type == fs.FileType.NotFound:
        return None
    with system.open_input_stream(place) as handle:
        data = json.loads(handle.read())
    system.delete_file(place)
    return data


def _store_start(folder: Path, last: checkpoints.Checkpoint, place: str) -> str:
    """Put a local run's newest checkpoint, best weights and metrics where every node reads them, in the form of
    the checkpoints that Ray stores."""
    system, path = _open_storage(place)
    if system.get_file_info(path).type != fs.FileType.NotFound:
        system.delete_dir(path)
    best = folder / "checkpoints" / checkpoints.BEST
    for source, name in ((last.path, _NEWEST), (best, checkpoints.BEST)):
        if source.is_dir():
            system.create_dir(f"{path}/{name}", recursive=True)
            fs.copy_files(str(source), f"{path}/{name}", fs.LocalFileSystem(), system)
    if (folder / "metrics.jsonl").exists():
        fs.copy_files(str(folder / "metrics.jsonl"), f"{path}/metrics.jsonl", fs.LocalFileSystem(), system)
    return place


def _bring_home(stored: Path, folder: Path, keep: int) -> None:
    newest = checkpoints.read(stored / _NEWEST)
    checkpoints.save(
        folder / "checkpoints",
        {k: v for k, v in newest.state.items() if k != "files"},
        newest.model(),
        newest.optimizer(),
        keep=keep,
    )
    if (stored / checkpoints.BEST).exists():
        best = checkpoints.read(stored / checkpoints.BEST)
        state = {k: v for k, v in best.state.items() if k != "files"}
        checkpoints.write(folder / "checkpoints" / checkpoints.BEST, state, best.model())
    with atomic_file(folder / "metrics.jsonl", force=True) as file:
        shutil.copy(stored / "metrics.jsonl", file)


def _storage(spec: PretrainSpec, folder: Path) -> str:
    """Where Ray keeps its checkpoints. Raises `OutputError` if it cannot be written or holds another run."""
    storage = spec.storage or str(folder / _RAY)
    try:
        if "://" not in storage:
            storage = str(Path(storage).resolve())
        system, path = _open_storage(storage)
        run = f"{path}/{spec.name}"
        if not spec.resume and system.get_file_info(run).type != fs.FileType.NotFound:
            raise OutputError(
                f"storage: {storage}/{spec.name} holds a run already.", hint="Pass --resume to go on."
            )
        system.create_dir(path, recursive=True)
        with system.open_output_stream(f"{path}/.writable") as probe:
            probe.write(b"1")
        system.delete_file(f"{path}/.writable")
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OutputError(
            f"storage: cannot write to {storage}: {reason}.", hint="Choose another place."
        ) from error
    return storage


def _check_resources(spec: PretrainSpec) -> None:
    have = ray.cluster_resources()
    count = spec.workers.min_count or spec.workers.count
    for kind, each in (("GPU", 1 if spec.workers.gpus else 0), ("CPU", spec.workers.cpus)):
        if have.get(kind, 0) < count * each:
            raise ResourceError(
                f"workers.count: {count} worker(s) need {count * each} {kind}(s), the cluster has "
                f"{have.get(kind, 0):g}.",
                hint="Ask for fewer workers, or add nodes.",
            )

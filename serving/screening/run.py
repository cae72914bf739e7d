"""A screening run from spec to hits: index, deduplicate, compute, merge, select, report.

Every step leaves its result in the run folder under a final name only when it is whole, so a run that was
killed anywhere goes on from the last whole step, and inside the computing from the last committed shard.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bioseq.errors import BioseqError, FastaError, OutputError, ResourceError
from bioseq.progress import Progress
from bioseq.specs.screen import ScreenSpec
from bioseq.version import __version__
from serving.screening import cluster, source
from serving.screening.engine import EngineFactory, predictor_factory
from serving.screening.folder import FORMAT, Receipt, RunFolder, write_json
from serving.screening.index import IndexJob
from serving.screening.source import Piece
from serving.screening.tables.columns import HeadColumns
from serving.screening.tables.merge import keep_embeddings, merge
from serving.screening.tables.select import Selection, compile_selection, select
from serving.screening.tables.summary import summarise
from serving.screening.units import DATABASE_MEMORY, Plan, plan_run
from serving.screening.worker import ShardWorker

#: Fields of the spec that decide nothing about the result.
FREE = (
    "inputs",
    "output",
    "heads",
    "model",
    "homologs",
    "vectors",
    "workers",
    "address",
    "strict",
    "dtype",
    "device",
    "threads",
    "batch_tokens",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished run says: the folder, its summary, and whether anything was computed now."""

    path: Path
    summary: dict[str, Any]
    resumed: bool
    fresh: bool


def manifest_of(spec: ScreenSpec, factory: EngineFactory) -> dict[str, Any]:
    """Everything that decides the result, and nothing else."""
    settings = {k: v for k, v in spec.to_dict().items() if k not in FREE}
    return {
        "format": FORMAT,
        "bioseq": __version__,
        "inputs": [source.identify(path) for path in spec.inputs],
        **factory.identity(),
        "settings": json.loads(json.dumps(settings)),
        "split_bytes": source.SPLIT_BYTES,
    }


def screen(spec: ScreenSpec, *, engine: EngineFactory | None = None, progress: bool = True) -> Outcome:
    """Run or resume. `engine` is the internal seam of tests and benchmarks.

    Raises `FastaError`, `ExpressionError`, `NotFoundError`, `BundleError` before anything is written;
    `SpecError` if the folder holds another run; `OutputError` if it is locked or cannot be written.
    """
    factory: EngineFactory = engine or predictor_factory(spec, device=device_of(spec))
    selection = compile_selection(spec, factory.heads)
    manifest = manifest_of(spec, factory)
    folder = RunFolder(spec.output)
    folder.look(manifest)
    if folder.complete:
        return Outcome(folder.path, _summary(folder), resumed=True, fresh=False)
    check_memory(spec, factory)
    attempt = folder.start(manifest)
    try:
        if folder.complete:
            return Outcome(folder.path, _summary(folder), resumed=True, fresh=False)
        with cluster.ray_session(spec.address, spec.workers, spec.threads) as resources:
            run = _Run(spec, factory, selection, folder, manifest, attempt, resources, progress)
            return run()
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder.path}: {error.strerror or type(error).__name__}.",
            hint="Give the same command again when there is room: the run resumes.",
        ) from error
    finally:
        folder.release()


def device_of(spec: ScreenSpec) -> str:
    """`cpu` or `cuda`. Asks the driver library, not torch: the driver process must stay small."""
    if spec.device != "auto":
        return spec.device
    if spec.address is None:
        return "cuda" if os.path.exists("/dev/nvidia0") else "cpu"
    with cluster.ray_session(spec.address, None, 1) as resources:
        return "cuda" if resources.get("GPU", 0) >= 1 else "cpu"


def check_memory(spec: ScreenSpec, factory: EngineFactory) -> None:
    """Raises `ResourceError` if the engines cannot fit here. A cluster places its own."""
    if spec.address is not None or factory.device != "cpu":
        return
    import psutil

    workers = spec.workers or 1
    need, free = workers * factory.memory_bytes, psutil.virtual_memory().available
    if need > free:
        raise ResourceError(
            f"{workers} engine{'s' if workers > 1 else ''} need about {need >> 20} MiB; {free >> 20} MiB are free.",
            hint="Take fewer with --workers, or a smaller model.",
        )


def _summary(folder: RunFolder) -> dict[str, Any]:
    from serving.screening.folder import read_json

    return read_json(folder.path / "summary.json")


class _Run:
    def __init__(
        self,
        spec: ScreenSpec,
        factory: EngineFactory,
        selection: Selection,
        folder: RunFolder,
        manifest: dict[str, Any],
        attempt: int,
        resources: dict[str, float],
        progress: bool,
    ):
        self.spec, self.factory, self.selection, self.folder = spec, factory, selection, folder
        self.manifest, self.attempt, self.resources, self.progress = manifest, attempt, resources, progress
        self.times: dict[str, float] = {}
        self.steady_since = self.steady_until = 0.0
        self.steady_tokens = 0
        self.workers = self._workers()

    def __call__(self) -> Outcome:
        began = time.time()
        work = self.folder.work
        for name in ("index", "shards", "parts", "vectors", "trails"):
            (work / name).mkdir(parents=True, exist_ok=True)
        pieces = self._timed("index", self._index)
        plan = self._timed("deduplicate", lambda: self._plan(pieces))
        old = self.folder.inherit()
        self._timed("compute", lambda: self._compute(plan))
        parts = [self.folder.committed[s["shard"]] for s in plan.shards]
        summary = self._timed("select", lambda: self._finish(pieces, plan, parts))
        facts = {
            "attempts": self.attempt,
            "workers": self.workers,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": {k: round(v, 3) for k, v in self.times.items()},
            "engine_seconds": round(sum(r.busy for r in parts), 3),
            "worker_cpu_seconds": round(sum(r.cpu for r in parts), 3),
            "worker_seconds": round(sum(r.seconds for r in parts), 3),
            "steady_tokens_per_second": round(
                self.steady_tokens / max(self.steady_until - self.steady_since, 1e-9), 1
            ),
            "shards": len(plan.shards),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
        }
        write_json(self.folder.path / "run.json", facts)
        cards = self.factory.cards()
        from serving.screening.tables.report import write_report

        write_json(self.folder.path / "cards.json", cards)
        self.folder.lock.check()
        cluster.remotely(write_report, str(self.folder.path), summary)
        # Last of all: its presence says that the run is complete
        write_json(self.folder.path / "summary.json", summary)
        shutil.rmtree(work, ignore_errors=True)
        return Outcome(self.folder.path, summary, resumed=bool(old) or self.attempt > 1, fresh=True)

    def _timed(self, name: str, step: Any) -> Any:
        started = time.monotonic()
        result = step()
        self.times[name] = time.monotonic() - started
        return result

    def _workers(self) -> int:
        threads = self.spec.threads
        kind, each = ("GPU", 1) if self.factory.device == "cuda" else ("CPU", threads)
        there = int(self.resources.get(kind, 0))
        if self.spec.address is None and kind == "CPU":
            there = os.cpu_count() or 1
        most = max(1, there // each)
        if kind == "GPU" and there == 0:
            raise ResourceError("no GPU is in the cluster.", hint="Take --device cpu.")
        if self.spec.workers is None:
            return most
        return (
            self.spec.workers if self.spec.address is None and kind == "CPU" else min(self.spec.workers, most)
        )

    # ------------------------------------------------------------------- steps

    def _index(self) -> list[Piece]:
        done = self.folder.work / "index.json"
        if done.is_file():
            pieces = [Piece(**p) for p in json.loads(done.read_text("utf-8"))]
            here = done.parent.absolute() / "index"  # the folder may have been moved since
            return [dataclasses.replace(p, path=str(here / Path(p.path).name)) for p in pieces]
        import ray

        sizes = [i["bytes"] for i in self.manifest["inputs"]]
        splits = source.cut(self.spec.inputs, sizes)
        job = IndexJob(
            str((self.folder.work / "index").absolute()),
            self.factory.alphabet,
            self.spec.max_length,
            self.spec.translate,
            self.spec.genetic_code,
        )
        pieces = []
        dataset = ray.data.read_datasource(source.datasource(splits, job), override_num_blocks=len(splits))
        with Progress(
            len(splits), "reading", unit="splits", enabled=self.progress and len(splits) > 1
        ) as bar:
            seen: set[tuple[int, int]] = set()
            for row in _rows(dataset):
                if fault := row.pop("error"):
                    raise FastaError(fault)
                pieces.append(Piece(**row))
                if (key := (row["file"], row["split"])) not in seen:
                    seen.add(key)
                    bar.add(1)
        pieces.sort(key=lambda p: (p.file, p.split, p.piece))
        if not pieces:
            raise FastaError("the library has no records.", hint="Give a FASTA file with records.")
        if len({(p.file, p.split, p.piece) for p in pieces}) != len(pieces):
            raise OutputError("a piece of the index came twice.", hint="This is a fault of bioseq.")
        write_json(done, [dataclasses.asdict(p) for p in pieces])
        return pieces

    def _plan(self, pieces: list[Piece]) -> Plan:
        keep_all = bool(self.spec.diverse) or self.spec.keep_embeddings
        arguments = (str(self.folder.work.absolute()), [dataclasses.asdict(p) for p in pieces])
        answer = cluster.remotely(plan_run, *arguments, self.factory.budget, keep_all)
        return Plan(**json.loads(Path(answer["plan"]).read_text("utf-8")))

    def _compute(self, plan: Plan) -> None:
        waiting = [s for s in plan.shards if s["shard"] not in self.folder.committed]
        done = [s for s in plan.shards if s["shard"] in self.folder.committed]
        if not waiting:
            return
        total = sum(s["units"] for s in plan.shards)
        tokens = sum(s["tokens"] for s in waiting)
        with Progress(tokens, "screening", unit="tokens", enabled=self.progress) as bar:
            records = sum(s["units"] for s in done)
            if done and self.progress:
                print(f"resuming: {records} of {total} sequences are done", file=sys.stderr, flush=True)
            warm: set[str] = set()
            for receipt in self._receipts(waiting, plan):
                self.folder.commit([receipt])
                records += receipt.sequences
                worker = receipt.file.split("-")[-1]
                if worker not in warm:  # its first shard: loading the model is not the steady state
                    warm.add(worker)
                    self.steady_since, self.steady_tokens = time.monotonic(), 0
                else:
                    self.steady_tokens += receipt.tokens
                self.steady_until = time.monotonic()
                bar.rename(f"screening, {records}/{total} sequences")
                bar.add(receipt.tokens)
        missing = [s["shard"] for s in plan.shards if s["shard"] not in self.folder.committed]
        if missing:
            raise OutputError(
                f"{len(missing)} shards were not computed.", hint="Give the same command again."
            )

    def _receipts(self, waiting: list[dict[str, Any]], plan: Plan) -> Iterator[Receipt]:
        import ray

        gpu = self.factory.device == "cuda"
        size = min(self.workers, len(waiting))
        dataset = ray.data.from_items(waiting, override_num_blocks=len(waiting)).map_batches(
            ShardWorker,
            batch_size=1,
            fn_constructor_args=(self.factory, str(self.folder.work.absolute()), self.attempt, plan.stride),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size),
            num_cpus=self.spec.threads,
            num_gpus=1 if gpu else 0,
        )
        seen: set[int] = set()
        for row in _rows(dataset):
            if row["fatal"]:
                hint = "Give the same command again when it is put right: the run resumes."
                raise BioseqError(row["fatal"], code=row["code"], hint=hint)
            receipt = Receipt(**json.loads(row["receipt"]))
            if receipt.shard not in seen:
                seen.add(receipt.shard)
                yield receipt

    def _finish(self, pieces: list[Piece], plan: Plan, parts: list[Receipt]) -> dict[str, Any]:
        output, work = self.folder.path.absolute(), self.folder.work.absolute()
        arguments = (
            self.spec,
            self.selection,
            self.factory.heads,
            output,
            work,
            pieces,
            plan,
            parts,
            self.factory.width,
        )
        summary = cluster.remotely(finish, *arguments)
        shown = {k: self.manifest[k] for k in ("bioseq", "inputs", "model", "engine", "settings")}
        shown["manifest_heads"] = self.manifest["heads"]
        return {**shown, "ranked_by": self.selection.explained, **summary}


def finish(
    spec: ScreenSpec,
    selection: Selection,
    heads: tuple[HeadColumns, ...],
    output: Path,
    work: Path,
    pieces: list[Piece],
    plan: Plan,
    parts: list[Receipt],
    width: int,
) -> dict[str, Any]:
    """Merge, select and summarise; in a worker, so that the database's memory is not the driver's."""
    memory = DATABASE_MEMORY
    vectors = [r.embeddings for r in parts if r.embeddings]
    merge(work, output / "predictions", pieces, [r.file for r in parts], heads, memory=memory)
    if spec.keep_embeddings:
        keep_embeddings(work, output / "embeddings", pieces, vectors, width, memory)
    selected = select(spec, selection, heads, output, work, pieces, vectors, plan.units, memory=memory)
    return summarise(work, output, heads, plan, selected, memory)


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The dataset's rows as they come, out of order, with Ray's own errors as ours."""
    import ray

    try:
        yield from dataset.iter_rows()
    except (
        ray.exceptions.RayError,
        ray.data.exceptions.UserCodeException,
        ray.data.exceptions.SystemException,
    ) as error:
        raise ResourceError(
            f"Ray could not go on ({type(error).__name__}).",
            hint="Give the same command again: the run resumes. Ray's own log tells more.",
        ) from error

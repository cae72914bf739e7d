"""The actor that computes shards: one engine, one shard after another, one part file for each.

What a part holds follows from the shard and the engine alone. A shard that was lost with its worker is
computed again whole. A shard that keeps killing its worker is bisected: its *trail*, a small file, says how
often it was begun and which piece of it was running, so that the next worker narrows it down to the record at
fault. That record is quarantined and the rest is computed in one go, as if it had never been there.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bioseq.errors import BioseqError, OutputError
from bioseq.output import atomic_file
from serving.screening.engine import Engine, EngineFactory
from serving.screening.folder import Receipt, file_sha256
from serving.screening.isolation import Screened
from serving.screening.tables.columns import part_schema

DEATHS_BEFORE_BISECTION = 2
KILLED = "worker.killed: the worker died twice while it computed this record alone."


class Trail:
    """What happened to a shard in this attempt: deaths of its workers, seen from the next one."""

    def __init__(self, folder: Path, shard: int, attempt: int):
        self.path = folder / f"shard-{shard:06d}.json"
        self.state: dict[str, Any] = {
            "attempt": attempt,
            "starts": 0,
            "pending": None,
            "running": None,
            "guilty": [],
        }
        try:
            old = json.loads(self.path.read_text("utf-8"))
            # Deaths of an older attempt were most likely the driver's own; what was proven guilty stays so
            self.state["guilty"] = old["guilty"]
            if old["attempt"] == attempt:
                self.state = old
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def save(self) -> None:
        with atomic_file(self.path, force=True) as temporary:
            temporary.write_text(json.dumps(self.state), "utf-8")

    def begin(self) -> None:
        self.state["starts"] += 1
        self.save()

    @property
    def deaths(self) -> int:
        return self.state["starts"] - 1

    def search(self, engine: Engine, sequences: list[str]) -> None:
        """Find the records that kill: run ever smaller ranges, each noted before it runs."""
        state = self.state
        if state["pending"] is None:
            state["pending"] = _halves(0, len(sequences))
        elif state["running"] is not None:  # the worker before us died in it
            start, end, deaths = state["running"]
            if end - start > 1:
                state["pending"] = _halves(start, end) + state["pending"]
            elif deaths + 1 >= 2:
                state["guilty"].append(start)
            else:
                state["pending"].insert(0, [start, end, deaths + 1])
            state["running"] = None
        while state["pending"]:
            state["running"] = state["pending"].pop(0)
            self.save()
            start, end, _ = state["running"]
            chosen = [sequences[i] for i in range(start, end) if i not in state["guilty"]]
            engine.run(chosen, [False] * len(chosen))
            state["running"] = None
        state["pending"], state["starts"] = None, 1
        state["searches"] = state.get("searches", 0) + 1
        self.save()


def _halves(start: int, end: int) -> list[list[int]]:
    if end - start <= 1:
        return [[start, end, 0]]
    middle = (start + end) // 2
    return [[start, middle, 0], [middle, end, 0]]


class ShardWorker:
    """Callable class for `Dataset.map_batches`: a batch is one shard, the answer one receipt.

    Errors that concern the run are answered in the column `fatal`, not raised: through Ray they would arrive
    wrapped and without their kind.
    """

    def __init__(self, factory: EngineFactory, work: str, attempt: int, stride: int):
        self.factory, self.work, self.attempt, self.stride = factory, Path(work), attempt, stride
        self.token = secrets.token_hex(4)
        self.schema = part_schema(factory.heads)
        self.engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shard, file = int(batch["shard"][0]), str(batch["file"][0])
        answer: dict[str, Any] = {"shard": [shard], "receipt": [""], "fatal": [""], "code": [""]}
        try:
            receipt = self.compute(shard, file, int(batch["tokens"][0]))
            answer["receipt"] = [json.dumps(asdict(receipt))]
        except BioseqError as error:
            answer["fatal"], answer["code"] = [str(error)], [error.code]
        except OSError as error:
            answer["fatal"] = [f"{error.filename or self.work}: {error.strerror or type(error).__name__}."]
            answer["code"] = ["output.unwritable"]
        except Exception as error:
            answer["fatal"], answer["code"] = (
                [f"{type(error).__name__} while computing shard {shard}."],
                ["internal"],
            )
        return answer

    def compute(self, shard: int, file: str, tokens: int) -> Receipt:
        started = time.perf_counter()
        if self.engine is None:
            self.engine = self.factory.build()
        cpu = time.process_time()
        table = pq.read_table(self.work / "shards" / file)
        units, sequences = table["unit"].to_numpy(), table["sequence"].to_pylist()
        trail = Trail(self.work / "trails", shard, self.attempt)
        trail.begin()
        if trail.state["pending"] is not None or trail.deaths >= DEATHS_BEFORE_BISECTION:
            if trail.state.get("searches", 0) >= 2 and trail.state["pending"] is None:
                raise OutputError(
                    f"shard {shard} keeps killing its worker, though none of its records does so alone.",
                    code="worker.killed",
                    hint="Give the workers more memory, or take fewer with --workers.",
                )
            trail.search(self.engine, sequences)
        guilty = set(trail.state["guilty"])
        places = [i for i in range(len(sequences)) if i not in guilty]
        busy = time.perf_counter()
        embed = [int(units[i]) % self.stride == 0 for i in places]
        found = self.engine.run([sequences[i] for i in places], embed) if places else []
        busy = time.perf_counter() - busy
        results = [Screened(error=KILLED)] * len(sequences)
        for i, result in zip(places, found, strict=True):
            results[i] = result
        receipt = self.write(shard, units, results, tokens, started, busy, cpu)
        trail.path.unlink(missing_ok=True)
        return receipt

    def write(
        self,
        shard: int,
        units: np.ndarray,
        results: list[Screened],
        tokens: int,
        started: float,
        busy: float,
        cpu: float,
    ) -> Receipt:
        columns: list[Any] = [units, [r.error for r in results], [r.note for r in results]]
        columns += [[r.cells.get(f.name) for r in results] for f in list(self.schema)[3:]]
        table = pa.Table.from_arrays(
            [pa.array(c, type=f.type) for c, f in zip(columns, self.schema)], schema=self.schema
        )
        stem = f"shard-{shard:06d}.a{self.attempt:06d}-{self.token}"
        part = self.work / "parts" / f"{stem}.parquet"
        with atomic_file(part, force=True) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        embedded = [(int(u), r.embedding) for u, r in zip(units, results) if r.embedding is not None]
        vectors = ""
        if embedded:
            vectors = f"{stem}.vectors.parquet"
            flat = np.stack([v for _, v in embedded]).astype(np.float32)
            column = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
            rows = pa.table({"unit": pa.array([u for u, _ in embedded], pa.int64()), "embedding": column})
            with atomic_file(self.work / "vectors" / vectors, force=True) as temporary:
                pq.write_table(rows, temporary, compression="zstd")
        return Receipt(
            shard=shard,
            file=part.name,
            bytes=part.stat().st_size,
            sha256=file_sha256(part),
            sequences=len(results),
            tokens=tokens,
            records=len(results),
            quarantined=sum(r.error is not None for r in results),
            seconds=time.perf_counter() - started,
            busy=busy,
            cpu=time.process_time() - cpu,
            embeddings=vectors,
        )

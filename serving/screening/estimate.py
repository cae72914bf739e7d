"""`bioseq screen --dry-run`: what a run will take, from one reading of the library and a short measured probe."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import psutil

from bioseq.errors import SequenceError
from bioseq.inference.batching import SPECIAL_TOKENS
from bioseq.sequences.alphabet import by_name
from bioseq.sequences.translation import translated
from bioseq.specs.screen import ScreenSpec
from serving.screening import source
from serving.screening.engine import EngineFactory, predictor_factory
from serving.screening.index import sequence_hash
from serving.screening.run import device_of
from serving.screening.tables.select import compile_selection

MOST_RECORDS = 1_000_000
PROBE_SEQUENCES, PROBE_SECONDS = 64, 3.0
DRIVER_BYTES, DATABASE_BYTES = 400 << 20, 1 << 30


def scan(spec: ScreenSpec, alphabet: str) -> dict[str, Any]:
    """Records, distinct sequences, residues and a sample of the library. The first million records are read and
    the rest is taken to be like them, by bytes."""
    letters = by_name(alphabet)
    identities = [source.identify(path) for path in spec.inputs]
    sizes = [i["bytes"] for i in identities]
    records = faulty = residues = 0
    seen: set[tuple[int, int]] = set()
    sample: list[str] = []
    read, cut_short = 0, False
    for split in source.cut(spec.inputs, sizes):
        if records >= MOST_RECORDS:
            cut_short = True
            break
        for record in source.records(split):
            for _, sequence, _ in translated(record.sequence, spec.translate, spec.genetic_code):
                records += 1
                if isinstance(sequence, SequenceError) or not 0 < len(sequence) <= spec.max_length:
                    faulty += 1
                    continue
                folded = sequence.upper().removesuffix("*")
                key = sequence_hash(folded)
                if key in seen:
                    continue
                try:
                    letters.encode(folded)
                except SequenceError:
                    faulty += 1
                    continue
                seen.add(key)
                residues += len(folded)
                step = max(1, len(seen) // (4 * PROBE_SEQUENCES))
                if len(seen) % step == 0:
                    sample.append(folded)
                    if len(sample) > 8 * PROBE_SEQUENCES:
                        sample = sample[::2]
        read += (split.end or sizes[split.file]) - split.start
    factor = sum(sizes) / read if cut_short and read else 1.0
    return {
        "records": round(records * factor),
        "faulty": round(faulty * factor),
        "distinct": round(len(seen) * factor),
        "residues": round(residues * factor),
        "tokens": round((residues + SPECIAL_TOKENS * len(seen)) * factor),
        "extrapolated": cut_short,
        "sample": sample[:: max(1, len(sample) // PROBE_SEQUENCES)][:PROBE_SEQUENCES],
    }


def probe(factory: EngineFactory, sample: list[str]) -> tuple[float, int]:
    """(tokens a second of one engine, resident bytes of a process that holds it)."""
    engine = factory.build()
    if not sample:
        return 0.0, psutil.Process().memory_info().rss
    engine.run(sample[:2], [False] * len(sample[:2]))
    tokens, started = 0, time.perf_counter()
    while time.perf_counter() - started < PROBE_SECONDS:
        engine.run(sample, [False] * len(sample))
        tokens += sum(len(s) + SPECIAL_TOKENS for s in sample)
    return tokens / (time.perf_counter() - started), psutil.Process().memory_info().rss


def estimate(spec: ScreenSpec, *, engine: EngineFactory | None = None) -> dict[str, Any]:
    """What `told` prints. Raises what `screen` would raise for a bad library, head or expression."""
    spec = dataclasses.replace(spec, vectors=None)  # the store is neither made nor added to
    factory: EngineFactory = engine or predictor_factory(spec, device=device_of(spec))
    compile_selection(spec, factory.heads)
    found = scan(spec, factory.alphabet)
    rate, resident = probe(factory, found.pop("sample"))
    workers = spec.workers or max(1, (os.cpu_count() or 1) // spec.threads if factory.device == "cpu" else 1)
    side_by_side = (
        min(workers, max(1, (os.cpu_count() or 1) // spec.threads)) if factory.device == "cpu" else workers
    )
    cells = sum(len(h.fields()) for h in factory.heads)
    vectors = 4 * factory.width * found["distinct"] if spec.keep_embeddings or spec.diverse else 0
    # Sequences lie packed in the index and in the shards at about 0.6 bytes a residue; numbers pack little
    work = int(1.2 * found["residues"] + found["records"] * 60 + found["distinct"] * 9 * cells + vectors)
    kept = int(found["records"] * (40 + 9 * cells) + (vectors if spec.keep_embeddings else 0))
    folder = Path(spec.output).absolute()
    while not folder.exists():
        folder = folder.parent
    return {
        **found,
        "workers": workers,
        "device": factory.device,
        "tokens_per_second": rate,
        "seconds": found["tokens"] / (rate * side_by_side) if rate else 0.0,
        "memory_bytes": workers * resident + DRIVER_BYTES + DATABASE_BYTES,
        "memory_free": psutil.virtual_memory().available,
        "disk_bytes": work + kept,
        "disk_free": psutil.disk_usage(str(folder)).free,
    }


def told(found: dict[str, Any]) -> str:
    """The estimate in words."""
    about = "about " if found["extrapolated"] else ""
    hours, rest = divmod(round(found["seconds"]), 3600)
    long = f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
    gib = 1 << 30
    return "\n".join(
        [
            f"records    {about}{found['records']:,} ({found['distinct']:,} distinct, {found['faulty']:,} cannot be computed)",
            f"tokens     {about}{found['tokens']:,}",
            f"time       about {long} on {found['workers']} workers ({found['device']}), "
            f"{found['tokens_per_second']:,.0f} tokens/s measured on one",
            f"memory     about {found['memory_bytes'] / gib:.1f} GiB ({found['memory_free'] / gib:.1f} GiB free)",
            f"disk       up to {found['disk_bytes'] / gib:.2f} GiB ({found['disk_free'] / gib:.1f} GiB free)",
        ]
    )

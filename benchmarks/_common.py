"""What the benchmarks share: real proteins, facts of the host, the machine's own matmul rate, dated results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


def read_proteins(count: int, fasta: str | None = None, *, limit: int = 1022) -> list[str]:
    """`count` different real proteins of at most `limit` residues, in a fixed shuffled order."""
    import random

    from bioseq.sequences.fasta import read_fasta

    if fasta:
        files = [Path(fasta)]
    else:
        files = [ROOT / "bioseq/sample/proteins.fasta", *sorted((ROOT / "tests/data").glob("*.fasta"))]
    seen: dict[str, None] = {}
    for file in files:
        for record in read_fasta(file):
            sequence = record.sequence.upper()
            if 2 <= len(sequence) <= limit and sequence.isalpha() and "J" not in sequence:
                seen.setdefault(sequence)
    sequences = list(seen)
    random.Random(0).shuffle(sequences)
    if len(sequences) < count:
        raise SystemExit(
            f"{len(sequences)} proteins in {', '.join(map(str, files))}; {count} are needed (--fasta)"
        )
    return sequences[:count]


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def cpu_flags() -> list[str]:
    """Of the instructions that decide how fast matrices are multiplied, those that this processor has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    there = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return [
        f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if f in there
    ]


def host(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to place the numbers; no names of machines."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "flags": cpu_flags(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_end": os.getloadavg(),
    }
    if device.startswith("cuda"):
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "ray", "peft", "numpy", "scikit-learn")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def matmul_rate(dtype: str, threads: int, device: str = "cpu") -> float:
    """Measured operations per second of a square matrix product, the median of several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    b = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    times = []
    for turn in range(12):
        start = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        if turn >= 3:
            times.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return 2 * size**3 / statistics.median(times)


def write_result(name: str, result: dict[str, Any], out: str | None = None) -> Path:
    """benchmarks/results/DATE-NAME[-N].json; a result file is never edited or replaced."""
    if out:
        path = Path(out)
    else:
        RESULTS.mkdir(exist_ok=True)
        stem = f"{datetime.date.today().isoformat()}-{name}"
        path = RESULTS / f"{stem}.json"
        turn = 2
        while path.exists():
            path = RESULTS / f"{stem}-{turn}.json"
            turn += 1
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path

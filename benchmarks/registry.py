"""A registry of 10,000 heads: what the service pays to see a change, and to resolve one head.

    python benchmarks/registry.py [--heads 10000]

An index file of so many heads of one real backbone is written, without their bundles. Reported: the file's bytes;
milliseconds of a poll that sees no change, of a refresh after one, and of resolving a head by name, as the ingress does
for each request and as an engine does before it loads one; memory that the snapshot takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from _common import host, versions, write_result

from bioseq.bundles.registry import Registry
from serving.engine.catalogue import Catalogue


def milliseconds(function: Callable[[], Any], times: int) -> dict[str, float]:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        taken.append(1000 * (time.perf_counter() - start))
    taken.sort()
    return {"p50": round(taken[len(taken) // 2], 4), "highest": round(taken[-1], 4)}


def write_index(home: Path, heads: int) -> None:
    base = next(e for e in Registry(home).entries() if e.kind == "backbone")
    models = {}
    for i in range(heads):
        record = {
            "kind": "head", "content_hash": f"sha256:{i:064x}", "base_hash": base.content_hash, "task": "regression",
            "alphabet": "protein", "per_residue": False, "labels": ["value"], "units": None, "licence": "unknown",
            "weights_hash": None, "base_weights_hash": base.weights_hash,
        }  # fmt: skip
        models[f"head-{i:05d}"] = {"next": 2, "versions": {"1": record}}
    index = {"format_version": 2, "models": models, "aliases": {}}
    (home / "index.json").write_text(json.dumps(index, sort_keys=True))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--heads", type=int, default=10_000)
    p.add_argument("--out", help="result file (default: a dated one in benchmarks/results)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="bioseq-registry-") as folder:
        home = Path(folder)
        write_index(home, args.heads)
        registry = Registry(home)
        catalogue = Catalogue(registry)
        before = psutil.Process().memory_info().rss
        first = milliseconds(catalogue.refresh, 1)
        memory = psutil.Process().memory_info().rss - before
        base, name = catalogue.backbone(), f"head-{args.heads // 2:05d}"
        resolved = milliseconds(lambda: catalogue.head(name, base), 2000)
        engine = milliseconds(lambda: registry.find(f"{name}@1"), 500)
        idle = milliseconds(catalogue.refresh, 500)

        def changed() -> None:
            (home / "index.json").touch()
            catalogue.refresh()

        after = milliseconds(changed, 5)
        result = {
            "command": " ".join(["python", "benchmarks/registry.py", *sys.argv[1:]]),
            "heads": args.heads,
            "index_bytes": (home / "index.json").stat().st_size,
            "first_refresh_ms": first, "refresh_after_a_change_ms": after, "poll_without_a_change_ms": idle,
            "resolve_in_the_ingress_ms": resolved, "find_in_an_engine_ms": engine,
            "snapshot_mib": round(memory / 2**20, 1), "host": host(), "versions": versions(),
        }  # fmt: skip
    path = write_result("registry", result, args.out)
    print(path)
    print({k: v for k, v in result.items() if k not in ("host", "versions")})
    return 0


if __name__ == "__main__":
    sys.exit(main())

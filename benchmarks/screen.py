"""Screening: the data path alone at 1e3, 1e5 and 1e6 records, a given library, workers, and the predictor's share.

    python benchmarks/screen.py           all of these (the library's if a file is given)
    python benchmarks/screen.py path      data path with a stand-in engine, driver memory; three library sizes
    python benchmarks/screen.py library --fasta FILE.gz     every record of a file, against a count of its '>'
    python benchmarks/screen.py tables    deduplication, merge and ranking alone, 1e7 records
    python benchmarks/screen.py engine    tokens/s of a screen's engines against `Predictor.run`; two workers against one
    python benchmarks/screen.py homologs  seconds a record with the shipped heads, with and without their searches

The claims (docs/benchmarks.md): in the steady state a screen keeps >= 90 % of the predictor's tokens/s; the driver's
memory is flat from 1e3 to 1e6 records; no record is lost. Each run is a process of its own. `engine` measures the
predictor before and after the screens, on the same proteins with the same weights (8M shape, random), one thread an
engine, and checks the screen's numbers against the predictor's. The steady state of a screen leaves out each
worker's first shard, in which it loads the model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import ROOT, host, read_proteins, versions, write_result

LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)


def random_library(path: Path, records: int, seed: int = 7) -> None:
    """Random proteins of Swiss-Prot's lengths (log-normal, median 295); every 50th is a copy of an earlier one."""
    generator = np.random.default_rng(seed)
    last = b"M"
    with open(path, "wb") as handle:
        for start in range(0, records, 10_000):
            count = min(10_000, records - start)
            lengths = np.clip(generator.lognormal(5.69, 0.65, count), 20, 1000).astype(int)
            text = LETTERS[generator.integers(0, 20, lengths.sum())].tobytes()
            at = 0
            for i, length in enumerate(lengths.tolist()):
                sequence = last if i % 50 == 49 else text[at : at + length]
                at, last = at + length, sequence
                handle.write(b">r%d\n%s\n" % (start + i, sequence))


STANDIN = ROOT / "tests" / "screening"

CHILD = """
import json, sys
sys.path.insert(0, {here!r})
import screen
screen.child(json.loads(sys.argv[1]))
"""


def child(ask: dict[str, Any]) -> None:
    """One screen in this process; prints what was measured as one line of JSON."""
    sys.path.insert(0, str(STANDIN))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STANDIN), os.environ.get("PYTHONPATH")]))
    from standin import StandIn

    from bioseq.specs.screen import ScreenSpec
    from serving.screening.run import screen

    started = time.perf_counter()
    engine = StandIn() if ask["standin"] else None
    outcome = screen(ScreenSpec.from_dict(ask["spec"]), engine=engine, progress=False)
    wall = time.perf_counter() - started
    facts = json.loads((outcome.path / "run.json").read_text())
    found = {
        **{k: outcome.summary[k] for k in ("records", "distinct", "quarantined", "tokens")},
        "wall_s": round(wall, 2),
        "records_per_s": round(outcome.summary["records"] / wall, 1),
        "driver_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "steps_s": facts["seconds"],
        "engine_s": facts["engine_seconds"],
        "worker_s": facts["worker_seconds"],
        "worker_cpu_s": facts["worker_cpu_seconds"],
        "steady_tokens_per_s": facts["steady_tokens_per_second"],
        "shards": facts["shards"],
    }
    print("RESULT " + json.dumps(found))


def in_a_process(ask: dict[str, Any]) -> dict[str, Any]:
    code = CHILD.format(here=str(Path(__file__).parent))
    # Ray gives its workers niceness 15: beside other work of a machine they would be measured starving
    env = {**os.environ, "RAY_worker_niceness": "0"}
    command = [sys.executable, "-c", code, json.dumps(ask)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"a run failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0][7:])


def path(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for records in args.records or (1_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            library = Path(folder) / "library.fasta"
            random_library(library, records)
            spec = {
                "inputs": [str(library)],
                "output": f"{folder}/run",
                "heads": ["stability", "place"],
                "workers": args.workers,
                "where": "place.nucleus > 0.5",
                "rank": "stability.value",
                "top": 1000,
            }
            row = in_a_process({"spec": spec, "standin": True})
        if row["records"] != records or row["quarantined"]:
            raise SystemExit(f"{records} records went in, {row['records']} came out")
        print(json.dumps(row), file=sys.stderr)
        rows.append(row)
    peaks = [r["driver_peak_mib"] for r in rows]
    return {"rows": rows, "driver_memory_ratio_largest_to_smallest": round(max(peaks) / min(peaks), 3)}


def library(args: argparse.Namespace) -> dict[str, Any]:
    opener = gzip.open if args.fasta.endswith(".gz") else open
    with opener(args.fasta, "rb") as handle:
        count = sum(line.startswith(b">") for line in handle)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        heads = ["stability", "place"]
        spec = {
            "inputs": [args.fasta],
            "output": f"{folder}/run",
            "heads": heads,
            "workers": args.workers,
            "top": 1000,
        }
        row = in_a_process({"spec": spec, "standin": True})
    if row["records"] != count:
        raise SystemExit(f"{count} headers, {row['records']} records")
    return {"file": Path(args.fasta).name, "headers": count, **row}


# ---------------------------------------------------------------------------------------------------- tables


def tables(args: argparse.Namespace) -> dict[str, Any]:
    """Deduplicate, merge and rank ready-made index and part files; peak memory of the process that does it."""
    rows = []
    for records in args.records or (10_000_000,):
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import screen; "
            for step in ("make_tables", "use_tables"):
                ask = [sys.executable, "-c", f"{code}screen.{step}({folder!r}, {records})"]
                done = subprocess.run(ask, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), file=sys.stderr)
    return {"rows": rows}


def make_tables(folder: str, records: int) -> None:
    """An index of `records` short sequences (2 % are copies) and the parts of a stand-in for its units."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from serving.screening.index import SCHEMA
    from serving.screening.source import Piece

    work = Path(folder) / "work"
    for name in ("index", "parts"):
        (work / name).mkdir(parents=True)
    generator = np.random.default_rng(1)
    pieces = []
    for number, start in enumerate(range(0, records, 65_536)):
        count = min(65_536, records - start)
        key = generator.integers(0, int(records * 25), count).astype(np.uint64)
        letters = LETTERS[generator.integers(0, 20, count * 30)].tobytes().decode()
        columns = [
            pa.array([f"record-{start + i}" for i in range(count)]),
            pa.array(np.full(count, 30), pa.int32()),
            pa.array(key * np.uint64(0x9E3779B97F4A7C15)),
            pa.array(key),
            pa.nulls(count, pa.string()),
            pa.nulls(count, pa.string()),
            pa.nulls(count, pa.int64()),
            pa.array([letters[30 * i : 30 * i + 30] for i in range(count)]),
        ]
        path = work / "index" / f"p{number:06d}.parquet"
        pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), path, compression="zstd")
        pieces.append(vars(Piece(0, 0, number, str(path), count, 30 * count, 0)))
    (work / "pieces.json").write_text(json.dumps(pieces))


def use_tables(folder: str, records: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sys.path.insert(0, str(STANDIN))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STANDIN), os.environ.get("PYTHONPATH")]))
    from standin import HEADS

    from bioseq.specs.screen import ScreenSpec
    from serving.screening.source import Piece
    from serving.screening.tables.columns import part_schema
    from serving.screening.tables.merge import merge
    from serving.screening.tables.select import compile_selection, select
    from serving.screening.tables.summary import summarise
    from serving.screening.units import DATABASE_MEMORY, Plan, deduplicate

    out, work = Path(folder), Path(folder) / "work"
    pieces = [Piece(**p) for p in json.loads((work / "pieces.json").read_text())]
    seconds, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name], started = round(time.perf_counter() - started, 1), time.perf_counter()

    units = pq.ParquetFile(deduplicate(work, pieces)).metadata.num_rows
    lap("deduplicate")
    generator = np.random.default_rng(2)
    schema = part_schema(HEADS)
    names = []
    for number, start in enumerate(range(0, units, 65_536)):
        count = min(65_536, units - start)
        made = []
        for field in schema:
            if field.name == "unit":
                made.append(pa.array(range(start, start + count), pa.int64()))
            elif pa.types.is_floating(field.type):
                made.append(pa.array(generator.random(count)))
            elif pa.types.is_list(field.type):
                made.append(pa.array([["nucleus"]] * count, field.type))
            else:
                made.append(pa.nulls(count, field.type))
        names.append(f"shard-{number:06d}.parquet")
        pq.write_table(pa.Table.from_arrays(made, schema=schema), work / "parts" / names[-1])
    lap("making parts, not counted")
    spec = ScreenSpec(inputs=("x",), output="y", heads=("a", "b"), where="nucleus > 0.1", top=1000)
    merge(work, out / "predictions", pieces, names, HEADS, memory=DATABASE_MEMORY)
    lap("merge")
    chosen = compile_selection(spec, HEADS)
    found = select(spec, chosen, HEADS, out, work, pieces, [], units, memory=DATABASE_MEMORY)
    lap("rank by the mean of two heads, hits")
    plan = Plan(records, 0, 30 * records, units, 32 * units, 1, [])
    summarise(work, out, HEADS, plan, found, DATABASE_MEMORY)
    lap("summary")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {
        "records": records,
        "units": units,
        "passed": found["counts"]["passed"],
        "peak_mib": round(peak, 1),
    }
    print(json.dumps({**row, "database_memory": DATABASE_MEMORY, "seconds": seconds}))


# ---------------------------------------------------------------------------------------------------- engine


def bundles(folder: Path) -> None:
    """An 8M backbone and a regression head, both random."""
    import torch

    from bioseq.backbones.packed.config import CONFIGS
    from bioseq.backbones.packed.encoder import PackedEncoder
    from bioseq.backbones.storage import save_backbone
    from bioseq.bundles.bundle import open_bundle, write_bundle

    generator = torch.Generator().manual_seed(0)
    encoder = PackedEncoder(CONFIGS["8m"])
    encoder.init_weights(generator)
    save_backbone(folder / "base", encoder, name="base", card="# random", evidence={}, licence="CC0-1.0")
    width = CONFIGS["8m"].d_model
    tensors = {
        "features.mean": torch.zeros(width),
        "features.scale": torch.ones(width),
        "ood.mean": torch.zeros(width),
        "ood.project": torch.eye(width)[:, :32].contiguous(),
        "ood.grid": torch.linspace(0, 3, 101),
        "layers.0.weight": torch.randn(1, width, 1, generator=generator),
        "layers.0.bias": torch.zeros(1, 1, 1),
        "target.offset": torch.zeros(1),
        "target.scale": torch.ones(1),
    }
    fields = {
        "kind": "head",
        "name": "value",
        "alphabet": "protein",
        "base_hash": open_bundle(folder / "base").manifest.content_hash,
        "task": "regression",
        "labels": ["y"],
        "extra": {"head": {"blocks": ["embedding"], "classes": [], "targets": ["y"]}},
    }
    write_bundle(
        folder / "value",
        manifest_fields=fields,
        tensors=tensors,
        calibration={"radius": [1.0]},
        card="# random",
        evidence={},
    )


PREDICTOR = """
import json, sys, time
import numpy as np
import bioseq
from bioseq.bundles.bundle import open_bundle
from bioseq.sequences.fasta import read_fasta
from bioseq.heads.head import Head
folder, fasta, out = sys.argv[1:]
model = bioseq.load(folder + "/base", threads=1, device="cpu")
model.load_head("value", Head.load(open_bundle(folder + "/value")))
texts = [r.sequence for r in read_fasta(fasta)]
queries = [model.prepare(t, heads=("value",)) for t in texts]
model.run(queries[:8])
started, cpu = time.perf_counter(), time.process_time()
queries = [model.prepare(t, heads=("value",)) for t in texts]
answers = model.run(queries)
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
np.save(out, [a.predictions["value"]["value"] for a in answers])
print(json.dumps({"tokens": sum(w.tokens for w in queries), "seconds": seconds, "cpu": cpu}))
"""


def engine(args: argparse.Namespace) -> dict[str, Any]:
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        bundles(folder)
        fasta = folder / "proteins.fasta"
        proteins = read_proteins(args.proteins, args.fasta)
        fasta.write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(proteins)))

        def predictor() -> tuple[float, float]:
            done = subprocess.run(
                [sys.executable, "-c", PREDICTOR, name, str(fasta), str(folder / "wanted.npy")],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            return found["tokens"] / found["seconds"], found["tokens"] / found["cpu"]

        def screen(workers: int, number: int) -> dict[str, Any]:
            spec = {
                "inputs": [str(fasta)],
                "output": f"{name}/run{number}",
                "heads": [f"{name}/value"],
                "model": f"{name}/base",
                "workers": workers,
                "device": "cpu",
            }
            return in_a_process({"spec": spec, "standin": False})

        predictors, ones, twos = [predictor()], [], []
        for k in range(args.rounds):
            ones.append(screen(1, 2 * k))
            predictors.append(predictor())
            twos.append(screen(2, 2 * k + 1))
            predictors.append(predictor())
        wanted = np.load(folder / "wanted.npy")
        got = np.array(pq.read_table(folder / "run0/predictions")["value.value"].to_pylist())
        error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        if error > 1e-5:
            raise SystemExit(f"the screen's numbers differ from the predictor's: relative error {error:.1e}")
    base, base_cpu = (float(x) for x in np.median(predictors, axis=0))
    one, two = (float(np.median([r["steady_tokens_per_s"] for r in found])) for found in (ones, twos))
    per_cpu = float(np.median([r["tokens"] / r["worker_cpu_s"] for r in ones]))
    return {
        "proteins": args.proteins,
        "relative_error": error,
        "predictor_tokens_per_s": [round(p[0], 1) for p in predictors],
        "predictor_tokens_per_cpu_s": [round(p[1], 1) for p in predictors],
        "screen_tokens_per_cpu_s": round(per_cpu, 1),
        "one_worker": ones,
        "two_workers": twos,
        "share_of_predictor_per_cpu_s": round(per_cpu / base_cpu, 3),
        "steady_share_of_predictor": round(one / base, 3),
        "two_workers_over_one": round(two / one, 3),
    }


# -------------------------------------------------------------------------------------------------- homologs


def homologs(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a record of one screening engine with the shipped heads, and the searches' part of them. The index is
    opened before; answers with searches made before and with those made inside are compared."""
    from bioseq.heads.head import Head
    from bioseq.specs.screen import ScreenSpec
    from serving.screening.engine import predictor_factory

    proteins = read_proteins(args.proteins, args.fasta)
    said: list[Any] = []
    seconds = [0.0]
    find = Head.find

    def timed(head: Head, *given: Any, **options: Any) -> Any:
        started = time.perf_counter()
        said.append(find(head, *given, **options))
        seconds[0] += time.perf_counter() - started
        return said[-1]

    def again(*_: Any, **__: Any) -> Any:
        return said.pop(0)

    rows = {}
    for name in ("localization", "target_class", "secondary_structure"):
        spec = ScreenSpec(inputs=("library.fasta",), output="run", heads=(name,), threads=args.workers)
        engine = predictor_factory(spec, device="cpu").build()
        engine.run(proteins[:4], [False] * 4)
        found, walls = [], []
        seconds[0] = 0.0
        for way in (timed, again):
            Head.find = way  # type: ignore[method-assign, assignment]
            started = time.perf_counter()
            found.append([r.cells for r in engine.run(proteins, [False] * len(proteins))])
            walls.append(time.perf_counter() - started)
        Head.find = find  # type: ignore[method-assign]
        if found[0] != found[1]:
            raise SystemExit("searches made before give other answers than those made inside")
        rows[name] = {
            "seconds_a_record": round(walls[0] / len(proteins), 4),
            "of_it_searching": round(seconds[0] / len(proteins), 4),
            "without_searches": round(walls[1] / len(proteins), 4),
        }
    return {
        "proteins": len(proteins),
        "mean_length": round(sum(map(len, proteins)) / len(proteins), 1),
        "threads": args.workers,
        "heads": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {"path": path, "library": library, "tables": tables, "engine": engine, "homologs": homologs}
    parser.add_argument("what", nargs="?", choices=kinds)
    parser.add_argument("--records", type=int, nargs="+", help="sizes of the libraries")
    parser.add_argument("--fasta")
    parser.add_argument("--proteins", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scratch", default=None, help="folder for libraries and runs")
    args = parser.parse_args()
    for name in [args.what] if args.what else [k for k in kinds if k != "library" or args.fasta]:
        found = kinds[name](args)
        write_result(f"screen-{name}", {"host": host(), "versions": versions(), **found})
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

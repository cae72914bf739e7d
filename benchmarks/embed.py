"""Embedding throughput against transformers, side by side in one run.

    python benchmarks/embed.py [--proteins 512] [--rounds 3] [--shape 8m]

The same weights, the same real proteins, tokens per second. Each library and dtype runs in a process of its own, so
that no allocator or thread setting of one helps or hurts another; they take turns over slices of the
proteins, round after round, so that drift of the machine falls on all alike. Every round's outputs are checked
against the first transformers setting's. Nothing is cached between rounds.

The claim (docs/performance.md), against the fastest transformers setting of the same dtype (one by one, padded 8 and
32 in file order, padded 8 sorted; sdpa): float32 >= 1.2x at 8M and level at 650M; bfloat16 >= 1.6x at 8M and 1.5x at 150M
and 650M; int8 >= 1.5x our bfloat16 at 650M. On a GPU: the share of the card's own measured bfloat16 matmul rate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import pickle
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import host, matmul_rate, read_proteins, versions, write_result

HF_SETTINGS = {
    "one by one": (1, False),
    "padded 8": (8, False),
    "padded 32": (32, False),
    "padded 8 sorted": (8, True),
}
ERRORS = {
    "float32": 1e-5,
    "bfloat16": 3e-2,
    "int8": 8e-2,
}  # of random weights, to transformers' float32 one by one


ESMC = {"esmc-300m": (30, 960, 15, 2560), "esmc-600m": (36, 1152, 18, 3072)}  # layers, width, heads, inner


def hf_config(shape: str, layers: int | None) -> Any:
    from transformers import EsmcConfig, EsmConfig

    if shape in ESMC:
        depth, width, heads, inner = ESMC[shape]
        return EsmcConfig(
            num_hidden_layers=layers or depth,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=inner,
        )

    from bioseq.backbones.packed.config import CONFIGS

    c = CONFIGS[shape]
    return EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=c.d_model,
        num_hidden_layers=layers or c.n_layers,
        num_attention_heads=c.n_heads,
        intermediate_size=c.d_ff,
        position_embedding_type="rotary",
        token_dropout=True,
        layer_norm_eps=1e-5,
        emb_layer_norm_before=False,
        max_position_embeddings=1026,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def why_not() -> str | None:
    """Why int8 cannot be measured here."""
    from bioseq.backbones.packed.int8 import supported

    return supported()


def attention(head: int) -> dict[str, str]:
    """What is chosen here in bfloat16, by the length of a sequence."""
    import torch

    from bioseq.backbones.packed.attention import kernel

    return {str(n): kernel(torch.bfloat16, head, n) for n in (64, 128, 256, 512, 1024)}


def make_weights(config: Any, folder: str) -> None:
    """One random checkpoint in the Hugging Face layout that every process loads."""
    import torch
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def serve_bioseq(pipe: Any, folder: str, dtype: str, threads: int, device: str) -> None:
    import bioseq

    model = bioseq.load(folder, dtype=dtype, threads=threads, device=device)
    _answer(pipe, lambda sequences, _: model.embed(sequences))


def serve_hf(pipe: Any, folder: str, dtype: str, threads: int, device: str) -> None:
    import torch
    from transformers import AutoModel

    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(
        folder, attn_implementation="sdpa"
    )  # the pooler of ESM is one small product
    model = model.to(device, getattr(torch, dtype)).eval()
    from bioseq.sequences.alphabet import protein

    alphabet = protein()

    @torch.inference_mode()
    def embed(sequences: list[str], setting: str) -> np.ndarray:
        batch, sort = HF_SETTINGS[setting]
        order = (
            sorted(range(len(sequences)), key=lambda i: len(sequences[i])) if sort else range(len(sequences))
        )
        order = list(order)
        rows = np.empty((len(sequences), model.config.hidden_size), dtype=np.float32)
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            ids = [np.r_[0, alphabet.encode(sequences[i]).ids.astype(np.int64), 2] for i in chosen]
            width = max(map(len, ids))
            tokens = torch.ones((len(ids), width), dtype=torch.int64)
            for row, one in zip(tokens, ids):
                row[: len(one)] = torch.from_numpy(one)
            mask = (tokens != 1).to(device)
            hidden = model(tokens.to(device), attention_mask=mask).last_hidden_state
            for row, i, one in zip(hidden, chosen, ids):
                rows[i] = row[1 : len(one) - 1].float().mean(0).cpu().numpy()
        return rows

    _answer(pipe, embed)


class EsmCpp:
    """A pipe to `_esm_cpp.py`. Its rows are the first sequence's embedding and, as it does not give the others', NaN."""

    def __init__(self, python: str, weights: str, dtype: str, threads: int):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("_esm_cpp.py")), weights, dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.into, self.out = self.process.stdin, self.process.stdout
        assert self.out.readline() == b"ready\n"

    def send(self, asked: tuple[list[str], str] | None) -> None:
        if asked is None:
            self.into.close()
            return
        self.count = len(asked[0])
        pickle.dump(asked[0], self.into)
        self.into.flush()

    def recv(self) -> tuple[np.ndarray, float, float, float]:
        wall, cpu, peak, first = pickle.load(self.out)
        rows = np.full((self.count, len(first)), np.nan, np.float32)
        rows[0] = first
        return rows, wall, cpu, peak


def classic_weights(folder: str) -> str:
    """The checkpoint under the names of the published ones, with their rotary tables, as esm-cpp reads it."""
    import torch
    from safetensors.torch import load_file, save_file

    from bioseq.backbones.checkpoints.checkpoint import load_checkpoint, write_checkpoint

    found, to = load_checkpoint(Path(folder)).encoder, Path(folder) / "classic"
    write_checkpoint(to, found.config, found.state_dict())
    tensors, half = load_file(to / "model.safetensors"), torch.arange(0, found.config.head_dim, 2).float()
    for i in range(found.config.n_layers):
        name = f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"
        tensors[name] = 10000 ** (-half / found.config.head_dim)
    save_file(tensors, Path(folder) / "classic.safetensors")
    return str(Path(folder) / "classic.safetensors")


def _answer(pipe: Any, embed: Any) -> None:
    """Embed what comes through the pipe; tell wall and CPU seconds, and the process's peak memory."""
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        rows = embed(*asked)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        pipe.send((rows, wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="8m")
    p.add_argument("--layers", type=int, default=None, help="fewer than the shape has, for a short run")
    p.add_argument("--proteins", type=int, default=512)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--slice", type=int, default=64, help="proteins a turn")
    p.add_argument(
        "--fasta", default=None, help="default: the Swiss-Prot proteins in tests/data and the sample"
    )
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--device", default="cpu")
    p.add_argument("--esm-cpp", metavar="PYTHON", help="a Python with esm-cpp 0.2.1, to be measured too")
    p.add_argument("--out", default=None)
    args = p.parse_args()

    import tempfile

    from bioseq.backbones.checkpoints.checkpoint import load_checkpoint

    sequences = read_proteins(args.proteins, args.fasta, limit=1022)
    dtypes = ["float32", "bfloat16"] if args.device == "cpu" else ["bfloat16"]
    ours = [*dtypes, "int8"] if args.device == "cpu" and why_not() is None else dtypes
    # name -> (process, setting, dtype)
    theirs = {f"transformers {d} {s}": (f"transformers {d}", s, d) for d in dtypes for s in HF_SETTINGS}
    settings = theirs | {f"bioseq {d}": (f"bioseq {d}", "", d) for d in ours}
    targets = {p: serve_hf if p.startswith("transformers") else serve_bioseq for p, _, _ in settings.values()}

    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        make_weights(hf_config(args.shape, args.layers), folder)
        shape = load_checkpoint(folder).config
        pipes, processes = {}, {}
        for name, target in targets.items():
            here, there = context.Pipe()
            given = (there, folder, name.split()[1], args.threads, args.device)
            processes[name] = context.Process(target=target, args=given, daemon=True)
            processes[name].start()
            assert here.recv() == "ready"
            pipes[name] = here
        if args.esm_cpp:
            weights = classic_weights(folder)
            for dtype in ("float32", "int8"):
                name = f"esm-cpp {dtype}"
                pipes[name] = EsmCpp(args.esm_cpp, weights, dtype, args.threads)
                settings[name] = (name, "", dtype)
        tokens = sum(len(s) + 2 for s in sequences)
        slices = [sequences[i : i + args.slice] for i in range(0, len(sequences), args.slice)]
        for pipe in pipes.values():  # warm up
            pipe.send((slices[0][:4], "one by one"))
            pipe.recv()
        walls: dict[str, list[float]] = {name: [] for name in settings}
        cpus: dict[str, list[float]] = {name: [] for name in settings}
        total = dict.fromkeys(settings, 0.0)
        memory = dict.fromkeys(settings, 0.0)
        errors = dict.fromkeys(settings, 0.0)
        rates = {"float32": [], "bfloat16": []}
        for _ in range(args.rounds):
            for dtype in rates:
                rates[dtype].append(matmul_rate(dtype, args.threads, args.device))
            for part in slices:
                reference, size = None, sum(len(s) + 2 for s in part)
                for name, (process, setting, _) in settings.items():
                    pipe = pipes[process]
                    pipe.send((part, setting))
                    rows, seconds, cpu_seconds, peak = pipe.recv()
                    walls[name].append(size / seconds)
                    cpus[name].append(size / cpu_seconds)
                    total[name] += seconds
                    memory[name] = max(memory[name], peak)
                    reference = rows if reference is None else reference
                    off = np.linalg.norm(rows - reference, axis=1) / np.linalg.norm(reference, axis=1)
                    errors[name] = max(errors[name], float(np.nanmax(off)))
        for name, pipe in pipes.items():  # of processes
            pipe.send(None)
            if name in processes:
                processes[name].join(30)

    for name, error in errors.items():
        limit = (
            ERRORS[settings[name][2]] if "esm-cpp" not in name else 1.0
        )  # SmoothQuant, as its own gate has it
        if not error <= limit:
            print(f"{name}: outputs differ by {error:.2e}, over {limit}", file=sys.stderr)
            return 1
    flops = sum((len(s) + 2) * shape.flops_per_token(len(s) + 2) for s in sequences) / tokens
    speed = {n: args.rounds * tokens / seconds for n, seconds in total.items()}
    best = {d: max((n for n in theirs if theirs[n][2] == d), key=lambda n: speed[n]) for d in dtypes}

    def ratio(a: str, b: str) -> dict[str, float]:
        """Of the whole run, and the spread slice by slice; by CPU time too, which other load disturbs less."""
        pairs = sorted(x / y for x, y in zip(walls[a], walls[b]))
        return {
            "wall": speed[a] / speed[b],
            "slice_min": pairs[0],
            "slice_median": statistics.median(pairs),
            "slice_max": pairs[-1],
            "cpu_time_slice_median": statistics.median(x / y for x, y in zip(cpus[a], cpus[b])),
        }

    ratios = {}
    for dtype in ours:
        for other in (
            [best[dtype], f"transformers {dtype} padded 8"] if dtype in best else ["bioseq bfloat16"]
        ):
            ratios[f"bioseq {dtype} / {other}"] = ratio(f"bioseq {dtype}", other)
    if args.esm_cpp:
        for dtype in ("float32", "int8"):
            if dtype in ours:
                ratios[f"bioseq {dtype} / esm-cpp {dtype}"] = ratio(f"bioseq {dtype}", f"esm-cpp {dtype}")
    result = {
        "claim": __doc__.split("The claim")[1].strip(),
        "host": host(args.device),
        "versions": versions(),
        "command": "python benchmarks/embed.py " + " ".join(Path(a).name for a in sys.argv[1:]),
        "shape": args.shape,
        "layers": shape.n_layers,
        "threads": args.threads,
        "proteins": len(sequences),
        "tokens": tokens,
        "mean_length": tokens / len(sequences),
        "flops_per_token": flops,
        "matmul_flops_per_second": {d: statistics.median(r) for d, r in rates.items()},
        "tokens_per_second": {n: round(v) for n, v in speed.items()},
        "tokens_per_second_by_slice": {n: [round(v) for v in r] for n, r in walls.items()},
        "tokens_per_cpu_second_by_slice": {n: [round(v) for v in r] for n, r in cpus.items()},
        "share_of_matmul_rate": {
            n: speed[n] * flops / statistics.median(rates["float32" if d == "float32" else "bfloat16"])
            for n, (_, _, d) in settings.items()
        },
        "attention_by_length": attention(shape.head_dim) if args.device == "cpu" else {},
        "peak_memory_mib": memory,
        "worst_relative_error_to_transformers_one_by_one": errors,
        "ratios": ratios,
    }
    path = write_result("embed", result, args.out)
    print(
        json.dumps(
            {"ratios": ratios, "tokens_per_second": speed, "share": result["share_of_matmul_rate"]}, indent=1
        )
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

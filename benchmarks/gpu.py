"""One GPU: embedding and pretraining as shares of the card's own matrix rate, beside transformers, in one run.

    python benchmarks/gpu.py [--embed 650m] [--pretrain 150m,650m] [--seconds 6] --fasta FILE

**Embedding.** `Predictor.embed` in bfloat16 against `EsmModel` (sdpa, bfloat16) padded 8 and 32, in file order and
sorted by length, on the same random weights and the same proteins; every setting's outputs are compared with the
first's. The figure counts everything from strings to rows on the CPU.

**Pretraining.** The steps of `training.pretrain.loop` (packed, bf16 autocast, AdamW, compiled layers) against
`EsmForMaskedLM` in bf16 autocast with fused AdamW on length-sorted padded batches, as the Trainer's length grouping
makes them, as they are and compiled; useful tokens per second, after a warm-up. The loss must fall on both sides.

Work is counted as 2 operations a weight and token plus the attention products (`ModelConfig.flops_per_token`), three
times that in training; the LM head, and the end of the last layer, at the chosen residues only. The matrix rate is
the median of square bfloat16 products of 8,192.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import host, matmul_rate, read_proteins, versions, write_result
from embed import hf_config

from bioseq.backbones.checkpoints.checkpoint import load_checkpoint
from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.inference.batching import pack, plan
from bioseq.inference.predictor import Predictor
from bioseq.sequences.alphabet import protein
from training.pretrain.batches import Micro
from training.pretrain.distributed.parallel import Trainee
from training.pretrain.distributed.team import Team
from training.pretrain.recipes import recipe

CUDA = torch.device("cuda")


def timed(work: Callable[[], Any], seconds: float) -> tuple[float, int]:
    """(seconds, turns) of `work`, repeated for about that time; the device is waited for."""
    turns = 0
    torch.cuda.synchronize()
    began = time.perf_counter()
    while turns == 0 or time.perf_counter() - began < seconds:
        work()
        torch.cuda.synchronize()
        turns += 1
    return time.perf_counter() - began, turns


def same_weights(shape: str) -> tuple[PackedEncoder, Any]:
    """Our encoder and transformers' model with the same random weights, on the device in bfloat16."""
    import tempfile

    from transformers import EsmModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with CUDA:
        model = EsmModel._from_config(hf_config(shape), attn_implementation="sdpa").eval()
    torch.set_default_dtype(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        encoder = load_checkpoint(folder).encoder
    return encoder.to(CUDA, torch.bfloat16), model


def embedding(shape: str, sequences: list[str], seconds: float) -> dict[str, Any]:
    alphabet = protein()
    encoder, theirs = same_weights(shape)
    ours = Predictor(encoder, dtype="bfloat16", device=CUDA.type)

    @torch.inference_mode()
    def padded(batch: int, sort: bool) -> np.ndarray:
        order = np.argsort([len(s) for s in sequences], kind="stable") if sort else np.arange(len(sequences))
        rows = np.empty((len(sequences), theirs.config.hidden_size), dtype=np.float32)
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch].tolist()
            ids = [np.r_[0, alphabet.encode(sequences[i]).ids.astype(np.int64), 2] for i in chosen]
            tokens = torch.ones((len(ids), max(map(len, ids))), dtype=torch.int64)
            for row, one in zip(tokens, ids):
                row[: len(one)] = torch.from_numpy(one)
            tokens = tokens.to(CUDA)
            mask = tokens != 1
            hidden = theirs(tokens, attention_mask=mask).last_hidden_state.float()
            inner = (mask & (tokens != 0) & (tokens != 2)).float()[:, :, None]
            rows[chosen] = ((hidden * inner).sum(1) / inner.sum(1)).cpu().numpy()
        return rows

    sides: dict[str, Callable[[], np.ndarray]] = {
        "transformers padded 8": lambda: padded(8, False),
        "transformers padded 8 sorted": lambda: padded(8, True),
        "transformers padded 32 sorted": lambda: padded(32, True),
        "bioseq": lambda: ours.embed(sequences),
    }
    tokens = sum(len(s) + 2 for s in sequences)
    config = CONFIGS[shape]
    work = sum((len(s) + 2) * config.flops_per_token(len(s) + 2) for s in sequences)
    rate = matmul_rate("bfloat16", 8, "cuda")
    reference, speed, errors = None, {}, {}
    for name, run in sides.items():
        rows = run()  # a warm-up, and the check of the outputs
        reference = rows if reference is None else reference
        off = np.linalg.norm(rows - reference, axis=1) / np.linalg.norm(reference, axis=1)
        errors[name] = float(off.max())
        if not errors[name] <= 3e-2:
            raise SystemExit(f"{name}: outputs differ by {errors[name]:.2e}")
        took, turns = timed(run, seconds)
        speed[name] = turns * tokens / took
        print(shape, name, round(speed[name]), file=sys.stderr, flush=True)
    best = max(v for n, v in speed.items() if n != "bioseq")
    return {
        "shape": shape,
        "proteins": len(sequences),
        "mean_length": tokens / len(sequences),
        "tokens_per_second": speed,
        "worst_relative_error": errors,
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": {n: v * work / tokens / rate for n, v in speed.items()},
        "ratios": {
            "bioseq / best transformers": speed["bioseq"] / best,
            "bioseq / transformers padded 8": speed["bioseq"] / speed["transformers padded 8"],
        },
    }


def micros(sequences: list[str], budget: int, padded: bool) -> list[Any]:
    """Masked micro-batches of about `budget` tokens: packed `Micro`s, or padded (tokens, mask, labels, useful)."""
    alphabet, draw = protein(), np.random.default_rng(0)
    ids = [alphabet.encode(s).ids for s in sequences]
    made: list[Any] = []
    if not padded:
        for group in plan(np.array([len(x) + 2 for x in ids]), budget):
            batch = pack(ids, group, cls_id=alphabet.cls_id, eos_id=alphabet.eos_id)
            places = np.flatnonzero((batch.tokens > 3) & (draw.random(len(batch.tokens)) < 0.15))
            targets = batch.tokens[places].copy()
            tokens = batch.tokens.copy()
            tokens[places] = alphabet.mask_id
            arrays = (tokens, batch.cu_seqlens, places, targets)
            a, b, c, d = (torch.from_numpy(x) for x in arrays)
            made.append(Micro(a, b, batch.max_seqlen, c, d).to(CUDA))
        return made
    order = np.argsort([len(x) for x in ids], kind="stable")
    at = 0
    while at < len(order):
        size = 1
        while at + size < len(order) and (size + 1) * (len(ids[order[at + size]]) + 2) <= budget:
            size += 1
        rows = [np.r_[0, ids[i].astype(np.int64), 2] for i in order[at : at + size]]
        tokens = torch.ones((size, max(map(len, rows))), dtype=torch.int64)
        for row, one in zip(tokens, rows):
            row[: len(one)] = torch.from_numpy(one)
        chosen = (tokens > 3) & torch.from_numpy(draw.random(tokens.shape) < 0.15)
        labels = torch.where(chosen, tokens, -100)
        mask = tokens != 1
        made.append(
            (torch.where(chosen, 32, tokens).to(CUDA), mask.to(CUDA), labels.to(CUDA), int(mask.sum()))
        )
        at += size
    return made


def training(shape: str, sequences: list[str], seconds: float, budget: int) -> dict[str, Any]:
    from transformers import EsmForMaskedLM

    config = CONFIGS[shape]
    rate = matmul_rate("bfloat16", 8, "cuda")
    found: dict[str, Any] = {"shape": shape, "micro_tokens": budget, "matmul_flops_per_second": rate}
    speed: dict[str, float] = {}
    failed: dict[str, str] = {}

    def side(name: str, make: Callable[[], tuple[list[Any], Callable[[Any], tuple[float, int]]]]) -> None:
        """Warm up, then turn over the batches for `seconds`."""
        try:
            batches, step = make()
            began = time.perf_counter()
            losses = [step(b)[0] for b in batches[:6]]
            torch.cuda.synchronize()
            warm = time.perf_counter() - began
            tokens, turn = 0, 0
            began = time.perf_counter()
            while time.perf_counter() - began < seconds:
                loss, useful = step(batches[turn % len(batches)])
                losses.append(loss)
                tokens, turn = tokens + useful, turn + 1
            torch.cuda.synchronize()
            speed[name] = tokens / (time.perf_counter() - began)
            if not np.mean(losses[-3:]) < losses[0]:
                failed[name] = f"the loss did not fall: {losses[0]:.3f}, {losses[-1]:.3f}"
            found.setdefault("loss", {})[name] = [round(losses[0], 4), round(losses[-1], 4)]
            found.setdefault("warm_up_seconds", {})[name] = round(warm, 1)
            found.setdefault("memory_gib", {})[name] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            print(shape, name, round(speed[name]), round(warm, 1), file=sys.stderr, flush=True)
        except Exception as error:  # one side's failure leaves the others' figures
            failed[name] = "".join(traceback.format_exception(error))[-1500:]
            print(shape, name, "FAILED", failed[name], file=sys.stderr, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def ours(compiled: bool) -> Any:
        base = recipe("protein_150m" if shape == "150m" else "protein_650m").override(
            {"compile": compiled, "activation_checkpointing": False, "workers.parallel": "ddp"}
        )
        with CUDA:
            encoder = PackedEncoder(config)
            encoder.init_weights(torch.Generator(CUDA).manual_seed(0))
        trainee = Trainee(encoder, base, Team(device=CUDA))

        def step(micro: Micro) -> tuple[float, int]:
            chosen = max(len(micro.targets), 1)
            loss = trainee.backward(micro, 1.0 / chosen, last=True)
            trainee.step(1e-4)
            return float(loss) / chosen, len(micro.tokens)

        return micros(sequences, budget, False), step

    def theirs(compiled: bool) -> Any:
        with CUDA:
            model = EsmForMaskedLM._from_config(hf_config(shape), attn_implementation="sdpa").train()
        run = torch.compile(model, dynamic=True) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

        def step(batch: Any) -> tuple[float, int]:
            tokens, mask, labels, useful = batch
            with torch.autocast(CUDA.type, torch.bfloat16):
                loss = run(input_ids=tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach()), useful

        return micros(sequences, budget, True), step

    side("bioseq", lambda: ours(True))
    side("bioseq, not compiled", lambda: ours(False))
    side("transformers, length-sorted", lambda: theirs(False))
    batches = micros(sequences, budget, False)
    total = work = 0.0
    for m in batches:
        lengths = torch.diff(m.cu_seqlens).double()
        tokens, chosen = float(lengths.sum()), len(m.targets)
        dense = config.flops_per_token(float((lengths**2).sum()) / tokens) * tokens
        spared = 2.0 * (config.d_model**2 + 2 * config.d_model * config.d_ff) * (tokens - chosen)
        head = (config.flops_per_token(0, lm_head=True) - config.flops_per_token(0)) * chosen
        total, work = total + tokens, work + 3 * (dense - spared + head)
    others = [v for n, v in speed.items() if n.startswith("transformers")]
    mine = [v for n, v in speed.items() if n.startswith("bioseq")]
    return found | {
        "tokens_per_second": speed,
        "failed": failed,
        "flops_per_token": work / total,
        "share_of_matmul_rate": {
            n: v * work / total / rate for n, v in speed.items() if n.startswith("bioseq")
        },
        "ratios": {"bioseq / transformers": max(mine) / max(others)} if mine and others else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embed", default="650m", help="shapes, by commas")
    parser.add_argument("--pretrain", default="150m,650m", help="shapes, by commas")
    parser.add_argument("--seconds", type=float, default=6.0, help="a setting")
    parser.add_argument("--proteins", type=int, default=1024)
    parser.add_argument("--fasta", type=Path)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU was found")
    sequences = read_proteins(args.proteins, str(args.fasta) if args.fasta else None)
    result: dict[str, Any] = {"what": "one GPU against its own bfloat16 matrix rate, and beside transformers"}
    parts = [("embed", s) for s in args.embed.split(",") if s]
    parts += [("pretrain", s) for s in args.pretrain.split(",") if s]
    for kind, shape in parts:
        if kind == "embed":
            result.setdefault(kind, []).append(embedding(shape, sequences, args.seconds))
        else:
            budget = 32_768 if shape == "150m" else 16_384
            result.setdefault(kind, []).append(training(shape, sequences, args.seconds, budget))
        gc.collect()
        torch.cuda.empty_cache()
        result |= {
            "host": host("cuda"),
            "command": "python benchmarks/gpu.py " + " ".join(Path(a).name for a in sys.argv[1:]),
            "versions": versions(),
        }
        if args.out:  # what is measured is kept, should the next part not end
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    path = write_result("gpu", result, args.out)
    print(json.dumps({k: result[k] for k in ("embed", "pretrain") if k in result}, indent=1))
    print(path)


if __name__ == "__main__":
    main()

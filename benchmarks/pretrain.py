"""Pretraining throughput: the bare loop, the loop under Ray Train, and the transformers Trainer, in one run.

    python benchmarks/pretrain.py --against DIR [--recipe protein_8m]
    python benchmarks/pretrain.py [--recipe protein_8m] [--steps 120] [--rounds 2] [--dtype float32] [--gpu]

With --against, the bare loop of this checkout and that of DIR, another checkout, in turns and in processes of their
own, by processor time: a machine that others use as well gives such figures reliably, and no others.

Every side trains the same shape on the same proteins (whole, up to 1,022 residues), at the same dtype and
threads, from random weights, with AdamW. Tokens are useful ones: residues and the two special tokens, never
padding. Start-up is apart: the first quarter of the steps is not counted. The two kinds of loop take turns over the
rounds; a figure is all counted tokens by all counted seconds. The Trainer's figure is the better of random and
length-grouped padded batches. In each run the loss's mean over the last quarter of the steps must lie below that
over the first, else no figure.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import host, read_proteins, versions, write_result

from bioseq.sequences.alphabet import protein
from training.corpus.corpus import open_corpus
from training.corpus.prepare import Prepare, prepare
from training.pretrain.recipes import recipe
from training.pretrain.records.run_folder import read_metrics
from training.pretrain.run import run


@dataclass
class Run:
    """What was counted of one or several runs."""

    tokens: int
    seconds: float
    first_loss: float
    last_loss: float

    def __add__(self, other: Run) -> Run:
        return Run(
            self.tokens + other.tokens, self.seconds + other.seconds, other.first_loss, other.last_loss
        )

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def fallen(losses: list[float], side: str) -> tuple[float, float]:
    """The loss's mean over the first and over the last quarter of the steps."""
    quarter = max(1, len(losses) // 4)
    first, last = float(np.mean(losses[:quarter])), float(np.mean(losses[-quarter:]))
    if not last < first:
        raise SystemExit(f"{side}: the loss did not fall ({first:.3f}, {last:.3f}): more --steps")
    return round(first, 4), round(last, 4)


def loop_run(folder: Path, steps: int) -> Run:
    """Between the end of the first quarter and the last step, by the clock on the wall."""
    rows = [r for r in read_metrics(folder) if r["kind"] == "train"]
    first = next(r for r in rows if r["step"] >= steps // 4)
    last = rows[-1]
    losses = fallen([r["loss"] for r in rows], folder.name)
    return Run(last["tokens"] - first["tokens"], last["time"] - first["time"], *losses)


def trainer_run(spec: Any, sequences: list[str], steps: int, grouped: bool, gpu: bool) -> Run:
    import transformers
    from transformers import EsmConfig, EsmForMaskedLM, Trainer, TrainerCallback, TrainingArguments

    transformers.logging.set_verbosity_error()
    m = spec.model
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=m.d_model, num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads, intermediate_size=m.d_ff, max_position_embeddings=1026,
        position_embedding_type="rotary", token_dropout=True, layer_norm_eps=1e-5, emb_layer_norm_before=False,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = EsmForMaskedLM(config)
    a = protein()
    rows = [np.concatenate(([a.cls_id], a.encode(s).ids, [a.eos_id])) for s in sequences]
    mean = float(np.mean([len(r) for r in rows]))
    per_batch = max(1, round(spec.micro_tokens / mean))
    draw = np.random.default_rng(0)
    useful: list[int] = []
    stamps: list[float] = []
    losses: list[float] = []

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [i["input_ids"] for i in items]
        longest = max(map(len, ids))
        tokens = np.full((len(ids), longest), a.pad_id)
        attention = np.zeros((len(ids), longest), dtype=np.int64)
        for row, x in enumerate(ids):
            tokens[row, : len(x)], attention[row, : len(x)] = x, 1
        labels = np.where((draw.random(tokens.shape) < 0.15) & (tokens > 3), tokens, -100)
        fate = draw.random(tokens.shape)
        tokens = np.where((labels >= 0) & (fate < 0.8), a.mask_id, tokens)
        swap = draw.choice(a.standard_ids, size=tokens.shape)
        tokens = np.where((labels >= 0) & (fate >= 0.8) & (fate < 0.9), swap, tokens)
        useful.append(int(attention.sum()))
        made = {"input_ids": tokens, "attention_mask": attention, "labels": labels}
        return {k: torch.from_numpy(np.asarray(v, dtype=np.int64)) for k, v in made.items()}

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
        ) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=per_batch,
            learning_rate=spec.optimiser.lr, weight_decay=0.01, warmup_steps=spec.schedule.warmup,
            bf16=spec.precision == "bfloat16", use_cpu=not gpu, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, dataloader_num_workers=0, remove_unused_columns=False,
            train_sampling_strategy="group_by_length" if grouped else "random",
        )  # fmt: skip
        data = [{"input_ids": r, "length": len(r)} for r in rows]
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()]
        )
        trainer.train()
    skip = steps // 4
    return Run(sum(useful[skip:steps]), stamps[-1] - stamps[skip - 1], *fallen(losses, "Trainer"))


def flags() -> list[str]:
    """Of the processor, those that matter to matrix products."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return [flag for flag in known if f" {flag}" in text]


def matrix_rate(dtype: str) -> float:
    """GFLOP by second of processor time of a square matrix product, the best of several."""
    a = torch.randn(1024, 1024, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(10):
        began = time.process_time()
        a @ a
        seconds.append(time.process_time() - began)
    return round(2e-9 * len(a) ** 3 / min(seconds), 1)


_CHILD = """
import sys, time, types
from bioseq.specs.pretrain import PretrainSpec
from training.pretrain import loop
from training.pretrain.run import run
# The loop's seconds become those of the processor.
loop.time = types.SimpleNamespace(monotonic=time.process_time, time=time.time)
run(PretrainSpec.load(sys.argv[1]), progress=False)
"""


def against(spec: Any, folder: Path, checkouts: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Tokens by second of processor time of each checkout's loop, by round, without its first quarter of steps."""
    import os
    import subprocess

    rates: dict[str, list[float]] = {name: [] for name in checkouts}
    for turn in range(rounds):
        for name, path in checkouts.items():
            output = folder / f"{name}-{turn}"
            file = folder / f"{name}-{turn}.json"
            file.write_text(spec.override({"engine": "local", "output": str(output)}).to_json())
            environment = {**os.environ, "PYTHONPATH": str(path)}
            subprocess.run([sys.executable, "-c", _CHILD, str(file)], cwd=path, env=environment, check=True)
            rows = [r for r in read_metrics(output) if r["kind"] == "train"][spec.steps // 4 :]
            fallen([r["loss"] for r in read_metrics(output) if r["kind"] == "train"], name)
            seconds = sum(r["seconds"] for r in rows)
            rates[name].append(round(sum(r["seconds"] * r["tokens_per_s"] for r in rows) / seconds, 1))
            print(name, rates[name][-1], file=sys.stderr, flush=True)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="protein_8m")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2, help="runs of the loop on each side")
    parser.add_argument("--tokens", type=int, default=2048, help="a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--proteins", type=int, default=300)
    parser.add_argument("--fasta")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--against", type=Path, help="another checkout, to be timed in turns with this one")
    parser.add_argument("--crop", type=int, default=1022)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the spec")
    parser.add_argument("--skip", default="", help="sides to leave out: ray,trainer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sequences = read_proteins(args.proteins, args.fasta)
    runs: dict[str, Run] = {}
    rounds: dict[str, list[float]] = {}

    def counted(side: str, run: Run) -> None:
        runs[side] = runs[side] + run if side in runs else run
        rounds.setdefault(side, []).append(round(run.rate, 1))
        print(side, run, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.txt").write_text("\n".join(sequences))
        prepare(Prepare(sources=(str(folder / "a.txt"),)), folder / "corpus", progress=False)
        spec = recipe(args.recipe).override(
            {
                "corpus": str(folder / "corpus"), "steps": args.steps, "crop": args.crop, "sampling": "uniform",
                "tokens_per_step": args.tokens, "micro_tokens": args.tokens, "precision": args.dtype,
                "schedule.kind": "constant", "schedule.decay": 0, "schedule.warmup": 2, "eval.every": 0,
                "masking.rate": 0.15, "masking.mask": 0.8, "masking.random": 0.1, "optimiser.lr": 1e-3,
                "checkpoint_every": 10**6, "checkpoint_minutes": 0.0, "log_every": 1, "trackers": [],
                "workers.threads": args.threads, "workers.gpus": args.gpu, "compile": args.gpu,
                "model.init": "esm2",
            }
        )  # fmt: skip
        spec = spec.override(dict(s.split("=", 1) for s in args.set))
        if args.against is not None:
            checkouts = {"this": Path(__file__).resolve().parents[1], "against": args.against.resolve()}
            rates = against(spec, folder, checkouts, args.rounds)
            middle = {name: float(np.median(each)) for name, each in rates.items()}
            path = write_result(
                "pretrain-cpu-loop",
                {
                    "what": f"training tokens by second of processor time, {args.recipe}, {args.dtype}, "
                    f"{args.threads} thread(s); this checkout and another, in turns",
                    "settings": {**vars(args), "against": None},
                    "tokens_per_cpu_s_by_round": rates,
                    "median": middle,
                    "ratio": round(middle["this"] / middle["against"], 3),
                    "matrix_gflop_by_cpu_s": matrix_rate(args.dtype),
                    "host": {**host("cpu"), "flags": flags()},
                    "versions": versions(),
                },
            )
            print(path)
            return
        for turn in range(args.rounds):
            for side, title in (("local", "loop, bare"), ("ray", "loop, under Ray Train")):
                if side in args.skip:
                    continue
                output = folder / f"{side}-{turn}"
                run(spec.override({"engine": side, "output": str(output)}), progress=False)
                counted(title, loop_run(output, args.steps))
        mean = open_corpus(folder / "corpus").manifest["residues"] / len(sequences) + 2
    if "trainer" not in args.skip:
        for grouped in (False, True):
            title = f"transformers Trainer, {'length-grouped' if grouped else 'random'} batches"
            counted(title, trainer_run(spec, sequences, args.steps, grouped, args.gpu))
    figures = {side: run.rate for side, run in runs.items()}
    bare = figures["loop, bare"]
    ratios = {}
    if "loop, under Ray Train" in figures:
        ratios["under Ray Train / bare"] = figures["loop, under Ray Train"] / bare
    trainer = [v for k, v in figures.items() if "Trainer" in k]
    if trainer:
        ratios["bare / best Trainer"] = bare / max(trainer)
    shape = f"{spec.model.n_layers} layers of width {spec.model.d_model}"
    path = write_result(
        f"pretrain-{'gpu' if args.gpu else 'cpu'}",
        {
            "what": f"useful training tokens/s, {shape}, {args.dtype}, {args.threads} thread(s)",
            "settings": {**vars(args), "mean_tokens_a_protein": round(mean, 1)},
            "tokens_per_s": {k: round(v, 1) for k, v in figures.items()},
            "tokens_per_s_by_round": rounds,
            "loss_first_and_last_quarter": {k: [r.first_loss, r.last_loss] for k, r in runs.items()},
            "ratios": {k: round(v, 3) for k, v in ratios.items()},
            "host": host("cuda" if args.gpu else "cpu"),
            "command": "python benchmarks/pretrain.py " + " ".join(sys.argv[1:]),
            "versions": versions(),
        },
    )
    print(path)


if __name__ == "__main__":
    main()

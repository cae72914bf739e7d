"""The loop of LoRA and full fine-tuning, in one process or in each of several workers.

Batches are packed by a token budget in an order that depends on seed and epoch alone; step s of rank r takes batch
s * world + r. The loss of a step is the weighted sum over all workers' rows divided by their summed weight, so that it
does not depend on how rows fall to workers. Sequences over the model's limit are cut for training, and windowed when
measured.
"""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioseq.backbones import lora as adapters
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.inference import batching
from bioseq.inference.batching import SPECIAL_TOKENS
from bioseq.progress import Progress
from bioseq.specs.finetune import FinetuneSpec
from training.finetune.metrics import main_score
from training.finetune.models.linear import as_probabilities, task_loss

NAME = "tuned"
LR = {"lora": 5e-4, "full": 5e-5}
HEAD_LR = 1e-3
PATIENCE = 3


class Tuned(nn.Module):
    """Encoder, adapter and a linear head: pooled [N, C], or per residue [residues, C]."""

    def __init__(
        self, encoder: PackedEncoder, adapter: adapters.LoraAdapter | None, classes: int, residue: bool
    ):
        super().__init__()
        self.encoder, self.adapter, self.residue = encoder, adapter, residue
        self.head = nn.Linear(encoder.config.d_model, classes)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens_T: Tensor, cu: Tensor, longest: int) -> Tensor:
        hidden_TD = self.encoder(tokens_T, cu, longest).float()
        lengths = (cu[1:] - cu[:-1]).long()
        owner_T = torch.repeat_interleave(torch.arange(len(lengths), device=cu.device), lengths)
        inner_T = torch.ones(len(tokens_T), dtype=torch.bool, device=cu.device)
        inner_T[cu[:-1].long()] = False
        inner_T[cu[1:].long() - 1] = False
        if self.residue:
            return self.head(hidden_TD[inner_T])
        pooled = hidden_TD.new_zeros(len(lengths), hidden_TD.shape[1])
        pooled = pooled.index_add(0, owner_T[inner_T], hidden_TD[inner_T])
        return self.head(pooled / (lengths - SPECIAL_TOKENS)[:, None])


def batches(
    lengths: np.ndarray, budget: int, seed: int, epoch: int, rank: int, world: int
) -> list[np.ndarray]:
    """This rank's batches of an epoch. All ranks have equally many; the first ones fill up the last round."""
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    plan = [order[g] for g in batching.plan(lengths[order], max(budget, int(lengths.max())), sort=False)]
    plan += plan[: -len(plan) % world] if world <= len(plan) else []
    while len(plan) % world:
        plan.append(plan[len(plan) % max(len(plan), 1)])
    return plan[rank::world]


def tune(
    task: dict[str, Any], weights: dict[str, Tensor], *, rank: int = 0, world: int = 1
) -> dict[str, bytes]:
    """The loop of one worker. Rank 0 measures, says when to stop, and returns the files of the best state; the start is
    epoch 0. `task` and `weights` are plain data, so that a worker may run on any node."""
    spec = FinetuneSpec.from_dict(task["spec"])
    device = (
        torch.device("cuda", torch.cuda.current_device()) if task["device"] == "cuda" else torch.device("cpu")
    )
    torch.manual_seed(spec.seed)
    encoder = PackedEncoder(ModelConfig.from_dict(task["config"]), lm_head="lm_head.bias" in weights)
    encoder.load_state_dict(weights)
    adapter = None
    if task["method"] == "lora":
        encoder.requires_grad_(False)
        lora = spec.lora
        shape = adapters.LoraShape(
            lora.rank,
            float(lora.alpha),
            adapters.exact_targets(lora.targets, encoder.config.family),
            lora.dropout,
        )
        adapter = adapters.LoraAdapter(encoder, shape, generator=torch.Generator().manual_seed(spec.seed))
        adapters.attach(encoder, NAME, adapter)
        adapters.route_all(encoder, NAME)
    elif encoder.lm_head is not None:
        encoder.lm_head.requires_grad_(False)  # takes no part
    model = Tuned(encoder, adapter, task["classes"], task["task"] == "per_residue")
    if task["start"] is not None:
        with torch.no_grad():
            model.head.weight.copy_(torch.from_numpy(task["start"][0].T))
            model.head.bias.copy_(torch.from_numpy(task["start"][1]))
    model.to(device)
    runner: nn.Module = model
    if world > 1:
        runner = nn.parallel.DistributedDataParallel(model)
    lr = spec.lr or LR[task["method"]]
    body = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")]
    groups = [{"params": body, "lr": lr}, {"params": list(model.head.parameters()), "lr": max(lr, HEAD_LR)}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
    data = task["parts"]["train"]
    lengths = np.array([len(i) + SPECIAL_TOKENS for i in data["ids"]])
    per_epoch = [batches(lengths, spec.batch_tokens, spec.seed, e, rank, world) for e in range(spec.epochs)]
    total = sum(map(len, per_epoch))
    warm = max(1, total // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, s / max(total, 1)))),
    )
    files: dict[str, bytes] = {}
    best, waited, history = -math.inf, 0, []
    if rank == 0:
        best = _valid_score(task, model, spec, device)
        history.append({"epoch": 0, "valid": round(best, 5) if math.isfinite(best) else None})
        files = _state(task, model, history, best, lr, spec)
    with Progress(total, "fine-tuning", unit="steps", enabled=rank == 0) as bar:
        for epoch, plan in enumerate(per_epoch):
            runner.train()
            for rows in plan:
                loss, count = _loss(task, runner, data, rows, device)
                if (
                    world > 1
                ):  # workers' gradients are averaged: make that the sum over all, over the count of all
                    torch.distributed.all_reduce(count)
                    loss = loss * world
                optimiser.zero_grad()
                (loss / count.clamp_min(1e-9)).backward()
                nn.utils.clip_grad_norm_(body, 1.0)
                optimiser.step()
                schedule.step()
                bar.add(1)
            stop = torch.zeros(1, device=device)
            if rank == 0:
                value = _valid_score(task, model, spec, device)
                history.append({"epoch": epoch + 1, "valid": round(value, 5)})
                if value > best:
                    best, waited = value, 0
                    files = _state(task, model, history, best, lr, spec)
                else:
                    waited += 1
                stop += waited >= PATIENCE
            if world > 1:
                torch.distributed.broadcast(stop, 0)
            if stop.item():
                break
    if rank == 0:
        files["result.json"] = json.dumps({**json.loads(files["result.json"]), "history": history}).encode()
    return files


def _forward(runner: nn.Module, ids: list[np.ndarray], ends: tuple[int, int], device: torch.device) -> Tensor:
    batch = batching.pack(ids, np.arange(len(ids)), cls_id=ends[0], eos_id=ends[1])
    cast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with cast:
        return runner(
            torch.from_numpy(batch.tokens).to(device),
            torch.from_numpy(batch.cu_seqlens).to(device),
            batch.max_seqlen,
        ).float()


def _loss(
    task: dict[str, Any], runner: nn.Module, data: dict[str, Any], rows: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(weighted sum of the loss, summed weight) of these rows."""
    out = _forward(runner, [data["ids"][i] for i in rows], task["ends"], device)
    weight = torch.from_numpy(data["weight"][rows]).float().to(device)
    if task["task"] == "per_residue":
        states = [data["y"][i][: len(data["ids"][i])] for i in rows]
        target = torch.from_numpy(np.concatenate(states)).to(device)
        each = F.cross_entropy(out, target, ignore_index=-1, reduction="none")
        by_residue = torch.repeat_interleave(weight, torch.tensor([len(s) for s in states], device=device))
        by_residue = by_residue * (target >= 0)
        return (each * by_residue).sum(), by_residue.sum()
    y = (data["y"][rows] - task["offset"]) / task["scale"]
    positive = torch.from_numpy(task["positive"]).float().to(device)
    loss, count = task_loss(task["task"], out, torch.from_numpy(y).float().to(device), weight, positive)
    return loss, count.detach()


@torch.no_grad()
def _valid_score(task: dict[str, Any], model: Tuned, spec: FinetuneSpec, device: torch.device) -> float:
    model.eval()
    data = task["parts"]["valid"]
    residue = task["task"] == "per_residue"
    outs: list[Any] = [None] * len(data["ids"])
    lengths = np.array([len(i) + SPECIAL_TOKENS for i in data["ids"]])
    for rows in batching.plan(lengths, max(spec.batch_tokens, int(lengths.max()))):
        out = _forward(model, [data["ids"][i] for i in rows], task["ends"], device).cpu().numpy()
        cuts = np.cumsum([len(data["ids"][i]) for i in rows])[:-1]
        for i, one in zip(rows, np.split(out, cuts) if residue else out):
            outs[i] = one
    if residue:
        truth = np.concatenate([y[: len(i)] for y, i in zip(data["y"], data["ids"])]).astype(float)
        value = main_score("per_residue", truth, as_probabilities("per_residue", np.concatenate(outs)))
    else:
        raw = np.stack(outs)
        out = (
            raw * task["scale"] + task["offset"]
            if task["task"] == "regression"
            else as_probabilities(task["task"], raw)
        )
        value = main_score(task["task"], data["y"], out)
    return value if np.isfinite(value) else -math.inf


def _state(
    task: dict[str, Any],
    model: Tuned,
    history: list[dict[str, Any]],
    best: float,
    lr: float,
    spec: FinetuneSpec,
) -> dict[str, bytes]:
    """Files by name: head and trunk, or head and adapter in peft's format, and what was reached."""
    from safetensors.torch import save

    files: dict[str, bytes] = {}
    tensors = {"head.weight": model.head.weight, "head.bias": model.head.bias}
    setting: dict[str, Any] = {}
    if model.adapter is not None:
        with tempfile.TemporaryDirectory() as folder:
            adapters.save_adapter(model.adapter, Path(folder))
            files |= {f"adapter/{f.name}": f.read_bytes() for f in sorted(Path(folder).iterdir())}
        setting = {"rank": spec.lora.rank, "alpha": spec.lora.alpha, "targets": list(spec.lora.targets)}
    else:
        tensors |= {f"trunk.{k}": v for k, v in model.encoder.state_dict().items()}
    files["model.safetensors"] = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {
        "epoch": history[-1]["epoch"],
        "valid": best if math.isfinite(best) else None,
        "trained": trained,
        "setting": {**setting, "lr": lr},
        "history": history,
    }
    files["result.json"] = json.dumps(result).encode()
    return files

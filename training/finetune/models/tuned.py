"""Fine-tuning that changes the backbone: LoRA adapters, or every weight.

The head starts from the linear model on frozen embeddings (linear probing first, Kumar et al. 2022, arXiv
2202.10054), then head and backbone train together with AdamW, a warm-up and a cosine; the best epoch by the
validation score is kept. Batches are packed by a token budget in an order that depends on seed and epoch
alone. With several workers Ray Train runs this loop in each, data-parallel: step s of rank r takes batch
s * world + r. Sequences over the model's limit are cut for training, and windowed when measured.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioseq.backbones import lora as adapters
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.packed.weights import build_encoder
from bioseq.backbones.pooling import EmbedOptions
from bioseq.errors import SpecError
from bioseq.heads.head import clean
from bioseq.inference import batching
from bioseq.inference.batching import SPECIAL_TOKENS
from bioseq.progress import Progress
from bioseq.specs.finetune import FinetuneSpec
from training.finetune.embeddings import embed_cached
from training.finetune.fit import Fit, head_settings, n_outputs, say
from training.finetune.metrics import MAIN, main_score
from training.finetune.models.linear import as_probabilities, class_weights, fit_linear, task_loss
from training.tables.labels import Labels

if TYPE_CHECKING:
    from bioseq.inference.predictor import Predictor

NAME = "tuned"
LR = {"lora": 5e-4, "full": 5e-5}
HEAD_LR = 1e-3
PATIENCE = 3
LETTERS = 21


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


def fit_tuned(
    spec: FinetuneSpec, parts: dict[str, Labels], predictor: Predictor, method: str, scratch: Path
) -> Fit:
    """Train, then give the adapter (or the whole trunk), the head's tensors, and the features of all parts as
    the tuned model sees them."""
    from bioseq.inference.predictor import Predictor

    if predictor.config.reads_homologs:
        raise SpecError(
            f"{method} does not train a backbone that reads homologs ({predictor.name}).",
            field="method",
            hint="Choose method 'frozen', whose features are made with homologs.",
        )
    labels = parts["train"]
    residue = labels.task == "per_residue"
    encoder = build_encoder(predictor.config, predictor.encoder.state_dict())
    offset, scale, start = _start(spec, parts, predictor, n_outputs(labels))
    task: dict[str, Any] = {
        "spec": spec.to_dict(),
        "method": method,
        "config": encoder.config.to_dict(),
        "weights": {k: v.cpu() for k, v in encoder.state_dict().items()},
        "alphabet": predictor.alphabet.name,
        "task": labels.task,
        "classes": n_outputs(labels),
        "offset": offset,
        "scale": scale,
        "start": start,
        "out": str(scratch / "tuned"),
        "device": predictor.device.type,
        "positive": np.ones(1) if residue else class_weights(labels.task, labels.y, n_outputs(labels), spec.class_weights),
        "parts": {
            name: {"ids": _ids(predictor, some), "y": some.residues if residue else some.y, "weight": some.weights}
            for name, some in parts.items()
            if name != "test"
        },
    }  # fmt: skip
    Path(task["out"]).mkdir()
    if spec.workers > 1:
        _with_ray(task, spec, scratch)
    else:
        tune(task)
    result = json.loads((scratch / "tuned" / "result.json").read_text())
    say(f"best epoch {result['epoch']}: {MAIN[labels.task]} {result['valid']:.4f} on validation")
    from safetensors.torch import load_file

    saved = load_file(scratch / "tuned" / "model.safetensors")
    adapter_folder, architecture, tensors = None, {}, {}
    if method == "lora":
        adapter_folder = scratch / "tuned" / "adapter"
        adapters.merge(encoder, adapters.load_adapter(encoder, adapter_folder))
    else:
        own = {k.removeprefix("trunk."): v for k, v in saved.items() if k.startswith("trunk.")}
        encoder.load_state_dict(own)
        architecture, tensors = encoder.config.to_dict(), {f"trunk.{k}": v for k, v in own.items()}
    tuned = Predictor(
        encoder, name=NAME, alphabet=predictor.alphabet, dtype=predictor.dtype, device=str(predictor.device)
    )
    ask = EmbedOptions(per_residue=residue)
    features: dict[str, Any] = {}
    for part, some in parts.items():
        rows, _ = embed_cached(tuned, some.sequences, ask=ask, label=f"tuned embeddings of the {part} rows")
        features[part] = rows if residue else np.stack(rows)
    width = encoder.config.d_model + (LETTERS if residue else 0)
    weight, bias = saved["head.weight"], saved["head.bias"]
    tensors |= {"features.mean": torch.zeros(width), "features.scale": torch.ones(width)}
    if residue:
        letters = torch.zeros(len(weight), LETTERS)
        tensors |= {
            "conv.0.weight": torch.cat([weight, letters], 1)[:, :, None].contiguous(),
            "conv.0.bias": bias,
        }
    else:
        tensors |= {"layers.0.weight": weight.T[None].contiguous(), "layers.0.bias": bias[None, None]}
    if labels.task == "regression":
        tensors["target.offset"] = torch.from_numpy(offset).float()
        tensors["target.scale"] = torch.from_numpy(scale).float()
    chosen = {"model": method, **result["setting"], "epochs": result["epoch"], "valid": result["valid"]}
    return Fit(
        settings=head_settings(parts, method, ("embedding",), None),
        tensors=tensors,
        features=features,
        chosen=chosen,
        tried=result["history"],
        adapter=adapter_folder,
        architecture=architecture,
        cost={"trained_parameters": result["trained"], "workers": spec.workers},
    )


def _ids(predictor: Predictor, labels: Labels) -> list[np.ndarray]:
    return [predictor.alphabet.encode(clean(s)).ids[: predictor.max_residues] for s in labels.sequences]


def _start(
    spec: FinetuneSpec, parts: dict[str, Labels], predictor: Predictor, classes: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """(target offset, target scale, linear head on frozen embeddings or None)."""
    labels = parts["train"]
    t = labels.y.shape[1]
    if labels.task == "per_residue":
        return np.zeros(1), np.ones(1), None
    offset, scale = np.zeros(t), np.ones(t)
    if labels.task == "regression":
        offset, scale = np.nanmean(labels.y, 0), np.maximum(np.nanstd(labels.y, 0), 1e-12)
    x = {
        p: np.stack(
            embed_cached(predictor, parts[p].sequences, cache=spec.cache, label=f"embedding the {p} rows")[0]
        )
        for p in ("train", "valid")
    }
    y = {p: (parts[p].y - offset) / scale for p in x}
    _, _, (standard, layers) = fit_linear(
        labels.task,
        x["train"],
        y["train"],
        labels.weights,
        x["valid"],
        y["valid"],
        [x["train"].shape[1]],
        classes,
    )
    weight = standard.scale[:, None] * layers[0][0][0].numpy()
    return offset, scale, (weight, layers[0][1][0, 0].numpy() - standard.mean @ weight)


def _with_ray(task: dict[str, Any], spec: FinetuneSpec, scratch: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from training.ray_session import ray_session

    with ray_session(spec.address, max(4, spec.workers + 2), log_to_driver=False):
        TorchTrainer(
            _ray_loop,
            train_loop_config=task,
            scaling_config=ScalingConfig(
                num_workers=spec.workers, use_gpu=task["device"] == "cuda", resources_per_worker={"CPU": 1}
            ),
            run_config=RunConfig(name="finetune", storage_path=str(scratch / "ray")),
        ).fit()


def _ray_loop(task: dict[str, Any]) -> None:
    import ray.train

    context = ray.train.get_context()
    tune(task, rank=context.get_world_rank(), world=context.get_world_size())


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


def tune(task: dict[str, Any], *, rank: int = 0, world: int = 1) -> None:
    """The loop of one worker. Rank 0 measures, says when to stop, and writes the best state."""
    spec = FinetuneSpec.from_dict(task["spec"])
    device = (
        torch.device("cuda", torch.cuda.current_device()) if task["device"] == "cuda" else torch.device("cpu")
    )
    torch.manual_seed(spec.seed)
    encoder = PackedEncoder(ModelConfig.from_dict(task["config"]), lm_head="lm_head.bias" in task["weights"])
    encoder.load_state_dict(task["weights"])
    adapter = None
    if task["method"] == "lora":
        encoder.requires_grad_(False)
        lora = spec.lora
        shape = adapters.LoraShape(
            lora.rank, float(lora.alpha), adapters.exact_targets(lora.targets), lora.dropout
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
    best, waited, history = -math.inf, 0, []
    with Progress(total, "fine-tuning", unit="steps", enabled=rank == 0) as bar:
        for epoch, plan in enumerate(per_epoch):
            runner.train()
            for rows in plan:
                loss = _loss(task, runner, data, rows, device)
                optimiser.zero_grad()
                loss.backward()
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
                    _save(task, model, history, best, lr, spec)
                else:
                    waited += 1
                stop += waited >= PATIENCE
            if world > 1:
                torch.distributed.broadcast(stop, 0)
            if stop.item():
                break
    if rank == 0:
        file = Path(task["out"]) / "result.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "history": history}))


def _forward(runner: nn.Module, ids: list[np.ndarray], device: torch.device) -> Tensor:
    batch = batching.pack(ids, np.arange(len(ids)), cls_id=0, eos_id=2)
    cast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with cast:
        return runner(
            torch.from_numpy(batch.tokens).to(device),
            torch.from_numpy(batch.cu_seqlens).to(device),
            batch.max_seqlen,
        ).float()


def _loss(
    task: dict[str, Any], runner: nn.Module, data: dict[str, Any], rows: np.ndarray, device: torch.device
) -> Tensor:
    out = _forward(runner, [data["ids"][i] for i in rows], device)
    weight = torch.from_numpy(data["weight"][rows]).float().to(device)
    if task["task"] == "per_residue":
        states = [data["y"][i][: len(data["ids"][i])] for i in rows]
        target = torch.from_numpy(np.concatenate(states)).to(device)
        each = F.cross_entropy(out, target, ignore_index=-1, reduction="none")
        by_residue = torch.repeat_interleave(weight, torch.tensor([len(s) for s in states], device=device))
        by_residue = by_residue * (target >= 0)
        return (each * by_residue).sum() / by_residue.sum().clamp_min(1e-9)
    y = (data["y"][rows] - task["offset"]) / task["scale"]
    positive = torch.from_numpy(task["positive"]).float().to(device)
    return task_loss(task["task"], out, torch.from_numpy(y).float().to(device), weight, positive)


@torch.no_grad()
def _valid_score(task: dict[str, Any], model: Tuned, spec: FinetuneSpec, device: torch.device) -> float:
    model.eval()
    data = task["parts"]["valid"]
    residue = task["task"] == "per_residue"
    outs: list[Any] = [None] * len(data["ids"])
    lengths = np.array([len(i) + SPECIAL_TOKENS for i in data["ids"]])
    for rows in batching.plan(lengths, max(spec.batch_tokens, int(lengths.max()))):
        out = _forward(model, [data["ids"][i] for i in rows], device).cpu().numpy()
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


def _save(
    task: dict[str, Any],
    model: Tuned,
    history: list[dict[str, Any]],
    best: float,
    lr: float,
    spec: FinetuneSpec,
) -> None:
    from safetensors.torch import save_file

    out = Path(task["out"])
    tensors = {"head.weight": model.head.weight, "head.bias": model.head.bias}
    if model.adapter is not None:
        adapters.save_adapter(model.adapter, out / "adapter")
        setting: dict[str, Any] = {
            "rank": spec.lora.rank,
            "alpha": spec.lora.alpha,
            "targets": list(spec.lora.targets),
        }
    else:
        tensors |= {f"trunk.{k}": v for k, v in model.encoder.state_dict().items()}
        setting = {}
    save_file(
        {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, out / "model.safetensors"
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {"epoch": history[-1]["epoch"], "valid": best, "trained": trained}
    (out / "result.json").write_text(
        json.dumps({**result, "setting": {**setting, "lr": lr}, "history": history})
    )

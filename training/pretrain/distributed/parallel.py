"""The model as the loop trains it: loss in forward, wrapped for one process, DDP or FSDP2; and its state as
plain, whole tensors, so that a checkpoint does not depend on how it was trained.

Unverified here: FSDP2 and torch.compile on several GPUs (see docs/pretraining.md).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.errors import CheckpointError
from bioseq.specs.pretrain import OptimiserSpec, PretrainSpec
from training.pretrain.batches import Micro
from training.pretrain.distributed.team import Team
from training.pretrain.muon import Muon


class MaskedLM(nn.Module):
    """Sum of the cross-entropies at the masked places (nats). The LM head runs there only."""

    def __init__(self, encoder: PackedEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        places: Tensor,
        targets: Tensor,
        evidence: Tensor | None = None,
    ) -> Tensor:
        hidden_KD = self.encoder(tokens, cu_seqlens, max_seqlen, evidence_TE=evidence, rows_K=places)
        logits_KV = self.encoder.logits(hidden_KD, None if evidence is None else evidence[places])
        # Without targets the sum is 0, but still a function of every parameter, as collectives need.
        return F.cross_entropy(logits_KV.float(), targets, reduction="sum")


class Trainee:
    """A model under training and its optimiser."""

    def __init__(self, encoder: PackedEncoder, spec: PretrainSpec, team: Team):
        self.encoder, self.spec, self.team = encoder.to(team.device).train(), spec, team
        encoder.checkpointing = spec.activation_checkpointing
        if spec.frozen:
            for name, p in encoder.named_parameters():
                p.requires_grad_(name.startswith(("evidence.", "gate.")))
        self.half = spec.precision == "bfloat16"
        self.names = dict(encoder.named_parameters())
        if spec.compile:
            for layer in encoder.layers:
                layer.compile(dynamic=True)
        self.model: nn.Module = MaskedLM(encoder)
        if team.world > 1 and spec.workers.parallel == "fsdp":
            self._shard()
        elif team.world > 1:
            ids = [team.device.index] if team.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        self.optimizers = optimisers(self.encoder, spec.optimiser)

    def _shard(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in self.encoder.layers:
            fully_shard(layer)
        # `logits` is called after `forward`: the root's own parameters (embedding, LM head) stay whole.
        fully_shard(self.encoder, reshard_after_forward=False)
        self.names = dict(self.encoder.named_parameters())

    def loss(self, micro: Micro) -> Tensor:
        micro = micro.to(self.team.device)
        with torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.half):
            return self.model(
                micro.tokens, micro.cu_seqlens, micro.max_seqlen, micro.places, micro.targets, micro.evidence
            )

    def backward(self, micro: Micro, scale: float, *, last: bool) -> Tensor:
        """Add the gradient of `scale` times the loss; reduced over the workers at the `last` micro-batch.
        Returns this worker's loss sum, still on the device: reading it would wait for the device."""
        with contextlib.ExitStack() as stack:
            if not last and isinstance(self.model, nn.parallel.DistributedDataParallel):
                stack.enter_context(self.model.no_sync())
            elif self.team.world > 1 and self.spec.workers.parallel == "fsdp":
                self.encoder.set_requires_gradient_sync(last)  # type: ignore[operator]
            loss = self.loss(micro)
            # DDP and FSDP2 average over workers; the loss is a sum divided by a global count.
            (loss * (scale * self.team.world)).backward()
        return loss.detach()

    def step(self, lr: float) -> float:
        """Clip, update, clear. Returns the gradient's norm before clipping."""
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = lr
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.encoder.parameters() if p.grad is not None]
        )
        value = float(_whole(norm))
        if math.isfinite(value):
            if value > self.spec.optimiser.clip:  # else the gradients are as they are, and a pass is spared
                torch.nn.utils.clip_grads_with_norm_(
                    self.encoder.parameters(), self.spec.optimiser.clip, norm
                )
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return value

    def model_tensors(self) -> dict[str, Tensor]:
        """Whole float32 weights on the CPU (a collective under FSDP2)."""
        return {name: _whole(p.detach()).cpu().clone() for name, p in self.names.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {p: name for name, p in self.names.items()}
        return {
            f"{names[p]}|{key}": _whole(value).detach().cpu().clone()
            for optimizer in self.optimizers
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor] | None = None) -> None:
        """Set weights, and the optimiser's state. Raises `CheckpointError` naming the tensor."""
        for name in model.keys() | self.names.keys():
            if name not in model or name not in self.names:
                what = (
                    "is missing in" if name not in model else "is not known to this architecture, but is in"
                )
                raise CheckpointError(f"tensor {name} {what} the checkpoint.")
            if model[name].shape != self.names[name].shape:
                raise CheckpointError(
                    f"tensor {name} has shape {tuple(model[name].shape)} in the checkpoint; "
                    f"{tuple(self.names[name].shape)} is needed.",
                    hint="It is of another architecture.",
                )
        with torch.no_grad():
            for name, p in self.names.items():
                p.copy_(_like(model[name], p))
        if optimizer is None:
            return
        names = {p: name for name, p in self.names.items()}
        for owner in self.optimizers:
            for p in (p for group in owner.param_groups for p in group["params"]):
                state: dict[str, Any] = {}
                for key in _STATE[type(owner)]:
                    value = optimizer.get(f"{names[p]}|{key}")
                    if value is None:
                        raise CheckpointError(
                            f"tensor {names[p]}|{key} is missing in the checkpoint's optimiser."
                        )
                    state[key] = value.to(p.device) if key == "step" else _like(value, p).clone()
                owner.state[p] = state


_STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


def optimisers(encoder: PackedEncoder, how: OptimiserSpec) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices of the layers and AdamW for the rest (embedding, LM
    head, vectors), with one learning rate."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    if how.kind == "adamw":
        return [adamw(trained, how)]
    linear = {id(m.weight) for m in encoder.layers.modules() if isinstance(m, nn.Linear)}
    inner = [p for p in trained if id(p) in linear]
    return [
        Muon(inner, lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay),
        adamw([p for p in trained if id(p) not in linear], how),
    ]


def adamw(parameters: list[nn.Parameter], how: OptimiserSpec) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (biases, layer norms) do not."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": how.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=how.lr,
        betas=(how.beta1, how.beta2),
        eps=how.eps,
        fused=True,
    )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    if hasattr(parameter, "device_mesh") and hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if in_group():
        dist.destroy_process_group()

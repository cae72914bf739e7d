"""The processes of a run: one, or several that add up sums. Works under torchrun, Ray Train or neither."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from bioseq.errors import ResourceError


@dataclass(frozen=True)
class Team:
    """`rank` of `world` processes and this one's device."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def hardware(self) -> str:
        """What the processes compute on, for the card."""
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        threads = torch.get_num_threads()
        return f"CPU ({platform.machine()}), {self.world} process(es) of {threads} thread(s)"

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64 (float32 on devices that have no other)."""
        if self.world == 1:
            return list(values)
        kind = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        total = torch.tensor(values, dtype=kind, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


SINGLE = Team()


def device_of(gpus: bool, local_rank: int = 0) -> torch.device:
    """The process's device. Raises `ResourceError` if a GPU was asked for and there is none for it."""
    if not gpus:
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= found:
        raise ResourceError(
            f"workers.gpus: {local_rank + 1} GPU(s) are needed on this machine, {found} found.",
            hint="Ask for fewer workers, or set workers.gpus=false.",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def join(gpus: bool, count: int) -> Team:
    """The team of this process. Under torchrun (RANK and WORLD_SIZE are set) it joins the process group;
    otherwise it is the only one. Raises `ResourceError` if another number than `count` is running."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and world != count:
        raise ResourceError(
            f"workers.count: {count} processes were asked for, {world} are running.",
            hint=f"Start it with torchrun --nproc-per-node {count}, or use --engine ray.",
        )
    device = device_of(gpus, int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1:
        return Team(device=device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(dist.get_rank(), world, device)

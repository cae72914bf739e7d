"""The tensors of a checkpoint folder: safetensors, one file or shards with an index. Pickles are never opened."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from bioseq.backbones.checkpoints.reading import parse_json, read_text
from bioseq.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}.",
            hint="config.json and the tensors do not belong together.",
        )
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"tensor {name} is {tensor.dtype}; float32, float16 and bfloat16 are read.")
    return tensor


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors in their stored dtype. Raises `CheckpointError`."""
    if (path / WEIGHTS).is_file():
        return _load(path / WEIGHTS)
    if not (path / INDEX).is_file():
        pickled = sorted(
            p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        )
        if pickled:
            raise CheckpointError(
                f"{path} has no {WEIGHTS}; {pickled[0]} is a pickle, which can run code and is never opened.",
                hint="Convert it where you trust it: EsmForMaskedLM.from_pretrained(DIR).save_pretrained(NEW).",
            )
        raise CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}.")
    weight_map = parse_json(read_text(path / INDEX), path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map.")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX} names {shard!r}; a shard is a .safetensors file beside it.")
        if not (path / shard).is_file():
            raise CheckpointError(f"{path}: shard {shard} is missing.", hint="Copy the folder whole.")
        for name, tensor in _load(path / shard).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name} lies in two shards.")
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{path}: tensor {name} lies in {shard}, but {INDEX} lists it elsewhere."
                )
            tensors[name] = tensor
    for name in sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(f"{path}: missing tensor: {name} ({INDEX} lists it in {weight_map[name]}).")
    return tensors


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(
            file, framework="pt"
        ):  # the header first: a truncated file is refused before it is mapped
            pass
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {file}: {error}.", hint="The file may be cut short: copy it again."
        ) from error

"""Tensors on disk -> a packed encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.errors import ArtefactError, CheckpointError


def build_encoder(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    error: type[ArtefactError] = CheckpointError,
) -> PackedEncoder:
    """An encoder in evaluation mode with these tensors, cast to `dtype`; with an LM head if they hold one.

    Raises `error` naming the tensor that is missing, unknown or of another shape.
    """
    # on "meta" nothing is allocated and no random number drawn for weights that are replaced at once
    with torch.device("meta"):
        encoder = PackedEncoder(config, lm_head="lm_head.bias" in tensors)
    assert not list(encoder.buffers()), "a buffer would stay on meta"
    wanted = {name: tuple(t.shape) for name, t in encoder.state_dict().items()}
    for name in sorted(wanted.keys() - tensors.keys()):
        raise error(f"missing tensor: {name}.")
    for name in sorted(tensors.keys() - wanted.keys()):
        raise error(f"unknown tensor: {name}.")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise error(f"tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}.")
    # a copy each: file-backed memory is neither aligned nor safe from a change of the file
    state = {name: tensors[name].to(device=device, dtype=dtype, copy=True) for name in wanted}
    encoder.load_state_dict(state, assign=True)
    return encoder.requires_grad_(True).eval()


def hash_weights(config: Any, tensors: Mapping[str, torch.Tensor], *, reference: str | None = None) -> str:
    """ "sha256:..." over what decides the encoder's results: the architecture without its name, and every
    tensor's name, dtype, shape and bytes. Heads name their backbone by it.

    Settings that have their default value are left out, so a setting that is added later leaves the hashes of
    older weights as they are. `reference` is the hash of the reference set of a backbone that reads homologs.
    """
    changed = {
        f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default
    }
    del changed["name"]
    digest = hashlib.sha256(repr(sorted(changed.items())).encode())
    if reference is not None:
        digest.update(f"\nreference {reference}".encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"

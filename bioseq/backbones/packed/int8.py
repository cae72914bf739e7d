"""Linear layers in int8 on a CPU: weights by channel, activations by token.

y[t, o] = s[t] w[o] sum_i q[t, i] W[o, i] + b[o], where a row of activations is q s rounded to [-127, 127] with
s = max |x| / 127 of that row, and a row of weights likewise (Jacob et al. 2018, arXiv 1712.05877, symmetric; scales
by token as in LLM.int8, Dettmers et al. 2022, arXiv 2208.07339). Sums are exact in int32, and a token's scale is its
own, so a result does not depend on batch-mates. Attention, norms, embedding and the LM head stay in bfloat16.

Legend: T tokens of the pack, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.protocol import Backbone
from bioseq.errors import ResourceError, SpecError

_ROWS = 64  # at a time, so that float32 copies stay in the cache
_LEAST = 1e-12


class Int8Linear(nn.Module):
    """`linear` with its weights rounded to 255 steps a row."""

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_OI = linear.weight.detach().float()
        scale_O = weight_OI.abs().amax(1).clamp_min(_LEAST) / 127
        self.register_buffer("weight", (weight_OI / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale_O)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        steps_TI = torch.empty(x_TI.shape, dtype=torch.int8)
        scale_T1 = torch.empty(len(x_TI), 1)
        for at in range(0, len(x_TI), _ROWS):
            rows = x_TI[at : at + _ROWS]
            s = rows.abs().amax(1, keepdim=True).float().clamp_min_(_LEAST).div_(127)
            steps_TI[at : at + _ROWS] = (rows / s).round_()
            scale_T1[at : at + _ROWS] = s
        sums_TO = torch._int_mm(steps_TI, self.weight.t())
        out_TO = torch.empty(len(x_TI), self.out_features, dtype=x_TI.dtype)
        for at in range(0, len(x_TI), _ROWS):
            rows = sums_TO[at : at + _ROWS] * scale_T1[at : at + _ROWS]
            rows = rows.mul_(self.scale)
            out_TO[at : at + _ROWS] = rows if self.bias is None else rows.add_(self.bias)
        return out_TO


def supported() -> str | None:
    """Why int8 is not to be had on this machine, or None."""
    if not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()):
        return "this processor has neither AVX512_VNNI nor AMX"
    return None


def to_int8(encoder: Backbone, device: torch.device) -> PackedEncoder:
    """The encoder, in place, with the linear layers of its blocks in int8 and the rest in bfloat16; for inference.
    Raises `SpecError` for a device that is no CPU, `ResourceError` where the processor has no instructions for it."""
    if not isinstance(encoder, PackedEncoder):
        raise SpecError(f"{encoder.config.name} runs through transformers, without int8.", field="dtype")
    if device.type != "cpu":
        raise SpecError("int8 is for CPUs.", field="dtype", hint="Use bfloat16 on a GPU.")
    if (why := supported()) is not None:
        raise ResourceError(f"int8 is not possible: {why}.", hint="Use dtype bfloat16 or float32.")
    made = [
        (layer, name, Int8Linear(linear))
        for layer in encoder.layers
        for name in ("qkv", "out", "up", "down")
        if isinstance(linear := getattr(layer, name), nn.Linear)
    ]
    if made:
        encoder.to(torch.bfloat16)  # before they are put in: their scales stay float32
    for layer, name, linear in made:
        setattr(layer, name, linear)
    return encoder

"""LoRA on the packed encoder (Hu et al. 2021, arXiv 2106.09685), routed per token segment.

An adapter adds scale * B A x to some linear layers. In a packed batch the segments may belong to different
adapters: for each layer the rows of one adapter are gathered, its delta computed on them alone, and added,
so that no sequence sees another's adapter. The encoder's query, key and value are one fused matrix; their
deltas act on its slices. Layers are changed by forward hooks: nothing attached, nothing done; and the
encoder's own parameters and names stay as they are.

On disk an adapter is peft's: adapter_config.json and adapter_model.safetensors with the module names of the family's
own code (transformers' `EsmModel` and `EsmcModel`, AMPLIFY's), so `peft.PeftModel.from_pretrained(EsmModel, folder)`
loads it as it is. What this
encoder cannot do alike (DoRA, biases, modules to save, patterns) is refused, and so are missing and spare
tensors.

Legend: T tokens of the pack, r rank.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.protocol import Backbone
from bioseq.errors import BundleError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_Modules = dict[str, tuple[str, int | None]]
# family -> (peft's name of the list of layers, module in a layer -> (our linear layer, which part of its output or None))
MODULES: dict[str, tuple[str, _Modules]] = {
    "esm": (
        "encoder.layer",
        {
            "attention.self.query": ("qkv", 0),
            "attention.self.key": ("qkv", 1),
            "attention.self.value": ("qkv", 2),
            "attention.output.dense": ("out", None),
            "intermediate.dense": ("up", None),
            "output.dense": ("down", None),
        },
    ),
    "esmc": (
        "layers",
        {
            "self_attn.q_proj": ("qkv", 0),
            "self_attn.k_proj": ("qkv", 1),
            "self_attn.v_proj": ("qkv", 2),
            "self_attn.o_proj": ("out", None),
            "mlp.gate_proj": ("up", 0),
            "mlp.up_proj": ("up", 1),
            "mlp.down_proj": ("down", None),
        },
    ),
    "amplify": (
        "transformer_encoder",
        {
            "q": ("qkv", 0),
            "k": ("qkv", 1),
            "v": ("qkv", 2),
            "wo": ("out", None),
            "ffn.w12": ("up", None),
            "ffn.w3": ("down", None),
        },
    ),
}
_PARTS = {"qkv": 3, "up": 2}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # settings of peft that must be off: they would change the numbers
    "use_dora": (False, None),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "exclude_modules": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
}


@dataclass(frozen=True)
class LoraShape:
    """Rank, alpha, and peft's module names (a list of suffixes, or one regular expression)."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def hits(self, full: str) -> bool:
        """Does peft's rule choose the module of this name? A list chooses by whole name or dotted ending."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, full) is not None
        return any(full == t or full.endswith("." + t) for t in self.targets)


def exact_targets(names: Sequence[str], family: str = "esm") -> tuple[str, ...] | str:
    """peft's `target_modules` for modules named as in ESM-2, such as `query` or `output.dense`, in the names of the
    family. A list, or, where an ending would choose too much (`output.dense` is also the ending of
    `attention.output.dense`), an expression."""
    if family != "esm":
        chosen = {MODULES["esm"][1].get(n) or MODULES["esm"][1][f"attention.self.{n}"] for n in names}
        whole = {linear for linear, part in chosen if part is None}
        return tuple(m for m, place in MODULES[family][1].items() if place in chosen or place[0] in whole)
    if "output.dense" in names and "attention.output.dense" not in names:
        others = "|".join(re.escape(n) for n in sorted(names) if n != "output.dense")
        own = r".*layer\.\d+\.output\.dense"
        return rf"(?:{own}|.*\.(?:{others}))" if others else own
    return tuple(names)


class LoraAdapter(nn.Module):
    """The A and B of one adapter, float32, by `layer.module` with dots as `/`. B starts at zero: no effect."""

    def __init__(self, encoder: PackedEncoder, shape: LoraShape, *, generator: torch.Generator | None = None):
        super().__init__()
        self.shape = shape
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self.places: dict[str, tuple[int, str, int | None]] = {}
        self.stem, modules = MODULES[encoder.config.family]
        for i, layer in enumerate(encoder.layers):
            for module, (ours, third) in modules.items():
                if not shape.hits(f"{self.stem}.{i}.{module}"):
                    continue
                linear: nn.Linear = getattr(layer, ours)
                width = linear.out_features // (1 if third is None else _PARTS[ours])
                key = f"{i}/{module.replace('.', '/')}"
                # Kaiming uniform with a = sqrt(5), as peft does
                bound = linear.in_features**-0.5
                start = torch.rand(shape.rank, linear.in_features, generator=generator) * 2 - 1
                self.a[key] = nn.Parameter(start * bound)
                self.b[key] = nn.Parameter(torch.zeros(width, shape.rank))
                self.places[key] = (i, ours, third)
        if not self.places:
            raise BundleError(f"target_modules {shape.targets!r} name no module of the encoder.")

    def peft_name(self, key: str) -> str:
        return f"{_PREFIX}{self.stem}.{key.replace('/', '.')}"

    def by_linear(self) -> dict[tuple[int, str], list[tuple[str, int | None]]]:
        """(layer, our linear) -> [(key, third)]."""
        out: dict[tuple[int, str], list[tuple[str, int | None]]] = {}
        for key, (layer, ours, third) in self.places.items():
            out.setdefault((layer, ours), []).append((key, third))
        return out

    def delta(self, keys: list[tuple[str, int | None]], x: Tensor, out: Tensor) -> Tensor:
        """`out` [.., n] with this adapter's deltas for inputs x [.., in] added; float32 inside."""
        p = self.shape.dropout if self.training else 0.0
        out = out.clone()
        for key, third in keys:
            fed = nn.functional.dropout(x.float(), p) if p else x.float()
            part = (fed @ self.a[key].T @ self.b[key].T) * self.shape.scale
            n = part.shape[-1]
            at = 0 if third is None else third * n
            out[..., at : at + n] = out[..., at : at + n] + part.to(out.dtype)
        return out


# ------------------------------------------------------------------------------------------------ on disk


def save_adapter(adapter: LoraAdapter, folder: str | Path, *, base: str | None = None) -> Path:
    """Write peft's two files into `folder`. Returns it."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = adapter.shape
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": shape.dropout,
        "target_modules": shape.targets if isinstance(shape.targets, str) else sorted(shape.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": shape.rslora,
        "use_dora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    tensors = {}
    for key in adapter.places:
        name = adapter.peft_name(key)
        tensors[f"{name}.lora_A.weight"] = adapter.a[key].detach().float().cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = adapter.b[key].detach().float().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def load_adapter(encoder: PackedEncoder, folder: str | Path) -> LoraAdapter:
    """Read a peft adapter for this encoder. Raises `BundleError` naming what is unsupported, missing, spare or
    of another shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise BundleError(f"cannot read the adapter in {folder}: {error}.") from None
    if str(config.get("peft_type")).upper() != "LORA":
        raise BundleError(f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA is served.")
    for key, fine in _NEUTRAL.items():
        if key in config and config[key] not in fine:
            raise BundleError(f"{folder}: {key} = {config[key]!r} is not served; {fine[0]!r} is.")
    layers = config.get("layers_to_transform")
    targets = config.get("target_modules")
    shape = LoraShape(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        targets=targets if isinstance(targets, str) else tuple(targets or ()),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
    )
    adapter = LoraAdapter(encoder, shape)
    if layers is not None:
        chosen = {layers} if isinstance(layers, int) else set(layers)
        for key in [k for k, (i, _, _) in adapter.places.items() if i not in chosen]:
            del adapter.places[key], adapter.a[key], adapter.b[key]
    wanted: dict[str, nn.Parameter] = {}
    for key in adapter.places:
        name = adapter.peft_name(key)
        wanted[f"{name}.lora_A.weight"] = adapter.a[key]
        wanted[f"{name}.lora_B.weight"] = adapter.b[key]
    for problem, names in (
        ("missing", wanted.keys() - tensors.keys()),
        ("unknown", tensors.keys() - wanted.keys()),
    ):
        if names:
            raise BundleError(f"{folder / WEIGHTS}: {problem} tensor: {min(names)} ({len(names)} in all).")
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise BundleError(
                f"{folder / WEIGHTS}: {name} has shape {tuple(tensors[name].shape)}, "
                f"expected {tuple(parameter.shape)}."
            )
        parameter.data = tensors[name].float()
    return adapter.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- attaching


def taking(backbone: Backbone) -> PackedEncoder:
    """The backbone, if it takes adapters. Raises `BundleError`."""
    if not isinstance(backbone, PackedEncoder):
        raise BundleError(f"{backbone.config.name} runs through transformers, and takes no LoRA adapters.")
    return backbone


class _Attached:
    """The adapters of one encoder, its hooks, and which rows of the running batch belong to whom."""

    def __init__(self) -> None:
        self.adapters: dict[str, LoraAdapter] = {}
        self.keys: dict[str, dict[tuple[int, str], list[tuple[str, int | None]]]] = {}
        self.hooks: list[Any] = []
        # By thread, as the predictor runs several batches at a time. Rows None: every row.
        self.routes: dict[int, list[tuple[str, Tensor | None]]] = {}
        self.always: list[tuple[str, Tensor | None]] = []  # where a thread has no routes of its own

    def hook(self, place: tuple[int, str]) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            for name, rows in self.routes.get(threading.get_ident(), self.always):
                keys = self.keys[name].get(place)
                if keys is None:
                    continue
                if rows is None:
                    out = self.adapters[name].delta(keys, inputs[0], out)
                else:
                    changed = self.adapters[name].delta(keys, inputs[0][rows], out[rows])
                    out = out.index_copy(0, rows, changed)
            return out

        return add

    def renew(self, encoder: PackedEncoder) -> None:
        for handle in self.hooks:
            handle.remove()
        places = sorted({place for keys in self.keys.values() for place in keys})
        self.hooks = [
            getattr(encoder.layers[i], ours).register_forward_hook(self.hook((i, ours))) for i, ours in places
        ]


def _state(encoder: PackedEncoder) -> _Attached:
    state = encoder.__dict__.get("_adapters")
    if state is None:
        state = encoder.__dict__["_adapters"] = _Attached()
    return state


def attach(encoder: PackedEncoder, name: str, adapter: str | Path | LoraAdapter) -> LoraAdapter:
    """Make an adapter (a peft folder, or one in memory) ready to be routed to. It acts only inside `routed`."""
    if not isinstance(adapter, LoraAdapter):
        adapter = load_adapter(encoder, adapter).to(encoder.embed_tokens.weight.device)
    state = _state(encoder)
    state.adapters[name], state.keys[name] = adapter, adapter.by_linear()
    state.renew(encoder)
    return adapter


def detach(encoder: PackedEncoder, name: str) -> None:
    """Forget an adapter; with the last one the encoder's hooks go too. Unknown names raise KeyError."""
    state = _state(encoder)
    del state.adapters[name], state.keys[name]
    state.renew(encoder)


@contextlib.contextmanager
def routed(encoder: PackedEncoder, segments: Sequence[tuple[str | None, int, int]]) -> Iterator[None]:
    """Within, tokens [start, end) of the pack pass through the named adapter; None is the bare trunk. Raises
    KeyError for an adapter that is not attached."""
    state = _state(encoder)
    spans: dict[str, list[tuple[int, int]]] = {}
    for name, start, end in segments:
        if name is not None:
            if name not in state.adapters:
                raise KeyError(f"adapter {name!r} is not attached")
            spans.setdefault(name, []).append((start, end))
    device = encoder.embed_tokens.weight.device
    whole = len(spans) == 1 and all(name is not None for name, _, _ in segments)
    thread = threading.get_ident()
    before = state.routes.get(thread)
    state.routes[thread] = [
        (name, None if whole else torch.cat([torch.arange(a, b) for a, b in parts]).to(device))
        for name, parts in spans.items()
    ]
    try:
        yield
    finally:
        if before is None:
            del state.routes[thread]
        else:
            state.routes[thread] = before


def route_all(encoder: PackedEncoder, name: str | None) -> None:
    """Send every token through one adapter until told otherwise (None: none). For training, where gradient
    checkpointing computes layers again after the forward pass has returned, and on a thread of autograd's."""
    state = _state(encoder)
    if name is not None and name not in state.adapters:
        raise KeyError(f"adapter {name!r} is not attached")
    state.always = [] if name is None else [(name, None)]


def merge(encoder: PackedEncoder, adapter: LoraAdapter) -> None:
    """Add the deltas to the encoder's own weights, in place (for a merged copy; not undone by `detach`)."""
    with torch.no_grad():
        for key, (layer, ours, third) in adapter.places.items():
            weight = getattr(encoder.layers[layer], ours).weight
            delta = (adapter.b[key] @ adapter.a[key]) * adapter.shape.scale
            at = 0 if third is None else third * len(delta)
            weight[at : at + len(delta)] += delta.to(weight)

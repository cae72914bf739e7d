"""AMPLIFY read anew from its published code's equations, in plain torch, one sequence at a time: the independent
reference. (Its own class needs xformers and code from its repository, which no test runs.)"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = ["<pad>", "<unk>", "<mask>", "<bos>", "<eos>", "|", *"LAGVSERTIDPKQNFYMHWC", "B"]
CONFIG = {
    "model_type": "AMPLIFY",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "rms_norm": True,
    "norm_eps": 1e-5,
    "hidden_act": "SwiGLU",
    "layer_norm_after_embedding": False,
    "layer_norm_before_last_layer": True,
    "vocab_size": 27,
    "ffn_bias": False,
    "att_bias": False,
    "pad_token_id": 0,
    "max_length": 2048,
    "auto_map": {"AutoModel": "amplify.AMPLIFY"},
}


def save(folder: Path) -> Path:
    g, d, f = torch.Generator().manual_seed(3), CONFIG["hidden_size"], 72  # 2/3 of 100, up to a multiple of 8
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": torch.randn(27, d, generator=g), "layer_norm_2.weight": torch.ones(d)}
    for i in range(CONFIG["num_hidden_layers"]):
        name = f"transformer_encoder.{i}"
        shapes = {
            "q": (d, d),
            "k": (d, d),
            "v": (d, d),
            "wo": (d, d),
            "ffn.w12": (2 * f, d),
            "ffn.w3": (d, f),
        }
        for key, shape in shapes.items():
            tensors[f"{name}.{key}.weight"] = torch.randn(shape, generator=g) * 0.15
        for key in ("attention_norm", "ffn_norm"):
            tensors[f"{name}.{key}.weight"] = 1 + 0.2 * torch.randn(d, generator=g)
    tensors["decoder.weight"], tensors["decoder.bias"] = (
        torch.randn(27, d, generator=g),
        torch.randn(27, generator=g),
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": ids}}))
    return folder


def rms(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + CONFIG["norm_eps"]) * weight


def turned(x_LHd):
    """Each pair (x[2j], x[2j+1]) as a complex number, times exp(i place 10000^(-2j/d))."""
    length, _, d = x_LHd.shape
    angle = torch.outer(torch.arange(length).double(), 10000.0 ** (-torch.arange(0, d, 2).double() / d))
    pairs = torch.view_as_complex(x_LHd.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2).float()


def compute(folder: Path, tokens: list[str]):
    """(embedding and outputs of each layer, the last after its norm; logits [L, 27])."""
    w = load_file(folder / "model.safetensors")
    x = w["encoder.weight"][[VOCABULARY.index(t) for t in tokens]]
    states, heads = [x], CONFIG["num_attention_heads"]
    for i in range(CONFIG["num_hidden_layers"]):
        p = f"transformer_encoder.{i}."
        a = rms(x, w[p + "attention_norm.weight"])
        q, k, v = ((a @ w[f"{p}{n}.weight"].T).unflatten(-1, (heads, -1)) for n in "qkv")
        q, k = turned(q), turned(k)
        share = torch.softmax(torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5, -1)
        x = x + torch.einsum("hij,jhd->ihd", share, v).flatten(1) @ w[p + "wo.weight"].T
        gate, value = (rms(x, w[p + "ffn_norm.weight"]) @ w[p + "ffn.w12.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * value) @ w[p + "ffn.w3.weight"].T
        states.append(x)
    states[-1] = rms(x, w["layer_norm_2.weight"])
    return states, states[-1] @ w["decoder.weight"].T + w["decoder.bias"]

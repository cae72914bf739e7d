"""Backbones as bundles: an encoder's tensors in, an encoder out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bioseq.backbones.checkpoints.layout import Layout
from bioseq.backbones.families import build
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.packed.weights import hash_weights
from bioseq.backbones.padded.config import PaddedConfig
from bioseq.backbones.protocol import Backbone
from bioseq.backbones.shapes import shape_of
from bioseq.bundles.bundle import Bundle, write_bundle
from bioseq.errors import BundleError, CheckpointError

EXTRA_TENSOR = "hf_extra."  # prefix of a checkpoint's unused tensors inside model.safetensors


def save_backbone(
    path: str | Path,
    encoder: PackedEncoder,
    *,
    name: str,
    card: str,
    evidence: dict[str, Any],
    data_hash: str | None = None,
    seed: int | None = None,
    licence: str = "unknown",
    alphabet: str = "protein",
    hf_extra: tuple[Layout, Mapping[str, torch.Tensor]] | None = None,
    extra: dict[str, Any] | None = None,
    force: bool = False,
) -> Bundle:
    """Write an encoder as a backbone bundle, tensors in their present dtype, the tied embedding once.

    `hf_extra` is an imported checkpoint's `(layout, extras)`, kept for a lossless export; `extra` goes into
    the manifest (see `bioseq.bundles.manifest.Extra`)."""
    return write_backbone(
        path,
        encoder.config.to_dict(),
        encoder.state_dict(),
        hf_extra=hf_extra,
        card=card,
        evidence=evidence,
        force=force,
        fields={
            "name": name,
            "alphabet": alphabet,
            "data_hash": data_hash,
            "seed": seed,
            "licence": licence,
            "extra": dict(extra or {}),
        },
    )


def write_backbone(
    path: str | Path,
    architecture: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    fields: dict[str, Any],
    card: str,
    evidence: dict[str, Any],
    hf_extra: tuple[Layout, Mapping[str, torch.Tensor]] | None = None,
    files: Mapping[str, Path] | None = None,
    force: bool = False,
) -> Bundle:
    """`save_backbone` from tensors with their encoder's names; `fields` are the manifest's others."""
    # torch.compile puts its prefix before every name
    stored = {key.removeprefix("_orig_mod."): value for key, value in tensors.items()}
    config = shape_of(architecture)
    extra = {
        **fields.get("extra", {}),
        "lm_head": _has_lm_head(config, stored),
        "dtype": str(stored[max(stored, key=lambda k: stored[k].numel())].dtype).removeprefix("torch."),
    }
    fields = {
        **fields,
        "kind": "backbone",
        "architecture": architecture,
        "weights_hash": hash_weights(config, stored, reference=_reference(config, extra)),
        "extra": extra,
    }
    with tempfile.TemporaryDirectory() as scratch:
        files = dict(files or {})
        if hf_extra is not None:
            layout, spare = hf_extra
            stored.update({EXTRA_TENSOR + key: value for key, value in spare.items()})
            files["hf/layout.json"] = Path(scratch) / "layout.json"
            files["hf/layout.json"].write_text(
                json.dumps(layout.to_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8"
            )
        return write_bundle(
            path,
            manifest_fields=fields,
            tensors=stored,
            card=card,
            evidence=evidence,
            extra_files=files,
            force=force,
        )


def load_backbone(
    bundle: Bundle, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Backbone:
    """The encoder of a backbone bundle in `dtype` (float32 unless given). Raises `BundleError` naming the
    tensor that is missing, unknown or of another shape."""
    config, tensors = _parts(bundle)
    return build(config, tensors, dtype=dtype or torch.float32, device=device, error=BundleError)


def weights_hash(bundle: Bundle) -> str:
    """The hash of a backbone's weights: the manifest's, or computed for a bundle written before it had one."""
    if bundle.manifest.weights_hash:
        return bundle.manifest.weights_hash
    config, tensors = _parts(bundle)
    return hash_weights(config, tensors, reference=_reference(config, bundle.manifest.extra))


def _has_lm_head(config: ModelConfig | PaddedConfig, tensors: Mapping[str, torch.Tensor]) -> bool:
    if isinstance(config, ModelConfig):
        return "lm_head.bias" in tensors
    from bioseq.backbones.padded.checkpoint import has_lm_head

    return has_lm_head(config, tensors)


def load_packed(
    bundle: Bundle, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PackedEncoder:
    """`load_backbone` where only the packed encoder will do. Raises `BundleError`."""
    encoder = load_backbone(bundle, dtype=dtype, device=device)
    if not isinstance(encoder, PackedEncoder):
        raise BundleError(
            f"{bundle.manifest.name} runs through transformers, and training goes through the packed encoder.",
            hint="docs/backbones.md says what each family can do.",
        )
    return encoder


def _reference(config: ModelConfig | PaddedConfig, extra: Mapping[str, Any]) -> str | None:
    """The hash of the reference set that a backbone reads homologs from; None for one that reads none."""
    if not config.reads_homologs:
        return None
    reference = extra.get("homologs", {}).get("reference")
    if not isinstance(reference, str):
        raise BundleError(
            f"{config.name} reads homologs, but its bundle does not name a reference set.",
            hint="extra.homologs.reference holds the hash of the set that it was trained with.",
        )
    return reference


def _parts(bundle: Bundle) -> tuple[ModelConfig | PaddedConfig, dict[str, torch.Tensor]]:
    if bundle.manifest.kind != "backbone":
        raise BundleError(f"{bundle.path} is a {bundle.manifest.kind}, not a backbone.")
    try:
        config = shape_of(bundle.manifest.architecture)
    except CheckpointError as error:
        raise BundleError(f"{bundle.path}: {error}") from error
    _reference(config, bundle.manifest.extra)
    return config, {k: v for k, v in bundle.read_tensors().items() if not k.startswith(EXTRA_TENSOR)}

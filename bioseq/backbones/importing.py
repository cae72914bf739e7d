"""Hugging Face checkpoint <-> backbone bundle, without loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bioseq.backbones.storage import EXTRA_TENSOR, write_backbone
from bioseq.bundles.bundle import Bundle
from bioseq.bundles.manifest import read_json
from bioseq.errors import BundleError

if TYPE_CHECKING:
    from bioseq.backbones.checkpoints.checkpoint import Checkpoint

_CARD = """# An imported ESM-2 checkpoint

Imported from a Hugging Face ESM-2 checkpoint. bioseq has measured nothing on it: see its source for what it
was trained on and what it may be used for.

| | |
|---|---|
| source | `{source}` |
| licence | {licence} |
| shape | {layers} layers, width {width}, {heads} heads, {parameters:,} parameters |
| stored as | {dtype} |
| language-model head | {lm_head} |
| unused tensors kept for export | {extras} |
"""


def import_checkpoint(
    source: str | Path,
    path: str | Path,
    *,
    name: str,
    licence: str = "unknown",
    card: str | None = None,
    label: str | None = None,
    force: bool = False,
) -> Bundle:
    """Read a Hugging Face ESM-2 folder and write it as a backbone bundle at `path`, in its own dtype. `label` says in
    its manifest and card where it comes from (default: the folder's name).

    Raises `CheckpointError` for anything but an ESM-2 checkpoint, `OutputError` if `path` cannot be written.
    """
    from bioseq.backbones.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(source)
    label = label or Path(source).resolve().name
    return write_backbone(
        path,
        checkpoint.config.to_dict(),
        checkpoint.tensors,
        hf_extra=(checkpoint.layout, checkpoint.extras),
        fields={
            "name": name,
            "alphabet": checkpoint.alphabet,
            "licence": licence,
            "extra": {"source": label},
        },
        card=card if card is not None else _card(checkpoint, label, licence),
        evidence={"imported": True, "measured": {}},
        force=force,
    )


def _card(checkpoint: Checkpoint, source: str, licence: str) -> str:
    config = checkpoint.config
    dtype = str(checkpoint.tensors["embed_tokens.weight"].dtype).removeprefix("torch.")
    return _CARD.format(
        source=source,
        licence=licence,
        layers=config.n_layers,
        width=config.d_model,
        heads=config.n_heads,
        parameters=sum(t.numel() for t in checkpoint.tensors.values()),
        dtype=dtype,
        lm_head="yes" if checkpoint.lm_head else "none: it can embed but not score",
        extras=len(checkpoint.extras),
    )


def export_checkpoint(bundle: Bundle, path: str | Path, *, force: bool = False) -> Path:
    """Write a backbone bundle as a Hugging Face folder. An imported one gives its own config.json and
    byte-equal tensors back. Raises `BundleError` for a head, `CheckpointError` for a backbone that transformers
    cannot compute, `OutputError` if `path` cannot be written."""
    from bioseq.backbones.checkpoints.checkpoint import write_checkpoint
    from bioseq.backbones.checkpoints.layout import Layout
    from bioseq.backbones.packed.config import ModelConfig

    if bundle.manifest.kind != "backbone":
        raise BundleError(
            f"{bundle.manifest.name} is a head; only backbones have a Hugging Face layout.",
            hint="A head's LoRA adapter lies in its bundle under adapter/, in peft's format.",
        )
    stored = bundle.read_tensors()
    extras = {k.removeprefix(EXTRA_TENSOR): v for k, v in stored.items() if k.startswith(EXTRA_TENSOR)}
    tensors = {k: v for k, v in stored.items() if not k.startswith(EXTRA_TENSOR)}
    layout = None
    if "hf/layout.json" in bundle.manifest.files:
        layout = Layout.from_dict(read_json(bundle.file("hf/layout.json")))
    return write_checkpoint(
        path,
        ModelConfig.from_dict(bundle.manifest.architecture),
        tensors,
        alphabet=bundle.manifest.alphabet,
        layout=layout,
        extras=extras,
        force=force,
    )

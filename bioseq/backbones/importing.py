"""Hugging Face checkpoint <-> backbone bundle, without loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.padded.config import PaddedConfig
from bioseq.backbones.protocol import Shape
from bioseq.backbones.shapes import shape_of
from bioseq.backbones.storage import EXTRA_TENSOR, write_backbone
from bioseq.bundles.bundle import Bundle
from bioseq.bundles.manifest import read_json
from bioseq.errors import BundleError
from bioseq.output import atomic_folder

if TYPE_CHECKING:
    from bioseq.backbones.checkpoints.checkpoint import Checkpoint
    from bioseq.backbones.padded.checkpoint import PaddedCheckpoint

TOKENIZER = (
    "vocab.txt",
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_CARD = """# An imported {family} checkpoint

Imported from a Hugging Face checkpoint. bioseq has measured nothing on it: see its source for what it
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
    """Read a Hugging Face folder and write it as a backbone bundle at `path`, in its own dtype. `label` says in
    its manifest and card where it comes from (default: the folder's name).

    Raises `CheckpointError` for a family that bioseq does not know, `OutputError` if `path` cannot be written.
    """
    from bioseq.backbones.families import open_checkpoint

    checkpoint = open_checkpoint(source)
    label = label or Path(source).resolve().name
    # a padded family's own tokenizer is kept for an export; the packed ones' are written anew
    kept = () if isinstance(checkpoint.config, ModelConfig) else TOKENIZER
    return write_backbone(
        path,
        checkpoint.config.to_dict(),
        checkpoint.tensors,
        hf_extra=(checkpoint.layout, checkpoint.extras),
        files={f"hf/{n}": Path(source) / n for n in kept if (Path(source) / n).is_file()},
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


def _card(checkpoint: Checkpoint | PaddedCheckpoint, source: str, licence: str) -> str:
    config = checkpoint.config
    largest = max(checkpoint.tensors.values(), key=lambda t: t.numel())
    dtype = str(largest.dtype).removeprefix("torch.")
    return _CARD.format(
        family=_family(config),
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


def _family(config: Shape) -> str:
    """What people call it."""
    if isinstance(config, ModelConfig):
        learned = config.positions == "learned"
        return {"esm": "ESM-1b" if learned else "ESM-2", "esmc": "ESM-C", "amplify": "AMPLIFY"}[config.family]
    assert isinstance(config, PaddedConfig)
    return {"bert": "BERT", "t5": "T5 encoder", "esm": "Nucleotide Transformer"}[config.family]


def export_checkpoint(bundle: Bundle, path: str | Path, *, force: bool = False) -> Path:
    """Write a backbone bundle as a Hugging Face folder. An imported one gives its own config.json and
    byte-equal tensors back. Raises `BundleError` for a head, `CheckpointError` for a backbone that transformers
    cannot compute, `OutputError` if `path` cannot be written."""
    from bioseq.backbones.checkpoints.checkpoint import write_checkpoint
    from bioseq.backbones.checkpoints.layout import Layout

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
    config = shape_of(bundle.manifest.architecture)
    if not isinstance(config, ModelConfig):
        from safetensors.torch import save_file

        assert layout is not None
        with atomic_folder(Path(path), force=force) as folder:
            (folder / "config.json").write_text(layout.config, "utf-8")
            save_file(tensors | extras, folder / "model.safetensors", metadata={"format": "pt"})
            for name in TOKENIZER:
                if f"hf/{name}" in bundle.manifest.files:
                    (folder / name).write_bytes(bundle.file(f"hf/{name}").read_bytes())
        return Path(path)
    return write_checkpoint(
        path,
        config,
        tensors,
        alphabet=bundle.manifest.alphabet,
        layout=layout,
        extras=extras,
        force=force,
    )

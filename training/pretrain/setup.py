"""What a run begins with: the model's shape and first weights, and the checks of the spec against corpus and
checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bioseq.backbones.checkpoints.checkpoint import load_checkpoint
from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import load_packed
from bioseq.bundles.bundle import is_checkpoint
from bioseq.bundles.registry import Registry
from bioseq.errors import CheckpointError, SpecError
from bioseq.sequences.alphabet import by_name
from bioseq.specs.pretrain import PINNED, PretrainSpec
from training.corpus.corpus import Corpus
from training.corpus.homologs import SET_SEED
from training.pretrain.batches import Batches
from training.pretrain.schedule import factor


def model_config(spec: PretrainSpec) -> ModelConfig:
    m, a = spec.model, by_name(spec.alphabet)
    return ModelConfig(
        name=spec.name,
        n_layers=m.n_layers,
        d_model=m.d_model,
        n_heads=m.n_heads,
        d_ff=m.d_ff,
        vocab_size=len(a),
        cls_id=a.cls_id,
        pad_id=a.pad_id,
        eos_id=a.eos_id,
        mask_id=a.mask_id,
        token_dropout=m.token_dropout,
        max_residues=m.max_residues,
        reads_homologs=m.reads_homologs,
        convolution=m.convolution,
        residual=m.residual,
        reads_letters=m.reads_letters,
    )


def check_resume(spec: PretrainSpec, corpus_hash: str, state: dict[str, Any]) -> None:
    """Raise `CheckpointError` if a checkpoint was made by another run than `spec` on that corpus."""
    if state.get("corpus") != corpus_hash:
        raise CheckpointError("corpus: the checkpoint was made on another corpus (the hashes differ).")
    before, now = PretrainSpec.from_dict(state["spec"]), spec
    old, new = before.to_dict(), now.to_dict()
    for key in PINNED:
        if old[key] != new[key]:
            raise CheckpointError(
                f"{key}: the checkpoint was made with {old[key]!r}, the run asks for {new[key]!r}.",
                hint="Start a new run, or resume with the same value.",
            )
    done = int(state["step"])
    for step in (0, done // 2, max(0, done - 1)):
        if factor(step, before.steps, before.schedule) != factor(step, now.steps, now.schedule):
            raise CheckpointError(
                f"schedule: the learning rate of step {step}, done already, would have been another one.",
                hint="Only what comes after the checkpoint may change (wsd: steps before the decay began).",
            )


def open_backbone(name: str) -> PackedEncoder:
    """A backbone by registry name, bundle folder or Hugging Face ESM-2 directory, float32."""
    path = Path(name)
    if is_checkpoint(path):
        return load_checkpoint(path).encoder
    return load_packed(Registry().resolve(name, kind="backbone"))


def check_corpus(spec: PretrainSpec, corpus: Corpus) -> None:
    """Raise `SpecError` if the run cannot be made on that corpus: its alphabet, clusters or lengths."""
    if corpus.manifest["alphabet"] != spec.alphabet:
        raise SpecError(
            f"the corpus holds {corpus.manifest['alphabet']}, the run asks for {spec.alphabet}.",
            field="alphabet",
        )
    if spec.model.reads_homologs:
        if corpus.evidence is None:
            raise SpecError(
                "the corpus was prepared without homologs, which this model reads.",
                field="model.reads_homologs",
                hint="Prepare it with --homologs default, or set model.reads_homologs=false.",
            )
        if spec.eval.seed != SET_SEED:
            raise SpecError(
                f"{spec.eval.seed} is not the seed that the corpus's sets were searched with ({SET_SEED}).",
                field="eval.seed",
            )
    Batches(spec, corpus)


def load_init(spec: PretrainSpec) -> PackedEncoder | None:
    """The backbone to go on from (`init`: a registry name, a bundle, or a Hugging Face ESM-2 directory).
    Raises `CheckpointError` if its architecture is not the spec's."""
    if not spec.init:
        return None
    encoder = open_backbone(spec.init)
    config = model_config(spec)
    want, have = config.to_dict(), encoder.config.to_dict()
    if (config.reads_homologs or config.convolution) and not (have["reads_homologs"] or have["convolution"]):
        added = ("reads_homologs", "convolution", "residual", "reads_letters")
        have |= {key: want[key] for key in added}
    for key in want:
        if key != "name" and want[key] != have[key]:
            raise CheckpointError(
                f"init: {key} of {spec.init} is {have[key]}, the run asks for {want[key]}.",
                hint="Choose the recipe of that size, or set model.* to match.",
            )
    if encoder.lm_head is None:
        raise CheckpointError(f"init: {spec.init} has no language-model head to go on training.")
    return encoder if encoder.config.to_dict() == have else _extended(encoder, config, spec.seed)


def _extended(plain: PackedEncoder, config: ModelConfig, seed: int) -> PackedEncoder:
    """`plain` with the parts that `config` adds. The convolutions begin at zero, so that without homologs the
    result is the plain encoder's."""
    encoder = PackedEncoder(config)
    encoder.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for layer in encoder.layers:
            if layer.neighbours is not None:
                layer.neighbours.weight.zero_()  # type: ignore[operator, union-attr]
    encoder.load_state_dict(plain.state_dict(), strict=False)
    return encoder.eval()

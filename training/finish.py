"""The end of a run: full perplexities, backbone bundles, plot, card."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from bioseq.bundle import load_backbone, save_backbone
from bioseq.model.config import ModelConfig
from bioseq.model.encoder import PackedEncoder
from bioseq.specs.pretrain import PretrainSpec
from training import checkpoint as checkpoints
from training.checkpoint import Checkpoint
from training.corpus import Corpus
from training.evaluate import perplexity
from training.loop import Outcome
from training.team import Team


def open_backbone(name: str) -> PackedEncoder:
    """A backbone by registry name, bundle folder or Hugging Face ESM-2 directory, float32."""
    from bioseq.registry import Registry

    return load_backbone(Registry().resolve(name, kind="backbone"))


def encoder_of(found: Checkpoint) -> PackedEncoder:
    """The encoder of a checkpoint, whole, on the CPU."""
    encoder = PackedEncoder(ModelConfig.from_dict(found.state["architecture"]))
    encoder.load_state_dict(found.model())
    return encoder.eval()


def full_perplexities(
    spec: PretrainSpec, encoder: PackedEncoder, corpus: Corpus, team: Team
) -> dict[str, Any]:
    """Over the whole held-out sets (or `eval.final_proteins`, `eval.final_passes` of them), in the run's precision."""
    from bioseq.alphabet import by_name

    return {
        name: perplexity(
            encoder.to(team.device),
            members,
            seed=spec.eval.seed,
            proteins=spec.eval.final_proteins,
            passes=spec.eval.final_passes,
            alphabet=by_name(spec.alphabet),
            precision=spec.precision,
            team=Team(device=team.device),
        )
        for name, members in corpus.sets().items()
        if members
    }


def finish(spec: PretrainSpec, corpus: Corpus, folder: Path, team: Team, outcome: Outcome) -> dict[str, Any]:
    """Write the bundles `best` and `last`, the plot and the card; returns the run's summary."""
    from training.card import evidence_of, write_card
    from training.plots import plot_run

    summary: dict[str, Any] = {
        "run": str(folder),
        "steps": outcome.step,
        "tokens": outcome.tokens,
        "bundles": {},
    }
    made: dict[int, Any] = {}
    for name in ("best", "last"):
        found = (
            checkpoints.read(folder / "checkpoints" / checkpoints.BEST)
            if name == "best"
            else checkpoints.last(folder / "checkpoints")
        )
        if found is None:
            continue
        encoder = encoder_of(found)
        if found.step not in made:
            made[found.step] = full_perplexities(spec, encoder, corpus, team)
        evidence = evidence_of(spec, corpus, found, made[found.step], folder)
        bundle = save_backbone(
            folder / name,
            encoder.to("cpu", torch.float32),
            name=spec.name,
            card=write_card(evidence),
            evidence=evidence,
            data_hash=corpus.hash,
            seed=spec.seed,
            licence=spec.licence,
            alphabet=spec.alphabet,
            force=True,
        )
        summary["bundles"][name] = {"path": str(folder / name), "hash": bundle.manifest.content_hash}
        summary[name] = made[found.step]
        (folder / "card.md").write_text(write_card(evidence), "utf-8")
    plot_run(folder)
    if spec.register:
        from bioseq.registry import Registry

        entry = Registry().register(folder / "best", spec.register)
        summary["registered"] = f"{entry.name}@{entry.version}"
    return summary


def host() -> dict[str, Any]:
    """What a run was made on, without the host's name."""
    import bioseq

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bioseq": bioseq.__version__,
    }

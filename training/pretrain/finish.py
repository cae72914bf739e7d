"""The end of a run: full perplexities, backbone bundles, plot, card."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bioseq.backbones.packed.config import ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.bundles.registry import Registry
from bioseq.errors import CheckpointError
from bioseq.sequences.alphabet import by_name
from bioseq.specs.pretrain import PretrainSpec
from training.corpus.corpus import Corpus, open_corpus
from training.pretrain.distributed.team import Team
from training.pretrain.evaluate import perplexity
from training.pretrain.loop import Outcome
from training.pretrain.records import checkpoint as checkpoints
from training.pretrain.records.card import evidence_of, write_card
from training.pretrain.records.checkpoint import Checkpoint
from training.pretrain.records.plots import plot_run


def encoder_of(found: Checkpoint) -> PackedEncoder:
    """The encoder of a checkpoint, whole, on the CPU."""
    encoder = PackedEncoder(ModelConfig.from_dict(found.state["architecture"]))
    encoder.load_state_dict(found.model())
    return encoder.eval()


def outcome_of(last: Checkpoint) -> Outcome:
    return Outcome(last.step, int(last.state["tokens"]), best=last.state["best"])


def kept_checkpoints(root: Path) -> dict[str, Checkpoint]:
    """The checkpoints that become bundles: `best` (the last one where no evaluation chose) and `last`."""
    last = checkpoints.last(root)
    if last is None:
        return {}
    best = root / checkpoints.BEST
    return {"best": checkpoints.read(best) if best.exists() else last, "last": last}


def final_perplexities(
    spec: PretrainSpec, corpus: Corpus, kept: dict[str, Checkpoint], device: torch.device
) -> dict[int, dict[str, Any]]:
    """By step of each checkpoint: over the whole held-out sets (or `eval.final_proteins`, `eval.final_passes` of
    them), on `device` in the run's precision."""
    found: dict[int, dict[str, Any]] = {}
    sets = {name: members for name, members in corpus.sets().items() if members}
    for checkpoint in kept.values():
        if checkpoint.step in found:
            continue
        encoder = encoder_of(checkpoint).to(device)
        measure = partial(
            perplexity,
            encoder,
            seed=spec.eval.seed,
            proteins=spec.eval.final_proteins,
            passes=spec.eval.final_passes,
            alphabet=by_name(spec.alphabet),
            precision=spec.precision,
            team=Team(device=device),
        )
        values = found[checkpoint.step] = {name: measure(members) for name, members in sets.items()}
        if spec.model.reads_homologs and corpus.evidence:
            for name, members in sets.items():
                with_them = measure(members, evidence=corpus.evidence.of_set(name))
                values[name] = {**with_them, "without_homologs": values[name]}
    return found


def _homologs(spec: PretrainSpec, corpus: Corpus) -> dict[str, Any]:
    """What the bundle says of the homologs that its backbone reads."""
    if not spec.model.reads_homologs or corpus.evidence is None:
        return {}
    keep = ("reference", "name", "settings")
    return {"homologs": {key: corpus.evidence.manifest[key] for key in keep}}


def finish(
    spec: PretrainSpec,
    corpus: Corpus,
    folder: Path,
    outcome: Outcome,
    perplexities: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    """Write the bundles `best` and `last`, the plot and the card; returns the run's summary. `perplexities` are
    those of `final_perplexities`."""
    summary: dict[str, Any] = {
        "run": str(folder),
        "steps": outcome.step,
        "tokens": outcome.tokens,
        "bundles": {},
    }
    for name, found in kept_checkpoints(folder / "checkpoints").items():
        evidence = evidence_of(spec, corpus, found, perplexities[found.step], folder)
        bundle = save_backbone(
            folder / name,
            encoder_of(found),
            name=spec.name,
            card=write_card(evidence),
            evidence=evidence,
            data_hash=corpus.hash,
            extra=_homologs(spec, corpus),
            seed=spec.seed,
            licence=spec.licence,
            alphabet=spec.alphabet,
            force=True,
        )
        summary["bundles"][name] = {"path": str(folder / name), "hash": bundle.manifest.content_hash}
        summary[name] = perplexities[found.step]
        (folder / "card.md").write_text(write_card(evidence), "utf-8")
    plot_run(folder)
    if spec.register:
        entry = Registry().register(folder / "best", spec.register)
        summary["registered"] = f"{entry.name}@{entry.version}"
    return summary


def main(argv: list[str] | None = None) -> int:
    """`python -m training.pretrain.finish RUN`: bundles, plot and card of the checkpoints that are there now. The run
    may go on meanwhile, or later."""
    parser = argparse.ArgumentParser(prog="python -m training.pretrain.finish", description=main.__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--corpus", help="where the corpus is now (default: as in the run's spec)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the spec")
    args = parser.parse_args(argv)
    spec = PretrainSpec.load(args.run / "spec.json").override(dict(s.split("=", 1) for s in args.set))
    corpus = open_corpus(args.corpus or str(spec.corpus))
    kept = kept_checkpoints(args.run / "checkpoints")
    if not kept:
        raise CheckpointError(f"{args.run} has no checkpoint yet.")
    perplexities = final_perplexities(spec, corpus, kept, torch.device("cpu"))
    outcome = outcome_of(kept["last"])
    print(json.dumps(finish(spec, corpus, args.run, outcome, perplexities), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

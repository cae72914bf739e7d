"""A backbone's evidence (data) and card (text made of it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bioseq.sequences.alphabet import by_name
from bioseq.specs.pretrain import PretrainSpec
from bioseq.version import __version__
from training.corpus.corpus import Corpus
from training.corpus.draws import PASSES
from training.pretrain.records.checkpoint import Checkpoint
from training.pretrain.records.kmers import kmer_baselines
from training.pretrain.records.ngram import baselines
from training.pretrain.records.run_folder import read_metrics

_OPTIMISERS = {"adamw": "AdamW", "muon": "Muon for the matrices of the layers, AdamW for the rest"}


_TRIGRAM = (
    "The 3-gram model is causal and interpolated, its weights fitted by EM on training residues left out of "
    "its counts; it is scored on the same residues, each given its two true left neighbours."
)
_KMERS = (
    "Order k is a Markov model given the k true left neighbours, smoothed by the orders below, on the same nucleotides "
    "in the strand that is given; the table has the order that does best on the set. A masked model sees both sides, with one "
    "nucleotide in seven hidden."
)


def evidence_of(
    spec: PretrainSpec, corpus: Corpus, found: Checkpoint, perplexities: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Everything that the card says, as data. Baselines are computed once a run folder's corpus."""
    rows = [r for r in read_metrics(folder) if r["kind"] == "train" and r["step"] <= found.step]
    alphabet = by_name(spec.alphabet)
    return {
        "run": spec.name,
        "step": found.step,
        "tokens": int(found.state["tokens"]),
        "training_seconds": round(sum(r["seconds"] for r in rows), 1),
        "hardware": found.state.get("hardware", "unrecorded hardware"),
        "software": {"torch": found.state.get("torch", torch.__version__), "bioseq": __version__},
        "architecture": found.state["architecture"],
        "parameters": sum(t.numel() for t in found.model().values()),
        "spec": _without_folders(spec.to_dict()),
        "corpus": {
            "hash": corpus.hash,
            **{
                k: corpus.manifest[k]
                for k in ("alphabet", "records", "residues", "clusters", "left_out", "sources")
            },
        },
        "about_data": spec.about,
        "licence": spec.licence,
        "perplexity": perplexities,
        "baselines": baselines(corpus, vocabulary=len(alphabet))
        if spec.alphabet == "protein"
        else kmer_baselines(corpus, alphabet),
    }


def _without_folders(spec: dict[str, Any]) -> dict[str, Any]:
    """A bundle travels: it says which corpus by hash and name, and not where it lay."""
    return spec | {k: Path(spec[k]).name for k in ("corpus", "output", "storage", "init") if spec[k]}


def write_card(evidence: dict[str, Any]) -> str:
    """Markdown for people."""
    e, spec, corpus = evidence, evidence["spec"], evidence["corpus"]
    on_cpu = not spec["workers"]["gpus"]
    nucleic = corpus["alphabet"] != "protein"
    unit, item = ("nucleotide", "sequence") if nucleic else ("residue", "protein")
    lines = [
        f"# {e['run']}",
        "",
        f"A masked language model of {corpus['alphabet']} sequences in ESM-2's architecture: "
        f"{e['architecture']['n_layers']} layers of width {e['architecture']['d_model']}, "
        f"{e['parameters'] / 1e6:.1f} M parameters.",
        "",
    ]
    if on_cpu:
        lines += [
            "**This is a model trained on a CPU**, for a short time: it has seen "
            f"{e['tokens'] / 1e6:.1f} M tokens, thousands of times fewer than published {'DNA and RNA' if nucleic else 'protein'} "
            "language models. It shows that everything works"
            + ("" if nucleic else " and gives better features than residue counts")
            + f"; it is not a substitute for {'them' if nucleic else 'ESM-2'}. The same command continues its training, on a GPU too.",
            "",
        ]
    lines += [f"## Perplexity on held-out {item}s", "", *(_kmer_table(e) if nucleic else _table(e)), ""]
    lines += [
        f"Protocol: each {unit} is chosen in one of {PASSES} passes; all chosen {unit}s of a pass are replaced "
        f"by `<mask>`; cross-entropy over the whole vocabulary; sums and counts over all {item}s, divided last. "
        + (_KMERS if nucleic else _TRIGRAM),
        "",
        "## Training",
        "",
        f"- steps: {e['step']} of {spec['steps']}; tokens seen: {e['tokens']:,}",
        f"- time in training steps: {e['training_seconds'] / 60:.0f} min on {e['hardware']}",
        f"- arithmetic: {spec['precision']}"
        + (" autocast with float32 weights" if spec["precision"] == "bfloat16" else ""),
        f"- tokens a step {spec['tokens_per_step']}, crops of {spec['crop']} {unit}s, sampling by "
        f"{'cluster' if spec['sampling'] == 'cluster' else item}",
        *(["- either strand of each turn, by the seed"] if spec.get("reverse_complement") else []),
        f"- masking: {spec['masking']['rate']:.0%} of {unit}s; of these {spec['masking']['mask']:.0%} masked, "
        f"{spec['masking']['random']:.0%} replaced at random, the rest kept",
        f"- {_OPTIMISERS[spec['optimiser'].get('kind', 'adamw')]}, peak learning rate {spec['optimiser']['lr']:g}, schedule {spec['schedule']['kind']} with "
        f"{spec['schedule']['warmup']} steps of warm-up and {spec['schedule']['decay']} of decay",
        f"- seed {spec['seed']}; initialisation {spec['model']['init']}",
        *([f"- continued from {spec['init']}"] if spec.get("init") else []),
        "",
        "## Data",
        "",
        e["about_data"] or "Sources: " + ", ".join(s["name"] for s in corpus["sources"]) + ".",
        "",
        f"{corpus['records']:,} sequences, {corpus['residues']:,} {unit}s"
        + (f", {corpus['clusters']:,} clusters" if corpus["clusters"] else "")
        + f"; {corpus['left_out']['duplicates']:,} exact duplicates were left out. Corpus hash {corpus['hash']}.",
        "",
        f"Licence of the data: {e['licence']}.",
        "",
        "## Not good for",
        "",
        "- structure prediction, contact maps or clinical interpretation of variants; no such use was tested",
        "- generating sequences",
        f"- {unit}s beyond {e['architecture']['max_residues']} of one chain at once: longer {item}s are windowed",
        "- organisms or families that its training data do not cover"
        + ("" if nucleic else "; Swiss-Prot, for one, leans to model organisms"),
        "",
        "Made by bioseq " + e["software"]["bioseq"] + f" with torch {e['software']['torch']}.",
        "",
    ]
    return "\n".join(lines)


def _table(e: dict[str, Any]) -> list[str]:
    if not e["perplexity"]:
        return ["No held-out set was prepared with the corpus."]
    base = e["baselines"]
    out = ["| set | proteins | residues | this model | unigram | 3-gram |", "|---|---|---|---|---|---|"]
    for name, p in e["perplexity"].items():
        if plain := p.get("without_homologs"):
            out.append(
                f"| {name}, without homologs | {plain['proteins']:,} | {plain['residues']:,} | "
                f"**{plain['perplexity']:.2f}** | {base['unigram'][name]:.2f} | {base['trigram'][name]:.2f} |"
            )
        out.append(
            f"| {name} | {p['proteins']:,} | {p['residues']:,} | **{p['perplexity']:.2f}** | "
            f"{base['unigram'][name]:.2f} | {base['trigram'][name]:.2f} |"
        )
    return out


def _kmer_table(e: dict[str, Any]) -> list[str]:
    if not e["perplexity"]:
        return ["No held-out set was prepared with the corpus."]
    base = e["baselines"]
    out = [
        "| set | sequences | nucleotides | this model | unigram | best k-mer model |",
        "|---|---|---|---|---|---|",
    ]
    lost = []
    for name, p in e["perplexity"].items():
        order = min(base["kmers"], key=lambda k: base["kmers"][k][name])
        best = base["kmers"][order][name]
        out.append(
            f"| {name} | {p['proteins']:,} | {p['residues']:,} | **{p['perplexity']:.3f}** | "
            f"{base['unigram'][name]:.3f} | {best:.3f} (order {order}) |"
        )
        if p["perplexity"] > best:
            lost.append(name)
    if lost:
        out = [f"**It is worse than counting k-mers on {', '.join(lost)}.**", "", *out]
    return out

"""From a label table to a head bundle: read, split, fit, calibrate, measure beside baselines, write.

Nothing is written until everything is computed; the bundle appears whole or not at all. The fits
are in `models`, what they are worth in `evaluation`.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from bioseq.bundles.bundle import Bundle
from bioseq.bundles.manifest import check_name
from bioseq.bundles.registry import Registry
from bioseq.errors import BundleError, RegistryError, TableError
from bioseq.inference.loading import load
from bioseq.inference.predictor import Predictor
from bioseq.output import check_free
from bioseq.sequences.alphabet import Alphabet
from bioseq.sequences.fasta import read_fasta
from bioseq.specs.finetune import FinetuneSpec
from training.finetune.evaluation import card
from training.finetune.fit import say
from training.finetune.models.pooled import fit_pooled
from training.finetune.models.residues import fit_residue_head
from training.finetune.models.tuned import fit_tuned
from training.finetune.write import Made, make_head, write_head
from training.tables.labels import TEST, TRAIN, VALID, Labels, read_labels, without_unlabelled
from training.tables.residue_labels import read_residues
from training.tables.splits import Split, make_split


def read(spec: FinetuneSpec, alphabet: Alphabet | None = None) -> tuple[Labels, Split]:
    """Read, check and split. Raises `TableError` before anything is computed."""
    if spec.residue_labels is not None:
        labels = read_residues(spec.labels, spec.residue_labels, spec.residue_mask, alphabet=alphabet)
    else:
        labels = read_labels(
            spec.labels,
            spec.targets,
            task=spec.task,
            wild_type=_wild_type(spec.wild_type),
            weight=spec.weight,
            id_column=spec.id_column,
            replicates=spec.replicates,
            alphabet=alphabet,
        )
        labels = without_unlabelled(labels)
    return labels, make_split(labels, spec.split, seed=spec.seed)


def _wild_type(given: str | None) -> str | None:
    """A sequence, or a FASTA file that holds one."""
    if given is None or not os.path.isfile(given):  # a sequence may be too long for a path
        return given
    records = list(read_fasta(given))
    if len(records) != 1:
        raise TableError(f"{given} holds {len(records)} records; one wild type is needed.")
    return records[0].sequence


def subsample(split: Split, spec: FinetuneSpec) -> dict[str, np.ndarray]:
    """Places of the rows used in each part, after `max_train`, `max_valid` and `max_test`; ascending."""
    rng = np.random.default_rng(spec.seed)
    most = {
        "train": spec.max_train,
        "valid": spec.max_valid,
        "test": spec.max_test,
    }
    out = {}
    for name, part in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        rows = split.places(part)
        limit = most[name]
        out[name] = np.sort(rng.choice(rows, limit, replace=False)) if limit and limit < len(rows) else rows
    return out


def finetune(
    spec: FinetuneSpec, *, registry: Registry | None = None, predictor: Predictor | None = None
) -> Bundle:
    """Run a spec; returns the bundle at `spec.output`. Raises `TableError`, `SpecError`, `BundleError`,
    `OutputError`, and `RegistryError` if `register` is asked for a weak head without `accept_weak` (the bundle
    is written nevertheless)."""
    check_free(Path(spec.output), force=spec.force)
    name = check_name(spec.name or spec.register or Path(spec.output).name.lower())
    torch.manual_seed(spec.seed)
    if predictor is None:
        predictor = load(
            spec.base, dtype=spec.dtype, device=spec.device, threads=spec.threads, registry=registry
        )
    if not predictor.weights_hash:
        raise BundleError("the base model has no content hash, so no head can name it.")
    labels, split = read(spec, predictor.alphabet)
    for warning in split.warnings:
        say(f"warning: {warning}")
    for note in (*labels.notes, *((split.how["table"],) if "table" in split.how else ())):
        say(note)
    others: list[tuple[str, FinetuneSpec, Split]] = []
    for kind in split.also:
        other = replace(spec, split=replace(spec.split, kind=kind))
        try:
            others.append((kind, other, make_split(labels, other.split, seed=spec.seed, measure=False)))
        except TableError as error:
            say(f"warning: no split by {kind} beside it: {error}")
    with tempfile.TemporaryDirectory() as scratch, threadpool_limits(spec.threads):
        made = _make(spec, name, labels, split, predictor, Path(scratch) / "main")
        for way, other, beside in others:
            brief = _make(other, name, labels, beside, predictor, Path(scratch) / way).evidence
            made.evidence.setdefault("also", {})[way] = {
                key: brief[key]
                for key in ("metrics", "intervals", "baselines", "best_baseline", "gain", "rows", "resampled")
            }
        bundle = write_head(spec, name, labels, made, predictor)
    evidence = bundle.evidence()
    say(card.verdict(evidence))
    if spec.register:
        if not evidence["beats_baseline"] and not spec.accept_weak:
            raise RegistryError(
                f"{spec.output} is written, but not registered: it does not beat every baseline.",
                hint="Pass --accept-weak to register it nevertheless.",
            )
        entry = (registry or Registry()).register(bundle.path, spec.register, accept_weak=spec.accept_weak)
        say(f"registered as {entry.name}@{entry.version}")
    return bundle


def _make(
    spec: FinetuneSpec, name: str, labels: Labels, split: Split, predictor: Predictor, scratch: Path
) -> Made:
    scratch.mkdir()
    method, why = spec.method, ""
    if method is None:
        gpu = predictor.device.type == "cuda"
        method = "lora" if gpu else "frozen"
        why = f"; the default on a {'GPU' if gpu else 'CPU'}"
    rows = subsample(split, spec)
    say(
        f"{labels.task}: {len(rows['train'])} rows to train, {len(rows['valid'])} to choose, {len(rows['test'])} "
        f"to test; split by {split.how['kind']}; {method} on {predictor.name}{why}"
    )
    parts = {p: labels.take(r) for p, r in rows.items()}
    args: tuple[Any, ...] = (spec, split, rows, parts, predictor)
    if method != "frozen":
        fit = fit_tuned(*args, method=method, scratch=scratch)
    elif labels.task == "per_residue":
        fit = fit_residue_head(*args, scratch=scratch)
    else:
        fit = fit_pooled(*args, scratch=scratch)
    made = make_head(spec, name, labels, split, rows, parts, fit, predictor, method, scratch)
    if why:
        made.evidence["notes"].append(f"method {method}{why}")
    return made

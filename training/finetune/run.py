"""From a label table to a head bundle: read, split, fit, calibrate, measure beside baselines, write.

Nothing is written until everything is computed; the bundle appears whole or not at all. The fits
are in `models`, what they are worth in `evaluation`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bioseq.backbones.pooling import EmbedOptions
from bioseq.bundles.bundle import Bundle
from bioseq.bundles.manifest import check_name
from bioseq.bundles.registry import Registry
from bioseq.errors import BundleError, RegistryError, TableError
from bioseq.heads.head import clean
from bioseq.inference.loading import load
from bioseq.inference.predictor import Predictor
from bioseq.output import check_free
from bioseq.sequences.fasta import read_fasta
from bioseq.specs.finetune import FinetuneSpec
from training.finetune.embeddings import embed_cached
from training.finetune.evaluation import card
from training.finetune.fit import Fit, head_settings, n_outputs, say, site_context
from training.finetune.models.frozen import Rows, fit_frozen
from training.finetune.models.residues import HIDDEN, KERNEL, fit_residues
from training.finetune.models.tuned import fit_tuned
from training.finetune.write import write_head
from training.tables.labels import TEST, TRAIN, VALID, Labels, read_labels
from training.tables.residue_labels import read_residues
from training.tables.splits import Split, make_split


def read(spec: FinetuneSpec) -> tuple[Labels, Split]:
    """Read, check and split. Raises `TableError` before anything is computed."""
    if spec.residue_labels is not None:
        labels = read_residues(spec.labels, spec.residue_labels, spec.residue_mask)
    else:
        labels = read_labels(
            spec.labels,
            spec.targets,
            task=spec.task,
            wild_type=_wild_type(spec.wild_type),
            weight=spec.weight,
            id_column=spec.id_column,
            replicates=spec.replicates,
        )
    s = spec.split
    split = make_split(
        labels,
        kind=s.kind,
        valid=s.valid,
        test=s.test,
        identity=s.identity,
        train_mutations=s.train_mutations,
        position_mode=s.position_mode,
        seed=spec.seed,
    )
    return labels, split


def _wild_type(given: str | None) -> str | None:
    """A sequence, or a FASTA file that holds one."""
    if given is None or not Path(given).is_file():
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
    labels, split = read(spec)
    for warning in split.warnings:
        say(f"warning: {warning}")
    for note in labels.notes:
        say(note)
    if predictor is None:
        predictor = load(
            spec.base, dtype=spec.dtype, device=spec.device, threads=spec.threads, registry=registry
        )
    if not predictor.weights_hash:
        raise BundleError("the base model has no hash of its weights, so no head can name it.")
    method = spec.method or ("lora" if predictor.device.type == "cuda" else "frozen")
    rows = subsample(split, spec)
    say(
        f"{labels.task}: {len(rows['train'])} rows to train, {len(rows['valid'])} to choose, {len(rows['test'])} "
        f"to test; split by {split.how['kind']}; {method} on {predictor.name}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        parts = {p: labels.take(r) for p, r in rows.items()}
        if method != "frozen":
            fit = fit_tuned(spec, parts, predictor, method, Path(scratch))
        elif labels.task == "per_residue":
            fit = _residues(spec, parts, predictor)
        else:
            fit = _frozen(spec, parts, predictor)
        bundle = write_head(spec, name, labels, split, parts, fit, predictor, method, Path(scratch))
    evidence = bundle.evidence()
    say(card.verdict(evidence))
    if spec.register:
        if not evidence["beats_baseline"] and not spec.accept_weak:
            raise RegistryError(
                f"{spec.output} is written, but not registered: it does not beat its best baseline.",
                hint="Pass --accept-weak to register it nevertheless.",
            )
        entry = (registry or Registry()).register(bundle.path, spec.register, accept_weak=spec.accept_weak)
        say(f"registered as {entry.name}@{entry.version}")
    return bundle


def _frozen(spec: FinetuneSpec, parts: dict[str, Labels], predictor: Predictor) -> Fit:
    labels = parts["train"]
    features: dict[str, Any] = {}
    embedded = np.arange(len(labels))
    if spec.max_embedded is not None and spec.max_embedded < len(labels):
        draw = np.random.default_rng(spec.seed).choice(len(labels), spec.max_embedded, replace=False)
        embedded = np.sort(draw)
    for part, some in parts.items():
        if part == "train":
            some = some.take(embedded)
        found, cached = embed_cached(
            predictor, some.sequences, cache=spec.cache, label=f"embedding the {part} rows"
        )
        features[part] = np.stack(found)
        if cached:
            say(f"{len(found)} embeddings of the {part} rows from the cache")
    wanted = spec.features is None or "masked_marginal" in spec.features
    context = site_context(parts, predictor, masked_marginal=wanted)
    both = [parts["train"], parts["valid"]]
    known = np.full((len(labels), features["train"].shape[1]), np.nan, np.float32)
    known[embedded] = features["train"]
    rows = Rows(
        np.concatenate([known, features["valid"]]),
        [clean(s) for p in both for s in p.sequences],
        np.concatenate([p.y for p in both]),
        np.concatenate([p.weights for p in both]),
        len(parts["train"]),
    )
    best = fit_frozen(
        labels.task,
        rows,
        n_outputs(labels),
        context=context,
        models=spec.models,
        only=spec.features,
        balance=spec.class_weights,
        seed=spec.seed,
        tick=say,
    )
    tensors = {
        "features.mean": torch.from_numpy(best.standard.mean),
        "features.scale": torch.from_numpy(best.standard.scale),
    }
    for i, (weight, bias) in enumerate(best.layers):
        tensors |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
    if labels.task == "regression":
        tensors["target.offset"] = torch.from_numpy(best.offset).float()
        tensors["target.scale"] = torch.from_numpy(best.scale).float()
    if "masked_marginal" in best.blocks:
        assert context is not None and context.odds is not None
        tensors["masked_marginal.odds"] = torch.from_numpy(context.odds)
    settings = head_settings(parts, "frozen", best.blocks, context)
    return Fit(settings, tensors, features, best.out, best.y, best.setting, best.tried, embedded=embedded)


def _residues(spec: FinetuneSpec, parts: dict[str, Labels], predictor: Predictor) -> Fit:
    ask = EmbedOptions(per_residue=True)
    features = {
        part: embed_cached(
            predictor, some.sequences, ask=ask, cache=spec.cache, label=f"embedding the {part} rows"
        )[0]
        for part, some in parts.items()
    }
    train, valid = parts["train"], parts["valid"]
    assert train.residues is not None and valid.residues is not None
    got = fit_residues(
        features["train"],
        [clean(s) for s in train.sequences],
        train.residues,
        train.weights,
        (features["valid"], [clean(s) for s in valid.sequences], valid.residues),
        len(train.classes),
        seed=spec.seed,
        tick=say,
    )
    tensors = {"features.mean": torch.from_numpy(got.mean), "features.scale": torch.from_numpy(got.scale)}
    for i, (weight, bias) in enumerate(got.convolutions):
        tensors |= {f"conv.{i}.weight": weight, f"conv.{i}.bias": bias}
    setting = {"model": "convolutions", "hidden": HIDDEN, "kernel": KERNEL, "epochs": got.epoch}
    record = {**setting, "valid": round(got.score, 4)}
    return Fit(
        head_settings(parts, "frozen", ("embedding",), None), tensors, features, chosen=record, tried=[record]
    )

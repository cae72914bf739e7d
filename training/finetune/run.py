"""From a label table to a head bundle: read, split, fit, calibrate, judge beside baselines, write.

Nothing is written until everything is computed; the bundle appears whole or not at all. The fit itself is in
`finetune_frozen` (features fixed), `finetune_residues` (convolutions on features) and `finetune_tune` (LoRA
and full, which change the backbone).
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bioseq.backbones.pooling import EmbedOptions
from bioseq.bundles.bundle import Bundle, write_bundle
from bioseq.bundles.manifest import check_name
from bioseq.errors import BundleError, RegistryError, TableError
from bioseq.heads import features as blocks
from bioseq.heads.features import Context
from bioseq.heads.head import NEIGHBOURS, Head, clean
from bioseq.heads.ood import fit_domain
from bioseq.output import check_free
from bioseq.specs.finetune import FinetuneSpec
from training.finetune import card as cards
from training.finetune import report as judge
from training.finetune.embeddings import embed_cached
from training.finetune.frozen import Rows, fit_frozen
from training.tables import splits
from training.tables.labels import TEST, TRAIN, VALID, Labels, read_labels
from training.tables.residue_labels import read_residues
from training.tables.splits import Split, make_split

if TYPE_CHECKING:
    from bioseq.bundles.registry import Registry
    from bioseq.inference.predictor import Predictor

HALF_FROM = 50_000  # tensors of more numbers are stored in float16


@dataclass
class Fit:
    """A head before calibration. `features` by part, as the head will get them; `cal_out`, `cal_y` raw outputs
    and labels of rows that it did not train on (per residue flat)."""

    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    features: dict[str, Any]
    cal_out: np.ndarray | None = None
    cal_y: np.ndarray | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    adapter: Path | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    embedded: np.ndarray | None = None  # training rows that have features; None: all


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    from bioseq.sequences.fasta import read_fasta

    records = list(read_fasta(given))
    if len(records) != 1:
        raise TableError(f"{given} holds {len(records)} records; one wild type is needed.")
    return records[0].sequence


def thin(split: Split, spec: FinetuneSpec) -> dict[str, np.ndarray]:
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
    from bioseq.inference.loading import load

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
    if not predictor.hash:
        raise BundleError("the base model has no content hash, so no head can name it.")
    method = spec.method or ("lora" if predictor.device.type == "cuda" else "frozen")
    rows = thin(split, spec)
    say(
        f"{labels.task}: {len(rows['train'])} rows to train, {len(rows['valid'])} to choose, {len(rows['test'])} "
        f"to test; split by {split.how['kind']}; {method} on {predictor.name}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        parts = {p: labels.take(r) for p, r in rows.items()}
        if method != "frozen":
            from training.finetune.tune import fit_tuned

            fit = fit_tuned(spec, parts, predictor, method, Path(scratch))
        elif labels.task == "per_residue":
            fit = _residues(spec, parts, predictor)
        else:
            fit = _frozen(spec, parts, predictor)
        bundle = _finish(spec, name, labels, split, parts, fit, predictor, method, Path(scratch))
    evidence = bundle.evidence()
    say(cards.verdict(evidence))
    if spec.register:
        from bioseq.bundles.registry import Registry

        if not evidence["beats_baseline"] and not spec.accept_weak:
            raise RegistryError(
                f"{spec.output} is written, but not registered: it does not beat its best baseline.",
                hint="Pass --accept-weak to register it nevertheless.",
            )
        entry = (registry or Registry()).register(bundle.path, spec.register, accept_weak=spec.accept_weak)
        say(f"registered as {entry.name}@{entry.version}")
    return bundle


# ------------------------------------------------------------------------------------------------- fitting


def n_outputs(labels: Labels) -> int:
    if labels.task in ("multiclass", "per_residue"):
        return len(labels.classes)
    return 1 if labels.task == "binary" else labels.y.shape[1]


def site_context(parts: dict[str, Labels], predictor: Predictor, *, density: bool) -> Context | None:
    """For variants of one protein: the wild type (the consensus if none is given), the sites that vary in the
    training and validation rows, and the backbone's masked-marginal log odds."""
    sequences = parts["train"].sequences + parts["valid"].sequences
    wild = parts["train"].wild_type or splits.consensus(sequences + parts["test"].sequences)
    if wild is None or any(len(s) != len(wild) for s in sequences + parts["test"].sequences):
        return None
    sites = tuple(sorted({int(p) for ps in splits.mutated(sequences, wild) for p in ps}))
    odds = None
    if density and predictor.encoder.lm_head is not None and len(wild) <= predictor.max_residues:
        say(f"masked marginals of the wild type, {len(wild)} passes")
        odds = np.asarray(predictor.scan(wild, strategy="masked-marginals"), np.float32)
    return Context(wild, sites, odds)


def head_settings(
    parts: dict[str, Labels], method: str, chosen: tuple[str, ...], context: Context | None
) -> dict[str, Any]:
    labels = parts["train"]
    classes = labels.classes if labels.task != "regression" else ()
    settings: dict[str, Any] = {
        "method": method,
        "blocks": list(chosen),
        "pooling": "mean",
        "layers": [-1],
        "targets": list(labels.targets),
        "classes": list(classes),
    }
    if context is not None and any(b in blocks.SITE_BLOCKS for b in chosen):
        settings |= {"wild_type": context.wild_type, "sites": list(context.sites)}
    return settings


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
    wanted = spec.features is None or "density" in spec.features
    context = site_context(parts, predictor, density=wanted)
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
    if "density" in best.blocks:
        assert context is not None and context.odds is not None
        tensors["density.odds"] = torch.from_numpy(context.odds)
    settings = head_settings(parts, "frozen", best.blocks, context)
    return Fit(settings, tensors, features, best.out, best.y, best.setting, best.tried, embedded=embedded)


def _residues(spec: FinetuneSpec, parts: dict[str, Labels], predictor: Predictor) -> Fit:
    from training.finetune.residues import HIDDEN, KERNEL, fit_residues

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


# --------------------------------------------------------------------------------- calibrating and writing


def _finish(
    spec: FinetuneSpec,
    name: str,
    labels: Labels,
    split: Split,
    parts: dict[str, Labels],
    fit: Fit,
    predictor: Predictor,
    method: str,
    scratch: Path,
) -> Bundle:
    # what is stored is what is judged: large tensors lose half of their bits here, before anything is measured
    fit.tensors = {
        k: v.half()
        if v.dtype == torch.float32 and v.numel() >= HALF_FROM and not k.startswith("trunk.")
        else v
        for k, v in fit.tensors.items()
    }
    train = parts["train"] if fit.embedded is None else parts["train"].take(fit.embedded)
    one_protein = len({len(s) for s in train.sequences}) == 1
    pooled = judge.pooled(labels.task, fit.features["train"])
    domain = fit_domain(
        pooled,
        [clean(s) for s in train.sequences],
        train.ids,
        order_term=not one_protein,
        neighbours=spec.neighbours,
        seed=spec.seed,
    )
    tensors = {**fit.tensors, **domain.tensors()}
    head = Head(
        name=name,
        task=labels.task,
        labels=list(labels.classes or labels.targets),
        settings=fit.settings,
        tensors={k: v for k, v in tensors.items() if not k.startswith("trunk.")},
        calibration={},
        neighbour_ids=domain.ids,
    )
    calibration, evidence, curves = judge.judge(spec, head, labels, split, parts, fit, predictor, method)
    evidence["base"] = {"name": predictor.name, "hash": predictor.hash, "dtype": predictor.dtype}
    evidence = cards.plain(evidence)
    files: dict[str, Path] = {}
    if domain.ids:
        files[NEIGHBOURS] = scratch / NEIGHBOURS
        files[NEIGHBOURS].write_text(json.dumps(domain.ids), "utf-8")
    if curves:
        files[cards.PLOT] = scratch / cards.PLOT
        cards.reliability_plot(files[cards.PLOT], curves)
    return write_bundle(
        spec.output,
        manifest_fields={
            "kind": "head",
            "name": name,
            "alphabet": predictor.alphabet.name,
            "architecture": fit.architecture,
            "base_hash": predictor.hash,
            "task": labels.task,
            "labels": list(labels.classes or labels.targets),
            "units": spec.units,
            "per_residue": labels.task == "per_residue",
            "data_hash": labels.data_hash,
            "seed": spec.seed,
            "licence": spec.licence,
            "extra": {
                "head": fit.settings,
                "training": _portable(spec),
                "citation": list(spec.citation),
            },
        },
        tensors=tensors,
        adapter=fit.adapter,
        calibration=calibration,
        card=cards.card(evidence, spec, name),
        evidence=evidence,
        extra_files=files,
        force=spec.force,
    )


def _portable(spec: FinetuneSpec) -> dict[str, Any]:
    """The spec without folders of the machine that ran it."""
    data = spec.to_dict()
    for key in ("labels", "residue_labels", "residue_mask", "output"):
        data[key] = Path(data[key]).name if data[key] else data[key]
    for key in ("cache", "address", "wild_type", "threads", "force"):
        data.pop(key)
    return data

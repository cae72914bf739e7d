"""From a fit to the bundle on disk: the head, its calibration, evidence and card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bioseq.bundles.bundle import Bundle, write_bundle
from bioseq.heads.features import clean
from bioseq.heads.head import NEIGHBOURS, Head
from bioseq.heads.relatives import FOLDER
from bioseq.inference.predictor import Predictor
from bioseq.specs.finetune import FinetuneSpec
from training.finetune.evaluation import card
from training.finetune.evaluation.report import report
from training.finetune.fit import Fit, pooled
from training.finetune.ood import fit_ood
from training.tables.labels import Labels
from training.tables.splits import Split

HALF_FROM = 50_000  # tensors of more numbers are stored in float16


@dataclass
class Made:
    """A calibrated and measured head that is not written yet."""

    fit: Fit
    tensors: dict[str, torch.Tensor]
    calibration: dict[str, Any]
    evidence: dict[str, Any]
    files: dict[str, Path]


def make_head(
    spec: FinetuneSpec,
    name: str,
    labels: Labels,
    split: Split,
    places: dict[str, np.ndarray],
    parts: dict[str, Labels],
    fit: Fit,
    predictor: Predictor,
    method: str,
    scratch: Path,
) -> Made:
    # what is stored is what is measured: large tensors lose half of their bits here, before anything is measured
    fit.tensors = {
        k: v.half()
        if v.dtype == torch.float32 and v.numel() >= HALF_FROM and not k.startswith("trunk.")
        else v
        for k, v in fit.tensors.items()
    }
    trained = fit.trained if fit.embedded is None else fit.trained.take(fit.embedded)
    features = fit.features["train"]
    if len(features) not in (len(fit.trained), len(trained)):  # fitted on the validation rows too
        joined = (*features, *fit.features["valid"])
        features = list(joined) if labels.task == "per_residue" else np.stack(joined)
    rows = pooled(labels.task, features)
    ood = fit_ood(
        rows if fit.embedded is None or len(rows) == len(fit.embedded) else rows[fit.embedded],
        [clean(s) for s in trained.sequences],
        # mutants as ids, with the wild type, would tell the sequences
        [f"row {i}" for i in range(1, len(trained) + 1)]
        if spec.homologs == "none" and split.variants is not None
        else trained.ids,
        order_term=split.variants is None,
        neighbours=spec.neighbours,
        alphabet=predictor.alphabet.name,
        seed=spec.seed,
    )
    if fit.training is not None:
        fit.settings["homologs"] = "variants" if fit.training.variants else "search"
    tensors = {**fit.tensors, **ood.tensors()}
    head = Head(
        name=name,
        task=labels.task,
        labels=list(labels.classes or labels.targets),
        settings=fit.settings,
        tensors={k: v for k, v in tensors.items() if not k.startswith("trunk.")},
        calibration={},
        neighbour_ids=ood.ids,
        alphabet=predictor.alphabet.name,
        rows=fit.training,
    )
    calibration, evidence, curves = report(spec, head, labels, split, places, parts, fit, predictor, method)
    evidence["base"] = {
        "name": predictor.name,
        "hash": predictor.weights_hash,
        "dtype": predictor.dtype,
    }
    files: dict[str, Path] = {}
    if ood.ids:
        files[NEIGHBOURS] = scratch / NEIGHBOURS
        files[NEIGHBOURS].write_text(json.dumps(ood.ids), "utf-8")
    if fit.training is not None:
        tensors |= fit.training.tensors()
        folder = fit.training.reference.folder
        files |= {f"{FOLDER}/{f.name}": f for f in sorted(folder.iterdir())}
    if curves:
        files[card.PLOT] = scratch / card.PLOT
        card.reliability_plot(files[card.PLOT], curves)
    return Made(fit, tensors, calibration, card.plain(evidence), files)


def write_head(spec: FinetuneSpec, name: str, labels: Labels, made: Made, predictor: Predictor) -> Bundle:
    return write_bundle(
        spec.output,
        manifest_fields={
            "kind": "head",
            "name": name,
            "alphabet": predictor.alphabet.name,
            "architecture": made.fit.architecture,
            "base_hash": predictor.content_hash or None,
            "base_weights_hash": predictor.weights_hash,
            "task": labels.task,
            "labels": list(labels.classes or labels.targets),
            "units": spec.units,
            "per_residue": labels.task == "per_residue",
            "data_hash": labels.data_hash,
            "seed": spec.seed,
            "licence": spec.licence,
            "extra": {
                "head": made.fit.settings,
                "training": _portable(spec),
                "citation": list(spec.citation),
            },
        },
        tensors=made.tensors,
        adapter=made.fit.adapter,
        calibration=made.calibration,
        card=card.card(made.evidence, spec, name),
        evidence=made.evidence,
        extra_files=made.files,
        force=spec.force,
    )


def _portable(spec: FinetuneSpec) -> dict[str, Any]:
    """The spec without folders of the machine that ran it."""
    data = spec.to_dict()
    for key in ("labels", "residue_labels", "residue_mask", "output"):
        data[key] = Path(data[key]).name if data[key] else data[key]
    if Path(data["base"]).exists():
        data["base"] = Path(data["base"]).resolve().name
    for key in ("cache", "address", "wild_type", "threads", "force"):
        data.pop(key)
    return data

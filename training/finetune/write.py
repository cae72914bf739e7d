"""From a fit to the bundle on disk: the head, its calibration, evidence and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bioseq.bundles.bundle import Bundle, write_bundle
from bioseq.heads.head import NEIGHBOURS, Head, clean
from bioseq.inference.predictor import Predictor
from bioseq.specs.finetune import FinetuneSpec
from training.finetune.evaluation import card
from training.finetune.evaluation.report import report
from training.finetune.fit import Fit, pooled
from training.finetune.ood import fit_ood
from training.tables.labels import Labels
from training.tables.splits import Split

HALF_FROM = 50_000  # tensors of more numbers are stored in float16


def write_head(
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
    # what is stored is what is measured: large tensors lose half of their bits here, before anything is measured
    fit.tensors = {
        k: v.half()
        if v.dtype == torch.float32 and v.numel() >= HALF_FROM and not k.startswith("trunk.")
        else v
        for k, v in fit.tensors.items()
    }
    train = parts["train"] if fit.embedded is None else parts["train"].take(fit.embedded)
    one_protein = len({len(s) for s in train.sequences}) == 1
    rows = pooled(labels.task, fit.features["train"])
    ood = fit_ood(
        rows,
        [clean(s) for s in train.sequences],
        train.ids,
        order_term=not one_protein,
        neighbours=spec.neighbours,
        seed=spec.seed,
    )
    tensors = {**fit.tensors, **ood.tensors()}
    head = Head(
        name=name,
        task=labels.task,
        labels=list(labels.classes or labels.targets),
        settings=fit.settings,
        tensors={k: v for k, v in tensors.items() if not k.startswith("trunk.")},
        calibration={},
        neighbour_ids=ood.ids,
    )
    calibration, evidence, curves = report(spec, head, labels, split, parts, fit, predictor, method)
    evidence["base"] = {"name": predictor.name, "hash": predictor.weights_hash, "dtype": predictor.dtype}
    evidence = card.plain(evidence)
    files: dict[str, Path] = {}
    if ood.ids:
        files[NEIGHBOURS] = scratch / NEIGHBOURS
        files[NEIGHBOURS].write_text(json.dumps(ood.ids), "utf-8")
    if curves:
        files[card.PLOT] = scratch / card.PLOT
        card.reliability_plot(files[card.PLOT], curves)
    return write_bundle(
        spec.output,
        manifest_fields={
            "kind": "head",
            "name": name,
            "alphabet": predictor.alphabet.name,
            "architecture": fit.architecture,
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
                "head": fit.settings,
                "training": _portable(spec),
                "citation": list(spec.citation),
            },
        },
        tensors=tensors,
        adapter=fit.adapter,
        calibration=calibration,
        card=card.card(evidence, spec, name),
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

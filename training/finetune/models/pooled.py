"""The data of a head on pooled features: embeddings, homologs and folds, the same for a frozen head and its baselines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bioseq.errors import SpecError
from bioseq.heads.features import clean
from bioseq.heads.homology import TrainingRows
from bioseq.heads.relatives import Links
from bioseq.homologs.mmseqs import find_mmseqs
from bioseq.inference.predictor import Predictor
from bioseq.specs.finetune import PROFILE, FinetuneSpec
from training.finetune import homologs
from training.finetune.embeddings import embed_cached
from training.finetune.fit import Fit, head_settings, n_outputs, say, site_context
from training.finetune.models.frozen import fit_again, fit_frozen
from training.finetune.models.rows import Held, Rows
from training.tables.dealing import grouped_folds
from training.tables.labels import Labels
from training.tables.splits import FEW_FAMILIES, Split

FEW = 100  # validation rows below which folds choose
MOST_VARIANTS = 2000  # training variants of one protein above which the embedding is not tried as a feature
SOME = {
    "train": 384,
    "valid": 0,
    "test": 192,
}  # then still embedded, for the out-of-domain score and its check


@dataclass
class Data:
    """`rows` are the training rows, then the validation rows; `features` the embeddings by part."""

    rows: Rows
    held: Held
    features: dict[str, np.ndarray]
    links: dict[str, Links]
    profiles: dict[str, list[np.ndarray]]
    training: TrainingRows | None
    trained: Labels
    grouped_by: str


def _embed(predictor: Predictor, some: Labels, most: int | None, spec: FinetuneSpec, part: str) -> np.ndarray:
    """float32 [N, D]; NaN in rows over `most`, which a draw leaves out."""
    if most == 0:
        return np.full((len(some), predictor.config.d_model), np.nan, np.float32)
    chosen = np.arange(len(some))
    if most is not None and most < len(some):
        chosen = np.sort(np.random.default_rng(spec.seed).choice(len(some), most, replace=False))
    found, cached = embed_cached(
        predictor, some.take(chosen).sequences, cache=spec.cache, label=f"embedding the {part} rows"
    )
    if cached:
        say(f"{len(found)} embeddings of the {part} rows from the cache")
    out = np.full((len(some), len(found[0].reshape(-1))), np.nan, np.float32)
    out[chosen] = np.stack(found).reshape(len(found), -1)
    return out


def prepare(
    spec: FinetuneSpec,
    split: Split,
    places: dict[str, np.ndarray],
    parts: dict[str, Labels],
    predictor: Predictor,
    scratch: Path,
    *,
    folds: bool = True,
) -> Data:
    """Embed, search, and settle the folds. `folds` False always chooses on the validation part."""
    train, valid, test = parts["train"], parts["valid"], parts["test"]
    variants = split.variants
    alphabet = predictor.alphabet.name
    both = np.concatenate([places["train"], places["valid"]])
    refit = folds and (
        len(valid) < FEW or (variants is None and split.families_in(places["valid"]) < FEW_FAMILIES)
    )
    way, found = "", [(np.arange(len(train)), np.arange(len(train), len(both)))]
    if refit:
        found, way = split.folds(both, seed=spec.seed)
        if not found:
            found, way = grouped_folds(np.arange(len(both)), seed=spec.seed), "row"
    # the masked marginals are a baseline too, whatever features were named
    context = site_context(variants, both, predictor, masked_marginal=True, homologs=spec.homologs == "auto")
    wrong = sorted(set(spec.features or ()) & set(context.absent))
    if wrong:
        raise SpecError(
            f"{', '.join(wrong)} describe amino acids; {alphabet} sequences have none.",
            field="features",
            hint="Leave them out.",
        )
    if variants is not None and PROFILE in (spec.features or ()):
        raise SpecError(
            "profile tells proteins apart, and these are variants of one protein, whose homologs are the same.",
            field="features",
            hint="Leave it out: masked_marginal holds what the homologs say of a substitution.",
        )
    most: dict[str, int | None] = dict.fromkeys(parts, None) | {"train": spec.max_embedded}
    if variants is not None and spec.max_embedded is not None:
        most |= {"valid": 1000, "test": 1000}
    elif (
        folds
        and variants is not None
        and len(both) > MOST_VARIANTS
        and spec.features is None
        and spec.method is None
    ):
        most = dict(SOME)
        say(f"{most['train']} of the training variants are embedded; the sites speak for the others")
    features = {part: _embed(predictor, some, most[part], spec, part) for part, some in parts.items()}
    labels = train.joined(valid)
    texts = [clean(s) for s in labels.sequences]
    rows = Rows(
        np.concatenate([features["train"], features["valid"]]),
        texts,
        labels.y,
        labels.weights,
        found,
        refit,
        context,
        groups=split.resampled(both),
    )
    held = Held(features["test"], [clean(s) for s in test.sequences])
    trained = labels if refit else train
    training, links = None, {}
    options: dict[str, Any] = {"cache": spec.cache, "threads": spec.threads}
    if spec.homologs == "auto" and alphabet == "protein":
        folder = scratch / "homologs"
        training = homologs.training_rows(
            trained, folder, unit=spec.units, licence=spec.licence, variants=variants is not None
        )
        if variants is None and find_mmseqs() is None:
            say("MMseqs2 is not installed: no homologs are searched among the training rows")
            training = None
        elif variants is None:
            all_links = homologs.links_cached(
                texts, training, label="homologs of the training rows", **options
            )
            links["test"] = homologs.links_cached(
                held.sequences, training, label="homologs of the test rows", **options
            )
            links["valid"] = all_links.take(np.arange(len(train), len(labels)))
            outputs = n_outputs(labels)
            rows.homology = homologs.blocks(all_links, trained, outputs, own=True)
            held.homology = homologs.blocks(links["test"], trained, outputs, own=False)
    profiles = {}
    if variants is None and homologs.wants_profiles(spec, len(labels), alphabet):
        every = homologs.profiles_cached(
            texts, per_residue=False, label="profiles of the training rows", **options
        )
        profiles["valid"] = every[len(train) :]
        profiles["test"] = homologs.profiles_cached(
            held.sequences, per_residue=False, label="profiles of the test rows", **options
        )
        rows.profile, held.profile = np.stack(every), np.stack(profiles["test"])
    return Data(rows, held, features, links, profiles, training, trained, way)


def calibrated_on(data: Data) -> str:
    if data.rows.refit:
        return (
            f"out-of-fold outputs of {len(data.rows.folds)} folds grouped by {data.grouped_by}, over training and "
            "validation rows; they also chose the features and the model. The head was then fitted on all of them, and "
            "so were the baselines (cross-conformal, Vovk 2015); the figures on the test part, whose rows chose nothing, "
            "are the check"
        )
    return (
        "the validation rows, which the head was not fitted on; they also chose the model and stopped its training, so "
        "the figures on the test part are the check"
    )


def fit_pooled(
    spec: FinetuneSpec,
    split: Split,
    places: dict[str, np.ndarray],
    parts: dict[str, Labels],
    predictor: Predictor,
    *,
    scratch: Path,
) -> Fit:
    """The best of all frozen models, with everything that its evaluation needs."""
    data = prepare(spec, split, places, parts, predictor, scratch)
    labels, rows = parts["train"], data.rows
    best = fit_frozen(
        labels.task,
        rows,
        n_outputs(labels),
        models=spec.models,
        only=spec.features,
        balance=spec.class_weights,
        seed=spec.seed,
        tick=say,
    )
    tensors = {
        "features.mean": torch.from_numpy(best.standard.mean),
        "features.scale": torch.from_numpy(best.standard.scale),
        **best.net.tensors(),
    }
    if labels.task == "regression":
        tensors["target.offset"] = torch.from_numpy(best.offset).float()
        tensors["target.scale"] = torch.from_numpy(best.scale).float()
    if "masked_marginal" in best.blocks:
        assert rows.context.odds is not None
        tensors["masked_marginal.odds"] = torch.from_numpy(rows.context.odds)

    def relearn(some: np.ndarray, seed: int) -> np.ndarray:
        fewer = rows.take(some, [])
        again = fit_again(labels.task, fewer, n_outputs(labels), best, balance=spec.class_weights, seed=seed)
        return again.outputs(data.held.matrix(best.blocks, rows.context, some))

    known = ~np.isnan(rows.embeddings[rows.trained]).any(1)
    if not known.all():  # only of the training part, where a draw says which
        known[len(labels) :] = False
    return Fit(
        head_settings(labels, "frozen", best.blocks, rows.context),
        tensors,
        data.features,
        data.trained,
        calibrated_on(data),
        best.out,
        best.y,
        best.spread,
        best.setting,
        best.tried,
        embedded=np.flatnonzero(known),
        rows=rows,
        held=data.held,
        links=data.links,
        profiles=data.profiles,
        training=data.training,
        relearn=relearn,
    )

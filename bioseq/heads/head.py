"""Task heads: from a backbone's features (and the sequence) to predictions in the task's own terms.

A head is a small network over standardised features: the pooled embedding, and sequence feature blocks
(`bioseq.heads.features`), labels of homologs (`homology`) and their profile (`profiles`) where validation chose them.
Per residue it is a stack of 1D convolutions over the residues' embeddings, letters, profile and transferred labels. Target
scaling, units, calibration and the out-of-domain score live in the head. Inference needs torch and numpy only, and a
sequence's result does not depend on its neighbours.

Tensors of model.safetensors (M members of an ensemble, averaged; F features, C outputs):
    features.mean, features.scale [F]
    layers.{i}.weight [M, in, out], layers.{i}.bias [M, 1, out]     GELU between
    skip.weight [M, H, out]                                         from the last H features straight to the outputs
    homologs.labels [R, T]                                          of the training rows in the folder homologs/
    conv.{i}.weight [out, in, k], conv.{i}.bias [out]               per residue, GELU between
    target.offset, target.scale [C]                                 regression
    masked_marginal.odds [L, 20], ood.*, neighbours.points, trunk.*         (trunk: `full` fine-tuning)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from bioseq.backbones.pooling import EmbedOptions
from bioseq.bundles.manifest import Identity, fits
from bioseq.errors import BundleError
from bioseq.heads import calibration as applied
from bioseq.heads import features as blocks
from bioseq.heads.features import Context, kept
from bioseq.heads.homology import TrainingRows, transfer
from bioseq.heads.ood import OodScore
from bioseq.heads.relatives import Links, Relatives
from bioseq.heads.residues import convolve, flat_residues, residue_inputs
from bioseq.heads.searching import HeadSearch

if TYPE_CHECKING:
    from bioseq.backbones.packed.encoder import PackedEncoder
    from bioseq.bundles.bundle import Bundle
    from bioseq.homologs.profile import Profile

NEIGHBOURS = "neighbours.json"
_KEYS = {
    "method", "blocks", "pooling", "layers", "targets", "classes", "wild_type", "sites", "statement", "homologs",
    "reference",
}  # fmt: skip
_RENAMED = {"density": "masked_marginal"}  # blocks of older bundles


@dataclass
class Head:
    """A loaded head. `settings` is the manifest's extra.head; `calibration` its calibration.json."""

    name: str
    task: str
    labels: list[str]
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    calibration: dict[str, Any]
    base_hash: str | None = None
    base_weights_hash: str | None = None
    version: int | None = None
    units: Any = None
    content_hash: str = ""
    adapter: Path | None = None
    trunk: PackedEncoder | None = None
    neighbour_ids: list[str] = field(default_factory=list)
    alphabet: str = "protein"
    rows: TrainingRows | None = None  # the training rows, unless they were kept out of the bundle

    def __post_init__(self) -> None:
        unknown = set(self.settings) - _KEYS
        if unknown:
            raise BundleError(f"head {self.name}: unknown settings {', '.join(sorted(unknown))}.")
        t = {  # large tensors are stored in half precision; neighbours stay so, they are many
            k: v.float() if v.dtype == torch.float16 and not k.startswith("neighbours.") else v
            for k, v in self.tensors.items()
        }
        self.tensors = t
        self.blocks: tuple[str, ...] = tuple(_RENAMED.get(b, b) for b in self.settings["blocks"])
        stem = "conv" if self.per_residue else "layers"
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            while f"{stem}.{len(self._layers)}.weight" in t:
                i = len(self._layers)
                self._layers.append((t[f"{stem}.{i}.weight"], t[f"{stem}.{i}.bias"]))
            self._mean, self._scale = t["features.mean"], t["features.scale"]
            self.ood = OodScore.from_tensors(t, self.neighbour_ids, self.alphabet)
        except KeyError as error:
            raise BundleError(f"head {self.name}: tensor {error} is missing.") from None
        if not self._layers:
            raise BundleError(f"head {self.name} has no layers.")
        odds = t.get("masked_marginal.odds", t.get("density.odds"))
        self.context = Context(
            self.settings.get("wild_type") or "",
            tuple(self.settings.get("sites") or ()),
            None if odds is None else odds.numpy(),
            self.alphabet,
        )

    @property
    def per_residue(self) -> bool:
        return self.task == "per_residue"

    @property
    def targets(self) -> list[str]:
        return list(self.settings.get("targets") or ())

    @property
    def classes(self) -> list[str]:
        return list(self.settings.get("classes") or ())

    @property
    def embed_options(self) -> EmbedOptions:
        """What this head needs of the backbone."""
        return EmbedOptions(
            self.settings.get("pooling", "mean"), tuple(self.settings.get("layers", (-1,))), self.per_residue
        )

    @classmethod
    def load(cls, bundle: Bundle) -> Head:
        """Raises `BundleError` for a bundle that is no head, or lacks something."""
        manifest = bundle.manifest
        if manifest.kind != "head":
            raise BundleError(f"{manifest.name} is a {manifest.kind}, not a head.", hint="Name a head.")
        if "head" not in manifest.extra:
            raise BundleError(f"{manifest.name}: manifest has no extra.head.")
        tensors = bundle.read_tensors()
        trunk = None
        own = {k.removeprefix("trunk."): tensors.pop(k) for k in list(tensors) if k.startswith("trunk.")}
        if own:
            from bioseq.backbones.packed.config import ModelConfig
            from bioseq.backbones.packed.weights import build_encoder

            trunk = build_encoder(ModelConfig.from_dict(manifest.architecture), own, error=BundleError)
            trunk.requires_grad_(False)
        ids = []
        if NEIGHBOURS in manifest.files:
            ids = json.loads(bundle.file(NEIGHBOURS).read_text("utf-8"))
        return cls(
            name=manifest.name,
            version=manifest.version,
            task=manifest.task or "",
            labels=list(manifest.labels),
            settings=dict(manifest.extra["head"]),
            tensors=tensors,
            calibration=bundle.calibration(),
            base_hash=manifest.base_hash,
            base_weights_hash=manifest.base_weights_hash,
            units=manifest.units,
            content_hash=manifest.content_hash,
            adapter=bundle.adapter,
            trunk=trunk,
            neighbour_ids=ids,
            alphabet=manifest.alphabet,
            rows=TrainingRows.read(bundle, tensors),
        )

    # ------------------------------------------------------------------ numbers

    @property
    def reads_homologs(self) -> bool:
        """Whether `find` searches anything."""
        return self.rows is not None or "profile" in self.blocks

    def find(self, texts: Sequence[str], profiles: Sequence[Profile] | None = None) -> Relatives:
        """What homologs say of cleaned sequences, searched now unless the `profiles` are given."""
        reference = self.settings.get("reference") or ""
        return HeadSearch(self.name, self.per_residue, "profile" in self.blocks, reference, self.rows).find(
            texts, profiles
        )

    def _inputs(self, features: np.ndarray, sequences: Sequence[str], told: Relatives) -> torch.Tensor:
        parts = []
        for b in self.blocks:
            if b == "embedding":
                parts.append(features.reshape(len(features), -1))
            elif b == "homology":
                assert self.rows is not None and told.links is not None
                parts.append(transfer(told.links, self.rows.y, self.task, len(self.classes)))
            elif b == "profile":
                assert told.profiles is not None
                parts.append(np.reshape(told.profiles, (len(sequences), -1)))
            else:
                parts.append(blocks.compute(b, sequences, self.context))
        return torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))

    @torch.inference_mode()
    def members(
        self, features: np.ndarray, sequences: Sequence[str], told: Relatives | None = None
    ) -> np.ndarray:
        """Uncalibrated outputs of each member of the ensemble, float32 [M, N, C]."""
        return self.members_of(self._inputs(features, sequences, told or Relatives()))

    @torch.inference_mode()
    def members_of(self, inputs: torch.Tensor) -> np.ndarray:
        """The same from the blocks' matrix [N, F]."""
        x = (inputs - self._mean) * self._scale
        out = x[None]
        for i, (weight, bias) in enumerate(self._layers):
            out = F.gelu(out) if i else out
            out = torch.baddbmm(bias, out.expand(len(weight), -1, -1), weight)
        if "skip.weight" in self.tensors:
            skip = self.tensors["skip.weight"]
            out = out + x[:, -skip.shape[1] :] @ skip
        if self.task == "regression":
            out = out * self.tensors["target.scale"] + self.tensors["target.offset"]
        return out.numpy()

    def raw(self, features: Any, sequences: Sequence[str], told: Relatives | None = None) -> Any:
        """Uncalibrated outputs float32 [N, C]: values in the target's scale (regression) or logits. Per residue
        a list of [L_i, C]. `sequences` are cleaned; `told` is what their homologs say (`find`)."""
        if self.per_residue:
            told = told or Relatives()
            none: list[Any] = [None] * len(sequences)
            columns = (
                features if "embedding" in self.blocks else none,
                sequences,
                (told.profiles or none) if "profile" in self.blocks else none,
                (told.labels or none) if "homology" in self.blocks else none,
            )
            inputs = [residue_inputs(*one) for one in zip(*columns, strict=True)]
            scaling = (self._mean.numpy(), self._scale.numpy())
            return convolve(inputs, self._layers, scaling, self.tensors.get("skip.weight"))
        return self.members(features, sequences, told).mean(0)

    def probabilities(self, raw: np.ndarray) -> np.ndarray:
        """Calibrated probabilities [.., C] of raw outputs: two columns for binary, one a label for multilabel."""
        raw = raw.astype(np.float64)
        if self.task in ("binary", "multilabel"):
            p = applied.label_probabilities(raw, self.calibration)
            return np.column_stack([1 - p[:, 0], p[:, 0]]) if self.task == "binary" else p
        return applied.class_probabilities(raw, self.calibration)

    # -------------------------------------------------------------- predictions

    def route(self, name: str) -> str | None:
        """The pass that this head, loaded as `name`, reads: its own, or the bare trunk's (None)."""
        return name if self.adapter is not None or self.trunk is not None else None

    def pooled(self, features: Any) -> np.ndarray:
        """float32 [N, D] that the out-of-domain score and the nearest training examples are taken from."""
        if self.per_residue:
            return (
                np.stack([flat_residues(f).mean(0) for f in features]) if len(features) else np.zeros((0, 1))
            )
        return np.asarray(features, np.float32).reshape(len(features), -1)

    def predict(
        self,
        features: Any,
        sequences: Sequence[str],
        *,
        lengths: Sequence[int] = (),
        nearest: Sequence[int] = (),
        members: Sequence[bool] = (),
        told: Relatives | None = None,
    ) -> list[dict[str, Any]]:
        """One prediction a sequence. `features` float32 [N, D] as `embed_options` asks (a list of [L_i, D] per
        residue). `lengths`: residues that the features cover, fewer than the sequence's where it was truncated; everything
        is then computed of those alone. `nearest`: how many training examples to name, for each sequence; `members`: whether to give what
        each member of the ensemble says. `told`: what the homologs of `kept(sequences, lengths)` say, where `find` was called
        before. Raises `SequenceError` for a sequence that this head cannot judge (see
        `bioseq.heads.features`)."""
        if not len(sequences):
            return []
        if self.per_residue:
            lengths = [flat_residues(f).shape[0] for f in features]
        texts = kept(sequences, lengths)
        told = told or self.find(texts)
        links, each = told.links, None
        if self.per_residue:
            raw = self.raw(features, texts, told)
        else:
            each = self.members(features, texts, told)
            raw = each.mean(0)
        pooled = self.pooled(features)
        ood = self.ood.score(pooled, texts)
        shared = [
            {"ood": o, "ood_percentile": p, "head": self.name, "version": self.version}
            for o, p in zip(ood.tolist(), self.ood.percentile(ood).tolist())
        ]
        rows = [{"task": self.task, **own, **rest} for own, rest in zip(self._values(raw, each), shared)]
        if self.rows is not None and links is not None:
            for row, evidence in zip(rows, self.rows.evidence(links)):
                row |= evidence
        asked = np.flatnonzero(nearest)
        if len(asked):
            closest = self.ood.nearest(pooled[asked], max(nearest))
            for i, near in zip(asked.tolist(), closest):
                rows[i]["nearest"] = self._named(i, near[: nearest[i]], links)
        if each is not None:
            for i in np.flatnonzero(members).tolist():
                said = [self._values(m[i : i + 1], None)[0] for m in each]
                key = "value" if self.task == "regression" else "probabilities"
                rows[i]["members"] = [m[key] for m in said]
        return rows

    def _named(self, query: int, near: list[tuple[str, float]], links: Links | None) -> list[dict[str, Any]]:
        """Training examples nearest by embedding, with what the alignment to each says where there is one."""
        out: list[dict[str, Any]] = [{"id": name, "similarity": s} for name, s in near]
        if self.rows is None or links is None:
            return out
        hits = links.take(np.array([query]))
        aligned = {e["id"]: e for e in self.rows.evidence(hits, len(hits.keys))[0]["nearest"]}
        none = {"identity": None, "coverage": None}
        return [e | (aligned.get(e["id"]) or none) for e in out]

    def half_widths(self, members: np.ndarray) -> np.ndarray:
        """Half widths of a regression's intervals [N, T], of its members' outputs [M, N, T]."""
        return applied.half_widths(members.std(0).astype(np.float64), self.calibration)

    def _values(self, raw: Any, members: np.ndarray | None) -> list[dict[str, Any]]:
        """`members` [M, N, C] shape a regression's intervals."""
        names = self.classes
        if self.task == "regression":
            radii = self.half_widths(raw[None] if members is None else members).tolist()
            rows = raw.astype(np.float64).tolist()
            if len(self.targets) == 1:
                return [
                    {"value": r[0], "interval": [r[0] - q[0], r[0] + q[0]], "probabilities": None}
                    for r, q in zip(rows, radii)
                ]
            return [
                {
                    "value": dict(zip(self.targets, r)),
                    "interval": {t: [v - q, v + q] for t, v, q in zip(self.targets, r, radius)},
                    "probabilities": None,
                }
                for r, radius in zip(rows, radii)
            ]
        if self.task == "per_residue":
            out = []
            for one in raw:
                p = self.probabilities(one)
                value = "".join(names[c] for c in p.argmax(1).tolist())
                out.append({"value": value, "interval": None, "probabilities": p.tolist(), "labels": names})
            return out
        p = self.probabilities(raw)
        if self.task == "multilabel":
            limits = self.calibration["thresholds"]
            return [
                {
                    "value": [n for n, v, limit in zip(names, row, limits) if v >= limit],
                    "interval": None,
                    "probabilities": dict(zip(names, row)),
                }
                for row in p.tolist()
            ]
        if self.task == "binary":
            called = (p[:, 1] >= self.calibration["thresholds"][0]).astype(int).tolist()
        else:
            called = p.argmax(1).tolist()
        return [
            {"value": names[c], "interval": None, "probabilities": dict(zip(names, row))}
            for c, row in zip(called, p.tolist())
        ]


def check_base(head: Head, backbone: Identity, backbone_name: str) -> None:
    """Raise `BundleError` if a head was made for another backbone."""
    if not fits(head, backbone):
        base = head.base_weights_hash or head.base_hash or "none"
        raise BundleError(
            f"head {head.name} was made for the backbone {base[:19]}, "
            f"not for {backbone_name} ({(backbone.weights_hash or backbone.content_hash)[:19]}).",
            hint="Train the head again on this backbone, or load the backbone it was made for.",
        )

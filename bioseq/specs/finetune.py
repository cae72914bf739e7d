"""The spec of a fine-tuning run: a table of labels in, a head bundle out (`bioseq finetune`)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bioseq.errors import SpecError
from bioseq.specs.base import Spec

Task = Literal["regression", "binary", "multiclass", "multilabel", "per_residue"]
Method = Literal["frozen", "lora", "full"]
SplitKind = Literal["column", "cluster", "mutations", "position", "random"]
LORA_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
# Sequence features that may stand beside the embedding; bioseq.heads.features computes them.
ORDER_BLOCKS = ("composition", "dipeptide", "gapped", "terminal")
SITE_BLOCKS = ("onehot", "pairs", "properties", "mutations", "masked_marginal")
PROFILE = "profile"  # of homologs in the shipped reference set; bioseq.heads.profiles computes it
FEATURE_BLOCKS = (*ORDER_BLOCKS, PROFILE, *SITE_BLOCKS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSettings(Spec):
    """How rows are divided into train, validation and test.

    kind: `column` (the file's `set` and `validation`), `cluster` (by sequence similarity), `mutations` (by
    distance from the wild type), `position` (by mutated position), `random`. None takes the first that leaves
    enough rows: `column` if the file has one; for variants of one protein `mutations`, or `position` where nearly all
    are single substitutions; else `cluster`; last `random`.
    valid, test: shares of the rows. identity: of clusters. train_mutations: the farthest distance that trains; None
    is 2, or the nearest number that leaves enough rows on both sides. position_mode: `contiguous` holds out a stretch
    of positions, `modulo` every k-th; None is `contiguous`, and `modulo` where no kind was asked for.
    """

    kind: SplitKind | None = None
    valid: float = 0.15
    test: float = 0.15
    identity: float = 0.3
    train_mutations: int | None = None
    position_mode: Literal["contiguous", "modulo"] | None = None

    def validate(self) -> None:
        for name in ("valid", "test"):
            if not 0 < getattr(self, name) < 0.9:
                raise SpecError(
                    f"{getattr(self, name)} is not a share between 0 and 0.9.", field=f"split.{name}"
                )
        if self.valid + self.test >= 0.95:
            raise SpecError(
                f"validation and test together take {self.valid + self.test:g} of the rows; at most 0.95 is allowed.",
                field="split",
            )
        if not 0.2 <= self.identity <= 1:
            raise SpecError(f"{self.identity} is not an identity between 0.2 and 1.", field="split.identity")
        if self.train_mutations is not None and self.train_mutations < 1:
            raise SpecError("at least 1 is needed.", field="split.train_mutations")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings(Spec):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). `targets` are peft's module names: by default
    query, key and value of every layer, where ESM-2 needs least for most (Sledzieski et al. 2024)."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("query", "key", "value")

    def validate(self) -> None:
        if self.rank < 1:
            raise SpecError(f"{self.rank} is below 1.", field="lora.rank")
        if self.alpha < 1:
            raise SpecError(f"{self.alpha} is below 1.", field="lora.alpha")
        if not 0 <= self.dropout < 1:
            raise SpecError(f"{self.dropout} is not a share between 0 and 1.", field="lora.dropout")
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise SpecError(
                    f"{target!r} is not a module of the encoder.",
                    field="lora.targets",
                    hint=f"Known: {', '.join(LORA_TARGETS)}.",
                )
        if not self.targets:
            raise SpecError("at least one module is needed.", field="lora.targets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSpec(Spec):
    """One run of `bioseq finetune`.

    labels: CSV, TSV or Parquet (plain or compressed) with a `sequence` column, or `mutant` and `wild_type`; for
    residues a FASTA file of sequences, with `residue_labels` (and `residue_mask`) FASTA beside it.
    targets: label columns. task: guessed from the labels unless given.
    output: the bundle's folder. name: of the head; None is the folder's name. register: also enter it in the
    registry under this name, `accept_weak` even if it does not beat its baselines.
    base: the backbone. method: None is `lora` on a GPU, else `frozen`.
    features: sequence features beside the embedding, or None to let the validation part choose; see
    bioseq.heads.features. models: which frozen models to try.
    weight: column of row weights. replicates: what to do with one sequence's several values: `error` or `mean`.
    max_train, max_valid, max_test: at most so many rows of each part, seeded; None is all. max_embedded: of the
    training rows of a frozen head at most so many are embedded; the others train the sequence features alone, their
    embedding set to the mean.
    epochs, lr, batch_tokens, lora: of `lora` and `full`. workers: Ray Train processes for those.
    level: of prediction intervals. neighbours: training examples kept for `nearest`.
    homologs: `auto` searches the table's own training rows for homologs: their labels become features where that helps,
    and the rows travel in the bundle so that predictions name the nearest. `none` keeps them out of it, and
    the ids of variants, which tell them; the wild type of such a table stays where features of sites need it.
    """

    labels: str
    targets: tuple[str, ...] = ()
    output: str
    name: str | None = None
    residue_labels: str | None = None
    residue_mask: str | None = None
    task: Task | None = None
    base: str = "default"
    method: Method | None = None
    split: SplitSettings = SplitSettings()
    features: tuple[str, ...] | None = None
    models: tuple[Literal["linear", "mlp"], ...] = ("linear", "mlp")
    wild_type: str | None = None
    weight: str | None = None
    id_column: str | None = None
    replicates: Literal["error", "mean"] = "error"
    class_weights: Literal["auto", "none", "balanced"] = "auto"
    max_train: int | None = None
    max_valid: int | None = None
    max_test: int | None = None
    max_embedded: int | None = None
    epochs: int = 10
    lr: float | None = None
    batch_tokens: int = 4096
    lora: LoraSettings = LoraSettings()
    workers: int = 1
    address: str | None = None
    level: float = 0.9
    neighbours: int = 2000
    homologs: Literal["auto", "none"] = "auto"
    bootstrap: int = 200
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    cache: str | None = None
    units: str | None = None
    licence: str = "unknown"
    citation: tuple[str, ...] = ()
    register: str | None = None
    accept_weak: bool = False
    force: bool = False

    def validate(self) -> None:
        if not self.labels:
            raise SpecError("a table of labels is needed.", field="labels")
        if not self.output:
            raise SpecError("a bundle folder is needed.", field="output", hint="Give one with -o.")
        if not self.targets and self.residue_labels is None:
            raise SpecError(
                "at least one label column is needed.", field="targets", hint="Give them as --targets A,B."
            )
        if len(set(self.targets)) != len(self.targets):
            raise SpecError("a column is named twice.", field="targets")
        if self.residue_labels is not None and self.task not in (None, "per_residue"):
            raise SpecError("residue labels go with task per_residue.", field="task")
        if self.residue_labels is None and self.task == "per_residue":
            raise SpecError("per_residue needs a FASTA file of labels.", field="residue_labels")
        if self.residue_mask is not None and self.residue_labels is None:
            raise SpecError("a mask goes with residue labels.", field="residue_mask")
        if not self.models:
            raise SpecError("at least one model is needed.", field="models")
        for name, least in (("epochs", 1), ("workers", 1), ("batch_tokens", 64), ("bootstrap", 20)):
            if getattr(self, name) < least:
                raise SpecError(f"{getattr(self, name)} is below {least}.", field=name)
        for name in ("max_train", "max_valid", "max_test", "max_embedded"):
            value = getattr(self, name)
            if value is not None and value < 20:
                raise SpecError(f"{value} is below 20.", field=name)
        if self.neighbours < 0:
            raise SpecError(f"{self.neighbours} is below 0.", field="neighbours")
        if not 0.5 <= self.level < 1:
            raise SpecError(f"{self.level} is not a level between 0.5 and 1.", field="level")
        if self.lr is not None and not 0 < self.lr < 1:
            raise SpecError(f"{self.lr} is not a learning rate between 0 and 1.", field="lr")
        if self.features is not None:
            for block in self.features:
                if block not in FEATURE_BLOCKS:
                    raise SpecError(
                        f"{block!r} is not a feature block.",
                        field="features",
                        hint=f"Known: {', '.join(FEATURE_BLOCKS)}.",
                    )

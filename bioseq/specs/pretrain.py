"""The spec of a pretraining run: everything that decides its outcome, and where it runs.

Fields of `PINNED` decide the weights; a resumed run must name the same values. The others (length of a run
before its decay, cadence, workers, paths) may change on resume.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bioseq.errors import SpecError
from bioseq.sequences.masking import Masking
from bioseq.specs.base import Spec

PINNED = (
    "alphabet",
    "reverse_complement",
    "model",
    "masking",
    "homologs",
    "optimiser",
    "sampling",
    "seed",
    "tokens_per_step",
    "crop",
    "precision",
    "frozen",
)


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec(Spec):
    """Shape of the encoder; see `bioseq.backbones.packed.config`. `init` "local" lets the first attention heads of each
    layer begin by looking at fixed neighbours (`training.pretrain.initial`); "esm2" is the published initialisation.
    `residual` and `reads_letters` are switched off for ablations of a model that reads homologs."""

    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    token_dropout: bool = True
    max_residues: int = 1022
    reads_homologs: bool = False
    convolution: int = 0
    residual: bool = True
    reads_letters: bool = True
    init: Literal["esm2", "local"] = "esm2"
    init_std: float = 0.02

    def validate(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "d_ff", "max_residues"):
            _at_least(self, name, 1, "model.")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise SpecError(
                f"{self.n_heads} heads do not divide {self.d_model} into even head sizes.",
                field="model.n_heads",
            )
        _above(self, "init_std", 0.0, "model.")
        if self.convolution < 0 or (self.convolution and self.convolution % 2 == 0):
            raise SpecError(
                f"{self.convolution} is not allowed; 0 (none) or an odd width is.", field="model.convolution"
            )
        if not self.reads_homologs and not (self.residual and self.reads_letters):
            name = "reads_letters" if self.residual else "residual"
            raise SpecError("false is for a model that reads homologs.", field=f"model.{name}")


@dataclass(frozen=True, kw_only=True)
class HomologsSpec(Spec):
    """How a model that reads homologs (`model.reads_homologs`) is shown a record: with none of them for a share
    `none` of its turns (then other residues are masked), with a random part for a share `thinned`, else with all."""

    none: float = 0.2
    thinned: float = 0.35

    def validate(self) -> None:
        for name in ("none", "thinned"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise SpecError(f"{getattr(self, name)} is not between 0 and 1.", field=f"homologs.{name}")
        if self.none + self.thinned > 1.0 + 1e-9:
            raise SpecError(
                f"none and thinned are shares of the turns; {self.none} + {self.thinned} is over 1.",
                field="homologs.thinned",
            )


@dataclass(frozen=True, kw_only=True)
class OptimiserSpec(Spec):
    """ "adamw" (Loshchilov & Hutter 2019, arXiv 1711.05101): matrices decay, biases and norms do not. "muon"
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the matrices of the layers, AdamW for the
    rest; `momentum` is Muon's."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 4e-4
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0

    def validate(self) -> None:
        for name in ("lr", "eps", "clip"):
            _above(self, name, 0.0, "optimiser.")
        for name in ("beta1", "beta2", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SpecError(f"{getattr(self, name)} is not in [0, 1).", field=f"optimiser.{name}")
        if self.weight_decay < 0:
            raise SpecError(f"{self.weight_decay} is below 0.", field="optimiser.weight_decay")


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec(Spec):
    """`warmup` and `decay` in steps; `final` as a share of the peak. See `training.pretrain.schedule`."""

    kind: Literal["cosine", "wsd", "constant"] = "wsd"
    warmup: int = 2000
    decay: int = 0
    final: float = 0.1

    def validate(self) -> None:
        for name in ("warmup", "decay"):
            _at_least(self, name, 0, "schedule.")
        if not 0.0 <= self.final <= 1.0:
            raise SpecError(f"{self.final} is not between 0 and 1.", field="schedule.final")


@dataclass(frozen=True, kw_only=True)
class EvalSpec(Spec):
    """In-training perplexity: every `every` steps (0: at the end only) on `proteins` of each set (0: all),
    `passes` of the passes over the residues (0: all); at the end all of `final_proteins` (0: all)."""

    every: int = 1000
    proteins: int = 200
    passes: int = 1
    final_proteins: int = 0
    final_passes: int = 0
    seed: int = 0

    def validate(self) -> None:
        for name in ("every", "proteins", "passes", "final_proteins", "final_passes", "seed"):
            _at_least(self, name, 0, "eval.")


@dataclass(frozen=True, kw_only=True)
class WorkersSpec(Spec):
    """Processes of a run. `min_count` below `count` makes the range elastic (Ray only); `threads` per process
    (0: torch's default); `cpus` is what Ray reserves for each."""

    count: int = 1
    min_count: int = 0
    gpus: bool = False
    cpus: int = 1
    threads: int = 0
    parallel: Literal["ddp", "fsdp"] = "ddp"
    max_failures: int = 3

    def validate(self) -> None:
        for name in ("count", "cpus"):
            _at_least(self, name, 1, "workers.")
        for name in ("min_count", "threads"):
            _at_least(self, name, 0, "workers.")
        _at_least(self, "max_failures", -1, "workers.")
        if self.min_count > self.count:
            raise SpecError(
                f"{self.min_count} is over workers.count {self.count}.", field="workers.min_count"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainSpec(Spec):
    """A whole run. `tokens_per_step` is global (all workers, all micro-batches); `micro_tokens` is what one
    worker holds at once, so it bounds memory and accumulates gradients. `precision` "bfloat16" is autocast
    with float32 weights. `log_every`, `checkpoint_every` in steps; `checkpoint_minutes` adds a clock (0: off);
    `keep` checkpoints are kept beside the best one. `about` is what the card says of the data. `frozen`: of the
    backbone `init` nothing is trained but what lets it read homologs, so that without homologs it stays what it was.
    `reverse_complement`: each turn of a sequence (or crop) is read on either strand, drawn by the seed. Right for DNA
    whose strand is not known; an RNA is one strand, so for RNA only where both occur (double-stranded viruses)."""

    name: str
    model: ArchitectureSpec
    steps: int
    tokens_per_step: int
    micro_tokens: int
    crop: int = 1022
    alphabet: Literal["protein", "dna", "rna"] = "protein"
    reverse_complement: bool = False
    sampling: Literal["uniform", "cluster"] = "uniform"
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    masking: Masking = field(default_factory=Masking)
    homologs: HomologsSpec = field(default_factory=HomologsSpec)
    optimiser: OptimiserSpec = field(default_factory=OptimiserSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    eval: EvalSpec = field(default_factory=EvalSpec)
    workers: WorkersSpec = field(default_factory=WorkersSpec)
    log_every: int = 10
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 0.0
    keep: int = 2
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    peak_tflops: float = 0.0
    licence: str = "CC-BY-4.0"
    about: str = ""
    corpus: str | None = None
    output: str | None = None
    engine: Literal["auto", "ray", "local"] = "auto"
    address: str | None = None
    storage: str | None = None
    init: str | None = None
    frozen: bool = False
    register: str | None = None
    resume: bool = False

    def validate(self) -> None:
        for name in (
            "steps",
            "tokens_per_step",
            "micro_tokens",
            "crop",
            "log_every",
            "checkpoint_every",
            "keep",
        ):
            _at_least(self, name, 1)
        _at_least(self, "seed", 0)
        if self.reverse_complement and self.alphabet == "protein":
            raise SpecError(
                "a protein has no complementary strand.",
                field="reverse_complement",
                hint="Set reverse_complement=false, or alphabet=dna for nucleotides.",
            )
        if self.compile and not self.workers.gpus:
            raise SpecError(
                "torch.compile needs minutes on a CPU before the first step and gains nothing there, as attention "
                "runs sequence by sequence.",
                field="compile",
                hint="Set compile=false, or workers.gpus=true.",
            )
        if self.frozen and not (self.init and self.model.reads_homologs and not self.model.convolution):
            raise SpecError(
                "frozen needs a backbone to begin with (init) that learns to read homologs "
                "(model.reads_homologs=true) without a convolution (model.convolution=0).",
                field="frozen",
            )
        if self.optimiser.kind == "muon" and self.workers.parallel == "fsdp":
            raise SpecError(
                "muon needs whole matrices, and fsdp shards them.",
                field="optimiser.kind",
                hint="Set optimiser.kind=adamw, or workers.parallel=ddp.",
            )
        if self.checkpoint_minutes < 0:
            raise SpecError(f"{self.checkpoint_minutes} is below 0.", field="checkpoint_minutes")
        if self.crop > self.model.max_residues:
            raise SpecError(
                f"{self.crop} residues are over the model's {self.model.max_residues}.",
                field="crop",
                hint="Lower crop or raise model.max_residues.",
            )
        for name in ("tokens_per_step", "micro_tokens"):
            if getattr(self, name) < min(self.crop + 2, 3):
                raise SpecError(f"{getattr(self, name)} tokens are too few for one residue.", field=name)
        if self.schedule.warmup + self.schedule.decay > self.steps:
            raise SpecError(
                f"warm-up {self.schedule.warmup} and decay {self.schedule.decay} are over the {self.steps} steps.",
                field="schedule.warmup",
            )


def _at_least(spec: Spec, name: str, low: int, prefix: str = "") -> None:
    value = getattr(spec, name)
    if value < low:
        raise SpecError(f"{value} is below {low}.", field=prefix + name)


def _above(spec: Spec, name: str, low: float, prefix: str = "") -> None:
    value = getattr(spec, name)
    if not value > low:
        raise SpecError(f"{value} is not above {low:g}.", field=prefix + name)

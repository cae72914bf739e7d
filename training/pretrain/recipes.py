"""Recipes: named functions, each returning a complete, frozen spec. Every field can be overridden.

`protein_8m` is tuned to what an hour of one CPU core can do; the larger ones follow ESM-2's published shapes
and learning rates (Lin et al. 2023) with a warm-up-stable-decay schedule, for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

from bioseq.errors import SpecError
from bioseq.sequences.masking import Masking
from bioseq.specs.pretrain import (
    ArchitectureSpec,
    EvalSpec,
    OptimiserSpec,
    PretrainSpec,
    ScheduleSpec,
    WorkersSpec,
)


def protein_tiny() -> PretrainSpec:
    """Two layers, minutes on one CPU core: to see a run work, and for tests."""
    return PretrainSpec(
        name="protein_tiny",
        model=ArchitectureSpec(n_layers=2, d_model=64, n_heads=4, d_ff=256, init="local"),
        steps=600,
        tokens_per_step=4096,
        micro_tokens=4096,
        crop=254,
        optimiser=OptimiserSpec(lr=4e-3),
        schedule=ScheduleSpec(kind="wsd", warmup=50, decay=150, final=0.02),
        eval=EvalSpec(every=200, proteins=100, passes=1, final_proteins=0, final_passes=1),
        checkpoint_every=100,
    )


def _gpu(
    name: str,
    layers: int,
    width: int,
    lr: float,
    *,
    steps: int,
    tokens: int,
    micro: int,
    parallel: str = "ddp",
) -> PretrainSpec:
    return PretrainSpec(
        name=name,
        model=ArchitectureSpec(n_layers=layers, d_model=width, n_heads=20, d_ff=4 * width),
        steps=steps,
        tokens_per_step=tokens,
        micro_tokens=micro,
        crop=1022,
        sampling="cluster",
        precision="bfloat16",
        compile=True,
        optimiser=OptimiserSpec(lr=lr),
        schedule=ScheduleSpec(kind="wsd", warmup=2000, decay=steps // 5, final=0.02),
        eval=EvalSpec(every=2000),
        workers=WorkersSpec(gpus=True, parallel="fsdp" if parallel == "fsdp" else "ddp"),
        checkpoint_every=1000,
    )


def protein_35m() -> PretrainSpec:
    """ESM-2's 35M shape; one GPU."""
    return _gpu("protein_35m", 12, 480, 1e-3, steps=50_000, tokens=262_144, micro=65_536)


def protein_150m() -> PretrainSpec:
    """ESM-2's 150M shape; a node of GPUs."""
    return _gpu("protein_150m", 30, 640, 4e-4, steps=200_000, tokens=1_048_576, micro=32_768)


def protein_650m() -> PretrainSpec:
    """ESM-2's 650M shape; several nodes, sharded weights."""
    spec = _gpu(
        "protein_650m", 33, 1280, 4e-4, steps=500_000, tokens=2_097_152, micro=16_384, parallel="fsdp"
    )
    return spec.override({"activation_checkpointing": True})


def protein_8m() -> PretrainSpec:
    """ESM-2's 8M shape with heads of 64, for about an hour of one CPU core: short crops, small batches, more masks.

    In so short a run every masked residue counts: a quarter is chosen and 90 % of these are masked. The 5 %
    random and 5 % kept ones still teach the model to predict at residues it can see (wild-type marginals).
    """
    return PretrainSpec(
        name="protein_8m",
        model=ArchitectureSpec(n_layers=6, d_model=320, n_heads=5, d_ff=1280, init="local"),
        steps=2800,
        tokens_per_step=2048,
        micro_tokens=2048,
        crop=254,
        sampling="cluster",
        precision="bfloat16",
        masking=Masking(rate=0.25, mask=0.9, random=0.05),
        optimiser=OptimiserSpec(lr=1e-3),
        schedule=ScheduleSpec(kind="wsd", warmup=100, decay=900, final=0.01),
        eval=EvalSpec(every=200, proteins=150, passes=1),
        checkpoint_every=250,
        checkpoint_minutes=3.0,
    )


def protein_homologs() -> PretrainSpec:
    """Reads homologs; two to three hours of two CPU cores, from a corpus prepared with --homologs.

    protein_8m's shape, so that it may begin with such a model (--init default), and a convolution of 7 residues.
    """
    base = protein_8m()
    return base.override(
        {
            "name": "protein_homologs",
            "model.reads_homologs": True,
            "model.convolution": 7,
            "steps": 8000,
            "tokens_per_step": 4096,
            "micro_tokens": 4096,
            "crop": 510,
            "masking.rate": 0.15,
            "schedule.decay": 4000,
            "eval.every": 500,
        }
    )


def protein_homologs_35m() -> PretrainSpec:
    """Reads homologs; ESM-2's 35M shape with a convolution of 7 residues, one GPU. Not run yet."""
    return _gpu("protein_homologs_35m", 12, 480, 1e-3, steps=50_000, tokens=262_144, micro=65_536).override(
        {"model.reads_homologs": True, "model.convolution": 7}
    )


def dna_8m() -> PretrainSpec:
    """protein_8m's shape for DNA, read on either strand; about an hour of one CPU core."""
    return protein_8m().override(
        {
            "name": "dna_8m",
            "alphabet": "dna",
            "reverse_complement": True,
            "sampling": "uniform",
            "crop": 510,
        }
    )


def rna_tiny() -> PretrainSpec:
    """protein_tiny's shape for RNA, one strand as it is given; minutes on one CPU core."""
    return protein_tiny().override({"name": "rna_tiny", "alphabet": "rna"})


RECIPES: dict[str, Callable[[], PretrainSpec]] = {
    f.__name__: f
    for f in (
        protein_tiny,
        protein_8m,
        protein_35m,
        protein_150m,
        protein_650m,
        protein_homologs,
        protein_homologs_35m,
        dna_8m,
        rna_tiny,
    )
}


def recipe(name: str) -> PretrainSpec:
    """The recipe of that name. Raises `SpecError`."""
    if name not in RECIPES:
        raise SpecError(f"{name!r} is not a recipe; the recipes are {', '.join(RECIPES)}.", field="recipe")
    return RECIPES[name]()

"""A small corpus with clusters and a validation set, and specs of seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import FAMILIES, LENGTH, LETTERS, plan, proteins, relative_of

from bioseq.homologs.mmseqs import find_mmseqs
from bioseq.homologs.reference import build_reference
from bioseq.sequences.fasta import read_fasta
from bioseq.specs.pretrain import PretrainSpec
from training.corpus.corpus import Corpus, open_corpus
from training.corpus.prepare import Prepare, prepare
from training.pretrain.recipes import recipe


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 proteins in 60 clusters of 1 to 7 members, and a validation set of 12."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train.txt").write_text("\n".join(proteins(240, 0)) + "\n")
    clusters = np.repeat(np.arange(60), [1, 7] * 30)
    (folder / "train.clusters").write_text("\n".join(map(str, clusters)) + "\n")
    (folder / "valid.txt").write_text("\n".join(proteins(12, 1)) + "\n")
    plan = Prepare(
        sources=(str(folder / "train.txt"),),
        clusters=(str(folder / "train.clusters"),),
        valid={"held": str(folder / "valid.txt")},
    )
    prepare(plan, folder / "corpus", progress=False)
    return folder / "corpus"


@pytest.fixture(scope="session")
def corpus(corpus_path: Path) -> Corpus:
    return open_corpus(corpus_path)


@pytest.fixture
def tiny(corpus_path: Path, tmp_path: Path) -> Callable[..., PretrainSpec]:
    """A spec of the tiny recipe, smaller yet; dotted overrides as keywords with __ for the dot."""

    def make(**settings: Any) -> PretrainSpec:
        base = {
            "corpus": str(corpus_path),
            "output": str(tmp_path / "run"),
            "engine": "local",
            "model.d_model": 32,
            "model.d_ff": 64,
            "steps": 20,
            "tokens_per_step": 512,
            "micro_tokens": 256,
            "schedule.warmup": 4,
            "schedule.decay": 5,
            "eval.every": 0,
            "checkpoint_every": 5,
            "log_every": 1,
            "workers.threads": 1,
            "trackers": [],
        }
        return recipe("protein_tiny").override(base | {k.replace("__", "."): v for k, v in settings.items()})

    return make


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve families: three training records and one held-out protein of each; in the reference set the
    representative of their cluster and three others."""
    folder = tmp_path_factory.mktemp("families")
    draw = np.random.default_rng(0)
    train, valid, reference = [], [], []
    for f in range(FAMILIES):
        ancestor = draw.choice(LETTERS, LENGTH)
        train += [f">t{f}_{i} cluster=rep{f}\n{relative_of(ancestor, draw, 0.2)}\n" for i in range(3)]
        valid.append(f">v{f}\n{relative_of(ancestor, draw, 0.2)}\n")
        reference.append(f">rep{f}\n{relative_of(ancestor, draw, 0.1)}\n")
        reference += [f">other{f}_{i}\n{relative_of(ancestor, draw, 0.3)}\n" for i in range(3)]
    (folder / "train.fasta").write_text("".join(train))
    (folder / "valid.fasta").write_text("".join(valid))
    (folder / "reference.fasta").write_text("".join(reference))
    build_reference(read_fasta(folder / "reference.fasta"), folder / "reference", name="families")
    return folder


@pytest.fixture(scope="session")
def family_corpus(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with homologs."""
    if find_mmseqs() is None:
        pytest.skip("needs MMseqs2 (pip install 'bioseq[homologs]')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOSEQ_HOME", str(tmp_path_factory.mktemp("home")))
        prepare(plan(sources), sources / "corpus", progress=False)
    return sources / "corpus"


@pytest.fixture
def reading(family_corpus: Path, tmp_path: Path) -> Callable[..., PretrainSpec]:
    def make(**settings) -> PretrainSpec:
        base = {
            "corpus": str(family_corpus),
            "output": str(tmp_path / "run"),
            "engine": "local",
            "model.d_model": 32,
            "model.d_ff": 64,
            "model.reads_homologs": True,
            "model.convolution": 3,
            "steps": 20,
            "tokens_per_step": 512,
            "micro_tokens": 256,
            "crop": 80,
            "schedule.warmup": 4,
            "schedule.decay": 5,
            "eval.every": 0,
            "eval.proteins": 0,
            "eval.passes": 0,
            "eval.final_passes": 0,
            "checkpoint_every": 5,
            "log_every": 1,
            "workers.threads": 1,
            "trackers": [],
        }
        return recipe("protein_tiny").override(base | {k.replace("__", "."): v for k, v in settings.items()})

    return make

"""A small corpus with clusters and a validation set, and specs of seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import proteins

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

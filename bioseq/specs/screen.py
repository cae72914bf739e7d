"""The spec of a screening run: a FASTA library in, a ranked table out (`bioseq screen`)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bioseq.errors import SpecError
from bioseq.specs.base import Spec

#: NCBI genetic code tables (Biopython's `CodonTable.unambiguous_dna_by_id`).
GENETIC_CODES = (*range(1, 7), *range(9, 17), *range(21, 34))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScreenSpec(Spec):
    """One run of `bioseq screen`. Every field but `workers`, `address` and `strict` decides the result and is
    held in the run's manifest: a run resumes only under equal ones.

    inputs: FASTA files (plain, gzip, bzip2 or xz), paths or URLs that pyarrow's filesystems open (`s3://`, `gs://`).
    output: the run folder, on a filesystem that all workers see.
    heads: names, `NAME@V`, or bundle folders.
    where, rank: expressions over the table's columns (docs/screening.md has the grammar).
    top: at most so many hits. diverse: at most so many hits a neighbourhood, whose members have a cosine of
    at least `diverse_threshold` to its best hit, embeddings centred on the library's mean.
    pareto: names or expressions, all maximised; hits are the records that none other dominates. An empty
    tuple means no front; `("*",)` takes every head's default score.
    long_sequences: what to do over the model's limit of residues. max_length: residues over which a record is
    quarantined under every policy.
    translate: the input is DNA; `one` reads frame 1 whole, `six` takes each frame's longest open stretch.
    homologs: which a backbone that reads homologs is given: `auto` (the set that it was trained with), `none`, `default`, or
    a reference set's folder. Other backbones take `auto` and `none`, which are the same.
    vectors: a vector store that is read and added to (docs/vectors.md), on a filesystem that all workers see, so that nothing is
    embedded twice. A run reads what the store held when it began.
    threads: of one engine; results are byte-equal only between runs of equal threads.
    batch_tokens: tokens of one forward pass; None is the model's own default.
    workers: engines side by side; None is one a GPU, else one a CPU core over `threads`. Never decides the
    result. address: a running Ray cluster; None starts Ray on this machine.
    """

    inputs: tuple[str, ...]
    output: str
    heads: tuple[str, ...]
    model: str = "default"
    where: str | None = None
    rank: str | None = None
    top: int | None = None
    diverse: int | None = None
    diverse_threshold: float = 0.9
    pareto: tuple[str, ...] = ()
    long_sequences: Literal["error", "window", "truncate"] = "window"
    max_length: int = 100_000
    translate: Literal["none", "one", "six"] = "none"
    genetic_code: int = 1
    keep_embeddings: bool = False
    homologs: str = "auto"
    vectors: str | None = None
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    batch_tokens: int | None = None
    workers: int | None = None
    address: str | None = None
    strict: bool = False

    def validate(self) -> None:
        if not self.inputs or not all(self.inputs):
            raise SpecError("at least one FASTA file is needed.", field="inputs")
        if not self.output:
            raise SpecError("a run folder is needed.", field="output", hint="Give one with -o.")
        if self.vectors == "":
            raise SpecError("the name is empty.", field="vectors", hint="Name a folder, or leave it out.")
        if not self.homologs:
            raise SpecError(
                "the name is empty.",
                field="homologs",
                hint="Give auto, none, default, or the folder of a reference set.",
            )
        if not self.heads or not all(self.heads):
            raise SpecError("at least one head is needed.", field="heads", hint="Give them as --heads A,B.")
        if len(set(self.heads)) != len(self.heads):
            raise SpecError("a head is named twice.", field="heads")
        for name in ("top", "diverse", "workers", "threads", "batch_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"{value} is too small; at least 1 is needed.", field=name)
        if not -1.0 <= self.diverse_threshold <= 1.0:
            raise SpecError(
                f"{self.diverse_threshold} is not a cosine between -1 and 1.", field="diverse_threshold"
            )
        if self.genetic_code not in GENETIC_CODES:
            known = ", ".join(map(str, GENETIC_CODES))
            raise SpecError(
                f"{self.genetic_code} is not an NCBI genetic code.",
                field="genetic_code",
                hint=f"Known: {known}.",
            )
        if self.pareto == ("*",) and len(self.heads) < 2:
            raise SpecError(
                "a Pareto front needs two heads or more.",
                field="pareto",
                hint="Or name columns: --pareto A.x,A.y",
            )
        if self.pareto and self.pareto != ("*",) and len(self.pareto) < 2:
            raise SpecError("a Pareto front needs two objectives or more.", field="pareto")

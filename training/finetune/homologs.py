"""The training rows' homologs while a head is fitted: one search, from which every fold takes what it may see."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.errors import OutputError
from bioseq.heads.features import clean
from bioseq.heads.homology import SEARCH as ROWS_SEARCH
from bioseq.heads.homology import TrainingRows, find_links, transfer
from bioseq.heads.profiles import SEARCH, find_profiles, pooled_profile
from bioseq.heads.relatives import Links
from bioseq.homologs.mmseqs import find_mmseqs
from bioseq.homologs.reference import build_reference, open_reference
from bioseq.output import atomic_file
from bioseq.progress import Progress
from bioseq.sequences.fasta import Record
from bioseq.specs.finetune import PROFILE, FinetuneSpec
from training.finetune.embeddings import cache_folder
from training.finetune.fit import say
from training.tables.labels import Labels

PROFILE_FROM = 500  # rows below which hundreds of columns more say little


def training_rows(
    labels: Labels, folder: Path, *, unit: str | None, licence: str, variants: bool
) -> TrainingRows:
    """The rows that a head was fitted on, as they will travel in its bundle."""
    records = (Record(i, clean(s), "labels") for i, s in zip(labels.ids, labels.sequences))
    reference = build_reference(records, folder, name="training-rows", licence=licence, pack="xz", force=True)
    names = list(labels.classes or labels.targets)
    ids = ["".join(i.split()) for i in labels.ids]
    return TrainingRows(reference, ids, labels.y, labels.task, names, unit, variants, labels.residues)


def _cached(
    kind: str,
    depends: bytes,
    sequences: Sequence[str],
    cache: str | None,
    make: Callable[[], dict[str, np.ndarray]],
    *,
    compress: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays that `make` gives for cleaned sequences, from the cache folder if they were made before. `depends` is what
    else they depend on."""
    digest = hashlib.sha256(depends)
    for s in sequences:
        digest.update(s.encode() + b"\n")
    file = cache_folder(cache) / f"{digest.hexdigest()}.{kind}.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            return dict(kept)
    made: dict[str, Any] = make()
    with contextlib.suppress(OutputError):  # a cache is a convenience
        with atomic_file(file, force=True) as temporary, open(temporary, "wb") as handle:
            (np.savez_compressed if compress else np.savez)(handle, **made)
    return made


def _in_parts(sequences: Sequence[str], label: str) -> Iterator[Sequence[str]]:
    """Some at a time, with progress."""
    with Progress(len(sequences), label, unit="sequences") as bar:
        for at in range(0, len(sequences), 500):
            some = sequences[at : at + 500]
            yield some
            bar.add(len(some))


def _columns(links: Links) -> dict[str, np.ndarray]:
    return {f"a{i}": a for i, a in enumerate(links.arrays())}


def _links(count: int, kept: dict[str, np.ndarray]) -> Links:
    return Links(count, *(kept[f"a{i}"] for i in range(5)))


def _ends(sequences: Sequence[str]) -> np.ndarray:
    return np.cumsum([len(s) for s in sequences])[:-1]


def links_cached(
    sequences: Sequence[str], rows: TrainingRows, *, cache: str | None, threads: int | None, label: str
) -> Links:
    """The hits of cleaned sequences, from the cache folder if they were found before."""

    def make() -> dict[str, np.ndarray]:
        with Progress(len(sequences), label, unit="sequences") as bar:
            return _columns(find_links(sequences, rows.reference, threads=threads, progress=bar))

    depends = f"{rows.reference.hash} {ROWS_SEARCH.hash}".encode()
    return _links(len(sequences), _cached("links", depends, sequences, cache, make, compress=True))


def blocks(links: Links, labels: Labels, outputs: int, *, own: bool) -> Callable[[np.ndarray], np.ndarray]:
    """From places of `labels` that may be looked at to the homology block of each query, near-identical rows left out.
    `own`: query i is row i of `labels`, whose own hit is left out."""
    far = links.distant()
    if own:
        far = far.only(far.owner != far.keys)

    def block(allowed: np.ndarray) -> np.ndarray:
        mask = np.zeros(len(labels), bool)
        mask[allowed[allowed < len(labels)]] = True
        return transfer(far, labels.y, labels.task, outputs, mask)

    return block


def wants_profiles(spec: FinetuneSpec, rows: int, alphabet: str) -> bool:
    """Whether profile blocks are tried: where the spec names them, or leaves the choice and has rows enough."""
    asked = PROFILE in spec.features if spec.features is not None else rows >= PROFILE_FROM
    if not asked or spec.homologs != "auto" or alphabet != "protein":
        return False
    if find_mmseqs() is None:
        say("MMseqs2 is not installed: no profiles of homologs are made")
        return False
    return True


def profiles_cached(
    sequences: Sequence[str], *, per_residue: bool, cache: str | None, threads: int | None, label: str
) -> list[np.ndarray]:
    """The profile block of each cleaned sequence, from the cache if it was found before."""

    def make() -> dict[str, np.ndarray]:
        blocks: list[np.ndarray] = []
        for some in _in_parts(sequences, label):
            found = find_profiles(some, threads=threads, cache=False)
            blocks += [p.columns().astype(np.float16) if per_residue else pooled_profile(p) for p in found]
        return {"blocks": np.concatenate(blocks) if per_residue else np.stack(blocks)}

    depends = f"{open_reference('default').hash} {SEARCH.hash} {per_residue}".encode()
    found = _cached("profiles", depends, sequences, cache, make)["blocks"]
    return np.split(found, _ends(sequences)) if per_residue else list(found)


def residue_blocks_cached(
    sequences: Sequence[str], rows: TrainingRows, *, cache: str | None, label: str
) -> tuple[Links, list[np.ndarray]]:
    """(hits, residue blocks) of cleaned sequences without near-identical rows, from the cache if they were found
    before."""
    assert rows.states is not None

    def make() -> dict[str, np.ndarray]:
        parts, blocks = [], []
        for some in _in_parts(sequences, label):
            links, found = rows.residue_links(some, fitting=True)
            parts.append(links)
            blocks += [b.astype(np.float16) for b in found]
        return {"blocks": np.concatenate(blocks), **_columns(Links.joined(parts))}

    depends = (
        f"{rows.reference.hash} {ROWS_SEARCH.hash}".encode()
        + np.concatenate(rows.states).astype(np.int8).tobytes()
    )
    kept = _cached("blocks", depends, sequences, cache, make)
    return _links(len(sequences), kept), np.split(kept["blocks"].astype(np.float32), _ends(sequences))

"""The training rows' homologs while a head is fitted: one search, from which every fold takes what it may see."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.heads.head import clean
from bioseq.heads.homology import Links, TrainingRows, find_links, transfer
from bioseq.heads.profiles import SEARCH, find_profiles, pooled_profile, residue_profile
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


def links_cached(
    sequences: Sequence[str], rows: TrainingRows, *, cache: str | None, threads: int | None, label: str
) -> Links:
    """The hits of cleaned sequences, from the cache folder if they were found before."""
    digest = hashlib.sha256(rows.reference.hash.encode())
    for s in sequences:
        digest.update(s.encode() + b"\n")
    file = cache_folder(cache) / f"{digest.hexdigest()}.links.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            return Links(len(sequences), *(kept[f"a{i}"] for i in range(5)))
    with Progress(len(sequences), label, unit="sequences") as bar:
        found = find_links(sequences, rows.reference, threads=threads, progress=bar)
    with atomic_file(file, force=True) as temporary, open(temporary, "wb") as handle:
        arrays: dict[str, Any] = {f"a{i}": a for i, a in enumerate(found.arrays())}
        np.savez_compressed(handle, **arrays)
    return found


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
    digest = hashlib.sha256(f"{open_reference('default').hash} {SEARCH.hash} {per_residue}".encode())
    for s in sequences:
        digest.update(s.encode() + b"\n")
    file = cache_folder(cache) / f"{digest.hexdigest()}.profiles.npz"
    cuts = np.cumsum([len(s) for s in sequences])[:-1] if per_residue else np.arange(1, len(sequences))
    if file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            return np.split(kept["blocks"], cuts) if per_residue else list(kept["blocks"])
    blocks: list[np.ndarray] = []
    with Progress(len(sequences), label, unit="sequences") as bar:
        for at in range(0, len(sequences), 500):
            some = sequences[at : at + 500]
            found = find_profiles(some, threads=threads, cache=False)
            blocks += [
                residue_profile(p).astype(np.float16) if per_residue else pooled_profile(p) for p in found
            ]
            bar.add(len(some))
    with atomic_file(file, force=True) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, blocks=np.concatenate(blocks) if per_residue else np.stack(blocks))
    return blocks


def residue_blocks_cached(
    sequences: Sequence[str], rows: TrainingRows, *, cache: str | None, label: str
) -> tuple[Links, list[np.ndarray]]:
    """(hits, residue blocks) of cleaned sequences without near-identical rows, from the cache if they were found
    before."""
    assert rows.states is not None
    digest = hashlib.sha256(
        rows.reference.hash.encode() + np.concatenate(rows.states).astype(np.int8).tobytes()
    )
    for s in sequences:
        digest.update(s.encode() + b"\n")
    file = cache_folder(cache) / f"{digest.hexdigest()}.blocks.npz"
    cuts = np.cumsum([len(s) for s in sequences])[:-1]
    if file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            links = Links(len(sequences), *(kept[f"a{i}"] for i in range(5)))
            return links, np.split(kept["blocks"].astype(np.float32), cuts)
    parts, blocks = [], []
    with Progress(len(sequences), label, unit="sequences") as bar:
        for at in range(0, len(sequences), 500):
            some = sequences[at : at + 500]
            links, found = rows.residue_links(some, fitting=True)
            parts.append((links.owner + at, *links.arrays()[1:]))
            blocks += [b.astype(np.float16) for b in found]
            bar.add(len(some))
    links = Links(len(sequences), *(np.concatenate(column) for column in zip(*parts)))
    with atomic_file(file, force=True) as temporary, open(temporary, "wb") as handle:
        arrays: dict[str, Any] = {f"a{i}": a for i, a in enumerate(links.arrays())}
        np.savez(handle, blocks=np.concatenate(blocks), **arrays)
    return links, [b.astype(np.float32) for b in blocks]

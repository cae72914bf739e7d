"""The homologs of a corpus: what a backbone that reads them is trained and evaluated on.

Every record is searched against a reference set as it will be in use, with residues hidden: 15 % of them, drawn
anew for each of `maskings` searches. In the held-out sets the hidden residues are those of the first `set_passes`
passes of the perplexity protocol. Of what is found, hits above 95 % identity are left out, and of a training record
also the sequence of the reference set that its cluster is named after: without it training would look like looking
up a near relative, which a new protein often does not have. Each search gives two views: all hits, and a random part
of them whose size is drawn log-uniformly from 1 to all.

Searches are made in jobs of 2,000 queries, whose results stay in the staging folder; a killed run resumes. A query's
result does not depend on its job.

Arrays in the folder `homologs` of a corpus (R residues of the records laid end to end, N records, K maskings,
V = 2 views, E = 21 columns, one byte each, see `pack_evidence`):

    train.hidden.npy    uint8 [K, R], 1 where a residue was hidden
    train.evidence.npy  uint8 [K, V, R, E]
    train.number.npy    int32 [K, V, N], homologs
    NAME.evidence.npy   uint8 [passes, R, E] of a held-out set
    NAME.number.npy     int32 [passes, N]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.backbones.packed.config import EVIDENCE_WIDTH, N_LETTERS
from bioseq.homologs.hits import Hits
from bioseq.homologs.profile import profile
from bioseq.homologs.reading import READING, evidence
from bioseq.homologs.reference import open_reference
from bioseq.homologs.search import search
from bioseq.sequences.alphabet import protein
from training.corpus.draws import HIDE, THIN, chosen, stream
from training.corpus.sources import key_of
from training.corpus.staging import Prepare

SET_SEED = 0  # of the perplexity protocol; a run that evaluates with homologs has this eval.seed
RATE = 0.15  # of a record's residues are hidden
VIEWS = 2
ALL, THINNED = range(VIEWS)
_JOB = 2000
_STEP, _DEPTH_STEP = 21.0, 16.0  # codes a unit of log-odds (so -6 to 6 fit), and of log(1 + depth)


def pack_evidence(values: np.ndarray) -> np.ndarray:
    """uint8 of float evidence [..., E]: log-odds within 0.024 (clipped at -6 and 6), the last column within 0.032."""
    out = np.empty(values.shape, dtype=np.uint8)
    out[..., :N_LETTERS] = np.clip(np.rint(values[..., :N_LETTERS] * _STEP) + 128, 0, 255)
    out[..., N_LETTERS] = np.clip(np.rint(values[..., N_LETTERS] * _DEPTH_STEP), 0, 255)
    return out


def unpack_evidence(codes: np.ndarray) -> np.ndarray:
    """float32 of what `pack_evidence` made."""
    out = codes.astype(np.float32)
    out[..., :N_LETTERS] = (out[..., :N_LETTERS] - 128) / _STEP
    out[..., N_LETTERS] /= _DEPTH_STEP
    return out


@dataclass
class Evidence:
    """The homologs of an open corpus; see the module's docstring for the arrays."""

    folder: Path
    manifest: dict[str, Any]
    offsets: np.ndarray
    hidden: np.ndarray
    train: np.ndarray

    @property
    def maskings(self) -> int:
        return len(self.hidden)

    def of(
        self, record: int, masking: int, view: int, start: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(hidden places int64 [K], evidence float32 [length, E]) of a stretch of a record."""
        begin = int(self.offsets[record]) + start
        part = slice(begin, begin + length)
        return np.flatnonzero(self.hidden[masking, part]), unpack_evidence(self.train[masking, view, part])

    def of_set(self, name: str) -> np.ndarray:
        """Codes uint8 [passes, R, E] of a held-out set, its members end to end."""
        return np.load(self.folder / f"{name}.evidence.npy", mmap_mode="r")


def open_evidence(path: Path, manifest: dict[str, Any], offsets: np.ndarray) -> Evidence | None:
    """The homologs of the corpus in `path`; None if it was prepared without."""
    folder = path / "homologs"
    if "homologs" not in manifest:
        return None
    hidden, train = (np.load(folder / f"train.{name}.npy", mmap_mode="r") for name in ("hidden", "evidence"))
    return Evidence(folder, manifest["homologs"], offsets, hidden, train)


# ---------------------------------------------------------------------------------------------- preparing


@dataclass
class _Query:
    ids: np.ndarray
    hidden: np.ndarray  # places
    cluster: int  # -1: none
    thin: np.random.Generator | None


def add_homologs(
    plan: Prepare,
    folder: Path,
    staging: Path,
    records: Callable[[], Iterator[np.ndarray]],
    lengths: np.ndarray,
    clusters: np.ndarray,
    sets: dict[str, list[np.ndarray]],
    *,
    run: Callable[[list[Path]], None],
) -> dict[str, Any]:
    """Search and write the arrays into `folder / "homologs"`; returns the manifest's entry. `records` gives the
    corpus's records anew at each call, `run` does the jobs of the files that it is handed (`do`, in any order)."""
    reference = open_reference(plan.homologs)
    (folder / "homologs").mkdir()
    total, count = int(lengths.sum()), len(lengths)

    def training(masking: int) -> Iterator[_Query]:
        for i, ids in enumerate(records()):
            draw = stream(plan.seed, HIDE, masking, i).random(len(ids))
            yield _Query(
                ids, np.flatnonzero(draw < RATE), int(clusters[i]), stream(plan.seed, THIN, masking, i)
            )

    parts: dict[str, list[Path]] = {}
    for k in range(plan.maskings):
        parts[f"train-{k}"] = _stage(staging, f"train-{k}", training(k), plan)
    for name, members in sets.items():
        for p in range(plan.set_passes):
            queries = (_Query(ids, chosen(ids, SET_SEED)[p], -1, None) for ids in members)
            parts[f"{name}-{p}"] = _stage(staging, f"set-{name}-{p}", queries, plan)
    run([file for files in parts.values() for file in files if not _result(file).exists()])

    def create(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.lib.format.open_memmap(
            folder / "homologs" / f"{name}.npy", mode="w+", dtype=dtype, shape=shape
        )

    hidden = create("train.hidden", (plan.maskings, total), np.uint8)
    codes = create("train.evidence", (plan.maskings, VIEWS, total, EVIDENCE_WIDTH), np.uint8)
    number = create("train.number", (plan.maskings, VIEWS, count), np.int32)
    for k in range(plan.maskings):
        _collect(parts[f"train-{k}"], codes[k], number[k], hidden[k])
    for name, members in sets.items():
        size = sum(map(len, members))
        set_codes = create(f"{name}.evidence", (plan.set_passes, size, EVIDENCE_WIDTH), np.uint8)
        set_number = create(f"{name}.number", (plan.set_passes, len(members)), np.int32)
        for p in range(plan.set_passes):
            _collect(parts[f"{name}-{p}"], set_codes[p][None], set_number[p][None], None)
    for array in (hidden, codes, number):
        array.flush()  # type: ignore[attr-defined]
    return {
        "reference": reference.hash,
        "name": reference.name,
        "settings": READING.to_json(),
        "maskings": plan.maskings,
        "set_passes": plan.set_passes,
        "without_homologs": float((number[:, ALL] == 0).mean()) if count else 0.0,
    }


def _result(file: Path) -> Path:
    return file.with_suffix(".found.npz")


def _stage(staging: Path, name: str, queries: Iterable[_Query], plan: Prepare) -> list[Path]:
    """Write the jobs' inputs; those that were written before are kept."""
    files: list[Path] = []
    waiting: list[_Query] = []

    def write() -> None:
        if not waiting:
            return
        file = staging / f"homologs-{name}-{len(files):05d}.npz"
        files.append(file)
        if not file.exists():
            thin = [_thinner(q.thin) for q in waiting]
            flags = [np.isin(np.arange(len(q.ids)), q.hidden) for q in waiting]
            _save(
                file,
                ids=np.concatenate([q.ids for q in waiting]),
                hidden=np.concatenate(flags).astype(np.uint8),
                lengths=np.array([len(q.ids) for q in waiting]),
                clusters=np.array([q.cluster for q in waiting], dtype=np.int64),
                thin=np.array(thin, dtype=np.int64),
                reference=np.array(str(plan.homologs)),
            )
        waiting.clear()

    for query in queries:
        waiting.append(query)
        if len(waiting) == _JOB:
            write()
    write()
    return files


def _thinner(generator: np.random.Generator | None) -> int:
    """A seed, so that a job's file holds numbers only; -1: one view."""
    return -1 if generator is None else int(generator.integers(2**62))


def _save(file: Path, **arrays: np.ndarray) -> None:
    part = file.with_suffix(".part")
    with open(part, "wb") as handle:
        np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]
    os.replace(part, file)


def do(file: Path) -> None:
    """One job: the searches of a file of queries, and their views, into a file beside it."""
    with np.load(file, allow_pickle=False) as job:
        lengths, clusters, thin = job["lengths"], job["clusters"], job["thin"]
        cuts = np.cumsum(lengths)[:-1]
        ids, hidden = np.split(job["ids"], cuts), np.split(job["hidden"], cuts)
        reference = open_reference(str(job["reference"]))
    masked = []
    letters = protein()
    for residues, flags in zip(ids, hidden):
        text = np.array(list(letters.decode(residues)), dtype="U1")
        text[flags == 1] = "X"
        masked.append("".join(text))
    views: list[list[np.ndarray]] = [[], []]
    numbers: list[list[int]] = [[], []]
    for hits, cluster, seed in zip(search(masked, reference, READING), clusters.tolist(), thin.tolist()):
        kept = (
            hits.select(np.array([key_of(i) != cluster for i in hits.ids], dtype=bool))
            if cluster >= 0
            else hits
        )
        for view in range(VIEWS if seed >= 0 else 1):
            some = kept if view == ALL else thinned(kept, np.random.default_rng(seed))
            views[view].append(pack_evidence(evidence(profile(some))))
            numbers[view].append(len(some))
    used = VIEWS if numbers[THINNED] else 1
    _save(
        _result(file),
        evidence=np.stack([np.concatenate(v) for v in views[:used]]),
        number=np.array(numbers[:used], dtype=np.int32),
        hidden=np.concatenate(hidden),
    )


def thinned(hits: Hits, generator: np.random.Generator) -> Hits:
    """A random part of the hits, in their order; its size is log-uniform from 1 to all."""
    if len(hits) < 2:
        return hits
    size = int(np.exp(generator.uniform(0, np.log(len(hits) + 1))))
    return hits.select(np.sort(generator.choice(len(hits), min(size, len(hits)), replace=False)))


def _collect(files: list[Path], codes: np.ndarray, number: np.ndarray, hidden: np.ndarray | None) -> None:
    residue = query = 0
    for file in files:
        with np.load(_result(file), allow_pickle=False) as found:
            size, some = found["evidence"].shape[1], found["number"].shape[1]
            codes[:, residue : residue + size] = found["evidence"]
            number[:, query : query + some] = found["number"]
            if hidden is not None:
                hidden[residue : residue + size] = found["hidden"]
        residue, query = residue + size, query + some

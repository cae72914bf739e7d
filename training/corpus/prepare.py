"""From sequence files to a corpus: check, stage, deduplicate, write.

Three passes, each flat in memory but for about 25 bytes a record (keep flag, cluster, length, offset) in the last:

1. *stage* (`training.corpus.staging`): each source is read as a stream, checked and encoded into chunks. With Ray
   several sources are staged in parallel (`training.corpus.ray`).
2. *deduplicate*: records of equal digest are one; the first in source order stays. Done bucket by bucket of
   the digest's first byte, so that at most 1/256 of the digests are in memory. Sequences of the validation
   sets are left out of the corpus the same way.
3. *write*: kept records go to shards in source order; clusters are indexed; hashes go to the manifest.

The staging folder lies beside the output and is removed at the end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bioseq.errors import InputError, OutputError, SequenceError
from bioseq.homologs.reference import open_reference
from bioseq.output import atomic_folder, check_free
from bioseq.progress import Progress
from bioseq.sequences.alphabet import by_name
from training.corpus.corpus import FORMAT, hash_of, read_records, sha256
from training.corpus.homologs import add_homologs, do
from training.corpus.sources import read_source
from training.corpus.staging import Prepare, Staged, chunks, digest, stage

SHARD_RESIDUES = 256 << 20


def prepare(
    plan: Prepare, output: str | Path, *, force: bool = False, progress: bool = True, parallel: bool = False
) -> dict[str, Any]:
    """Make the corpus; returns its manifest. Raises `InputError`, `SequenceError` naming file and line, and
    `OutputError`; nothing is left under `output` then, and what was staged is used by the next attempt."""
    plan.check()
    output = Path(output)
    check_free(output, force=force)
    described = {**asdict(plan), "sizes": [Path(p).stat().st_size for p in plan.sources]}
    if plan.homologs:
        described["reference"] = open_reference(plan.homologs).hash
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
    staging = output.parent / f".{output.name}.{key}.staging"
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {staging}: {error.strerror}.") from error
    if parallel:
        from training.corpus.ray import stage_all

        stage_all(plan, staging)
    else:
        for i, source in enumerate(plan.sources):
            # The number of records is not known before they are read: 100 bytes a record is a guess.
            guess = max(1000, Path(source).stat().st_size // 100)
            with Progress(guess, f"reading {Path(source).name}", unit="records", enabled=progress) as bar:
                stage(plan, i, staging, bar.add)
    with atomic_folder(output, force=force) as folder:
        manifest = _write(plan, staging, folder, parallel=parallel, progress=progress)
    shutil.rmtree(staging)
    return manifest


def _write(plan: Prepare, staging: Path, folder: Path, *, parallel: bool, progress: bool) -> dict[str, Any]:
    staged = [c for i in range(len(plan.sources)) for c in chunks(staging, i)]
    sets = {name: _encode_set(plan, path) for name, path in plan.valid.items()}
    known = {digest(ids) for members in sets.values() for ids in members}
    keep, duplicates, leaks = _keep(plan, staged, staging, known)
    if plan.proteins:
        _sample(plan, staged, staging, keep)
    total = int(np.count_nonzero(keep))
    clusters = np.full(len(keep), -1, dtype=np.int64)
    at = 0
    held: list[np.ndarray] = []
    writer = _Shards(folder)
    for chunk in staged:
        stem = staging / f"{chunk.source:05d}-{chunk.chunk:05d}"
        tokens = np.fromfile(f"{stem}.tokens.bin", dtype=np.uint8)
        lengths = np.load(f"{stem}.lengths.npy")
        groups = np.load(f"{stem}.clusters.npy")
        ends = np.cumsum(lengths, dtype=np.int64)
        flags = keep[at : at + chunk.records]
        for i in np.flatnonzero(flags):
            ids = tokens[ends[i] - lengths[i] : ends[i]]
            if plan.held_out and _is_held(plan, int(groups[i]), ids):
                held.append(ids.copy())
                flags[i] = False
            else:
                writer.add(ids)
        clusters[at : at + chunk.records] = groups
        at += chunk.records
    counts = writer.close()
    if plan.held_out:
        sets["held_out"] = held
    _write_sets(folder, sets)
    n_clusters = _write_clusters(folder, clusters[keep])
    extra = {}
    if plan.homologs:
        extra["homologs"] = add_homologs(
            plan,
            folder,
            staging,
            lambda: read_records(folder),
            np.load(folder / "lengths.npy"),
            clusters[keep],
            sets,
            run=partial(_search, parallel=parallel, progress=progress),
        )
    names = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in names
    }
    manifest = {
        "format": FORMAT,
        "hash": hash_of(files),
        "alphabet": plan.alphabet,
        "records": writer.records,
        "residues": writer.residues,
        "clusters": n_clusters,
        "token_counts": counts.tolist(),
        "shards": writer.shards,
        "sets": {n: {"records": len(m), "residues": int(sum(map(len, m)))} for n, m in sets.items()},
        "left_out": {
            "bad": sum(c.bad for c in staged),
            "outside_length_bounds": sum(c.outside for c in staged),
            "duplicates": duplicates,
            "in_validation_sets": leaks,
            "held_out": total - writer.records,
        },
        "sources": [
            {"name": Path(p).name, "bytes": Path(p).stat().st_size, "sha256": sha256(Path(p))}
            for p in (*plan.sources, *plan.clusters, *plan.valid.values())
        ],
        "options": {
            "min_length": plan.min_length,
            "max_length": plan.max_length,
            "deduplicate": plan.deduplicate,
            "held_out": plan.held_out,
            "seed": plan.seed,
            "proteins": plan.proteins,
        },
        "files": files,
        **extra,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    if writer.records == 0:
        raise InputError("no sequence is left for the corpus.", hint="Look at the sources and length bounds.")
    return manifest


def _search(files: list[Path], *, parallel: bool, progress: bool) -> None:
    if parallel:
        from training.corpus.ray import search_all

        return search_all(files)
    with Progress(len(files), "searching homologs", unit="jobs", enabled=progress) as bar:
        for file in files:
            do(file)
            bar.add()


def _sample(plan: Prepare, staged: list[Staged], staging: Path, keep: np.ndarray) -> None:
    """Clear the flags of all but `plan.proteins` records: clusters in an order of their hashes under the seed, the
    record with the lowest digest of each; a record without cluster is one of its own."""
    stems = [staging / f"{c.source:05d}-{c.chunk:05d}" for c in staged]
    clusters = np.concatenate([np.load(f"{s}.clusters.npy") for s in stems])
    raw = np.concatenate([np.fromfile(f"{s}.digests.bin", dtype=np.uint8) for s in stems])
    digests = raw.view(np.uint64)[::2]
    seed = str(plan.seed).encode()

    def rank(number: int) -> int:
        hashed = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8, key=seed)
        return int.from_bytes(hashed.digest(), "little")

    places = np.flatnonzero(keep)
    own = np.where(clusters < 0, digests, clusters.astype(np.uint64))[places]
    names, which = np.unique(own, return_inverse=True)
    ranks = np.array([rank(int(n)) for n in names], dtype=np.uint64)[which]
    order = np.lexsort((digests[places], ranks))
    first = np.r_[True, ranks[order][1:] != ranks[order][:-1]]
    keep[:] = False
    keep[places[order[first][: plan.proteins]]] = True


def _encode_set(plan: Prepare, path: str) -> list[np.ndarray]:
    alphabet = by_name(plan.alphabet)
    members = []
    for sequence, _, where in read_source(path):
        try:
            members.append(alphabet.encode(sequence).ids)
        except SequenceError as error:
            raise error.at(source=where) from None
    return members


def _keep(
    plan: Prepare, staged: list[Staged], staging: Path, known: set[bytes]
) -> tuple[np.ndarray, int, int]:
    """bool [all records]: the first of each digest that is in no validation set; counts of what falls out."""
    keep = np.ones(sum(c.records for c in staged), dtype=bool)
    leaks = np.frombuffer(b"".join(sorted(known)), dtype="S16") if known else np.zeros(0, "S16")
    n_leaks = duplicates = 0

    def digests() -> Iterator[tuple[int, np.ndarray]]:
        at = 0
        for c in staged:
            raw = np.fromfile(staging / f"{c.source:05d}-{c.chunk:05d}.digests.bin", dtype=np.uint8)
            yield at, raw.reshape(-1, 16)
            at += c.records

    # Few records need no buckets; buckets bound the memory of many.
    buckets = 1 if len(keep) < 4_000_000 else 256
    for bucket in range(buckets):
        places, rows = [], []
        for at, raw in digests():
            chosen = np.arange(len(raw)) if buckets == 1 else np.flatnonzero(raw[:, 0] == bucket)
            places.append(chosen + at)
            rows.append(raw[chosen])
        where = np.concatenate(places)
        # Two unsigned halves, not "S16": numpy strips trailing zero bytes from strings.
        halves = np.ascontiguousarray(np.concatenate(rows)).view(np.uint64).reshape(-1, 2)
        if len(leaks):
            bad = np.frombuffer(leaks.tobytes(), dtype=np.uint64).reshape(-1, 2)
            hit = np.isin(halves[:, 0], bad[:, 0])
            pairs = set(map(tuple, bad.tolist()))
            for i in np.flatnonzero(hit):
                if tuple(halves[i].tolist()) in pairs:
                    keep[where[i]] = False
                    n_leaks += 1
        if plan.deduplicate:
            order = np.lexsort((where, halves[:, 1], halves[:, 0]))
            same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
            later = where[order[1:][same]]
            duplicates += int(np.count_nonzero(keep[later]))
            keep[later] = False
    return keep, duplicates, n_leaks


def _is_held(plan: Prepare, cluster: int, ids: np.ndarray) -> bool:
    name = cluster.to_bytes(8, "little") if cluster >= 0 else digest(ids)
    drawn = hashlib.blake2b(name, digest_size=8, key=str(plan.seed).encode()).digest()
    return int.from_bytes(drawn, "little") < plan.held_out * 2**64


class _Shards:
    """Appends records to token shards; lengths and offsets at the end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards: list[dict[str, Any]] = []
        self.records = self.residues = 0
        self._lengths = array("i")
        self._handle: Any = None
        self._in_shard = 0
        self._counts = np.zeros(256, dtype=np.int64)

    def add(self, ids: np.ndarray) -> None:
        if self._handle is None or self._in_shard + len(ids) > SHARD_RESIDUES:
            if self._handle is not None:
                self._handle.close()
            name = f"tokens-{len(self.shards):05d}.bin"
            self.shards.append({"file": name, "first": self.records})
            self._handle, self._in_shard = open(self.folder / name, "wb"), 0  # noqa: SIM115
        self._handle.write(ids.tobytes())
        self._counts += np.bincount(ids, minlength=256)
        self._in_shard += len(ids)
        self._lengths.append(len(ids))
        self.records += 1
        self.residues += len(ids)

    def close(self) -> np.ndarray:
        if self._handle is not None:
            self._handle.close()
        lengths = np.array(self._lengths, dtype=np.int32)
        np.save(self.folder / "lengths.npy", lengths)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        np.save(self.folder / "offsets.npy", offsets)
        used = int(np.flatnonzero(self._counts).max()) + 1 if self.records else 1
        return self._counts[:used]


def _write_sets(folder: Path, sets: dict[str, list[np.ndarray]]) -> None:
    for name, members in sets.items():
        (folder / "sets").mkdir(exist_ok=True)
        np.concatenate([*members, np.zeros(0, np.uint8)]).tofile(folder / "sets" / f"{name}.tokens.bin")
        np.save(folder / "sets" / f"{name}.lengths.npy", np.array([len(m) for m in members], dtype=np.int32))


def _write_clusters(folder: Path, clusters: np.ndarray) -> int:
    """Index of the clusters, if every record has one; their number."""
    if len(clusters) == 0 or (clusters < 0).any():
        return 0
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    np.save(folder / "cluster_order.npy", order.astype(np.int64))
    np.save(folder / "cluster_starts.npy", np.append(starts, len(clusters)).astype(np.int64))
    return len(starts)

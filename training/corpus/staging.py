"""Pass 1 of preparing a corpus: what is asked for, and each source checked and encoded into chunks on disk.

A chunk has about 32 M residues and a 128-bit digest of every sequence. A finished chunk is never made again, so a
killed run resumes. Sources are independent of each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bioseq.errors import InputError, OutputError, SequenceError
from bioseq.sequences.alphabet import by_name
from training.corpus.draws import PASSES
from training.corpus.sources import read_source

CHUNK_RESIDUES = 32 << 20


@dataclass(frozen=True)
class Prepare:
    """What to prepare. `sources` are paths, `clusters` the parallel files (same order, or empty);
    `valid` maps a set's name to a file. `held_out` is the share of clusters that becomes the set `held_out`
    (records without cluster count as their own). `on_error` "skip" counts bad records and goes on.

    `proteins`: so many records only, one of each cluster, clusters drawn by the seed (0: all). `homologs`: the
    reference set ("default" or a folder) that they are searched against, `maskings` times each, and the held-out
    sets for `set_passes` passes; "" for none."""

    sources: tuple[str, ...]
    clusters: tuple[str, ...] = ()
    valid: dict[str, str] = field(default_factory=dict)
    alphabet: str = "protein"
    min_length: int = 1
    max_length: int = 0
    deduplicate: bool = True
    held_out: float = 0.0
    seed: int = 0
    on_error: str = "error"
    proteins: int = 0
    homologs: str = ""
    maskings: int = 1
    set_passes: int = 1

    def check(self) -> None:
        if not self.sources:
            raise InputError("no source was given.", hint="Name FASTA or text files.")
        if self.clusters and len(self.clusters) != len(self.sources):
            raise InputError(
                f"{len(self.clusters)} cluster files were given for {len(self.sources)} sources."
            )
        if self.min_length < 1 or (self.max_length and self.max_length < self.min_length):
            raise InputError(f"length bounds {self.min_length} to {self.max_length} hold no sequence.")
        if not 0.0 <= self.held_out < 1.0:
            raise InputError(f"held-out share {self.held_out} is not in [0, 1).")
        for name in self.valid:
            if not name.replace("_", "").isalnum() or name == "held_out":
                raise InputError(
                    f"{name!r} cannot be the name of a set.",
                    hint="Use letters, digits and _; held_out is taken.",
                )
        if self.proteins < 0:
            raise InputError(f"{self.proteins} proteins were asked for; 0 (all) or more are needed.")
        if not 1 <= self.maskings <= 100 or not 1 <= self.set_passes <= PASSES:
            raise InputError(
                f"{self.maskings} maskings and {self.set_passes} passes were asked for; "
                f"1 to 100 and 1 to {PASSES} are possible."
            )
        if self.homologs and self.alphabet != "protein":
            raise InputError(
                f"a corpus of {self.alphabet} has no homologs.", hint="Homologs are searched among proteins."
            )
        for path in (*self.sources, *self.clusters, *self.valid.values()):
            if not Path(path).is_file():
                raise InputError(f"cannot read {path}: no such file.")


@dataclass
class Staged:
    """One chunk: `read` records of the source so far, `bad` skipped and `outside` the length bounds in it."""

    source: int
    chunk: int
    records: int
    read: int
    bad: int
    outside: int
    last: bool


def digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def stage(plan: Prepare, source: int, staging: Path, tick: Callable[[int], None] = lambda n: None) -> None:
    """Stage one source. `tick` is called with 1,000 after every 1,000 records."""
    done = chunks(staging, source)
    if done and done[-1].last:
        return
    alphabet = by_name(plan.alphabet)
    clusters = plan.clusters[source] if plan.clusters else None
    skip, number = (done[-1].read if done else 0), len(done)
    ids: list[np.ndarray] = []
    groups: list[int] = []
    size = bad = outside = read = 0
    for read, (sequence, cluster, where) in enumerate(read_source(plan.sources[source], clusters), start=1):
        if read % 1000 == 0:
            tick(1000)
        if read <= skip:
            continue
        try:
            encoded = alphabet.encode(sequence).ids
        except SequenceError as error:
            if plan.on_error != "skip":
                raise error.at(source=where) from None
            bad += 1
            continue
        if len(encoded) < plan.min_length or (plan.max_length and len(encoded) > plan.max_length):
            outside += 1
            continue
        ids.append(encoded)
        groups.append(cluster)
        size += len(encoded)
        if size >= CHUNK_RESIDUES:
            state = Staged(source, number, len(ids), read, bad, outside, last=False)
            _write_chunk(staging, state, ids, groups)
            ids, groups, number = [], [], number + 1
            size = bad = outside = 0
    _write_chunk(staging, Staged(source, number, len(ids), read, bad, outside, last=True), ids, groups)


def _write_chunk(staging: Path, state: Staged, ids: list[np.ndarray], groups: list[int]) -> None:
    stem = staging / f"{state.source:05d}-{state.chunk:05d}"
    try:
        np.concatenate([*ids, np.zeros(0, np.uint8)]).tofile(f"{stem}.tokens.bin")
        np.save(f"{stem}.lengths.npy", np.array([len(i) for i in ids], dtype=np.int32))
        np.save(f"{stem}.clusters.npy", np.array(groups, dtype=np.int64))
        np.frombuffer(b"".join(map(digest, ids)), dtype=np.uint8).tofile(f"{stem}.digests.bin")
        part = Path(f"{stem}.json.part")
        part.write_text(json.dumps(asdict(state)))
        os.replace(part, f"{stem}.json")
    except OSError as error:
        raise OutputError(f"cannot write {stem}: {error.strerror}.", hint="Check the free space.") from error


def chunks(staging: Path, source: int) -> list[Staged]:
    """The finished chunks of a source, in order."""
    files = sorted(staging.glob(f"{source:05d}-*.json"))
    return [Staged(**json.loads(f.read_text())) for f in files]
